"""Comparison of two lists of class names."""

from __future__ import annotations

import pytest

from pipeline.data.sources.labels.class_names import (
    are_numbers,
    compared,
    find,
    listed,
    mapping,
    match_by_number,
    parse,
)

RUN = ["blue", "green", "red"]


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (["blue", "green", "red"], [0, 1, 2]),
        (["green", "red", "blue"], [1, 2, 0]),
        (["red"], [2]),
        (["red", "blue"], [2, 0]),
        ([], []),
        (["blue", "green", "red", "owl"], None),
        (["Blue"], None),
        (["red", "red"], None),
        (["0", "1", "2"], None),
    ],
)
def test_classes_are_found_by_name(theirs: list[str], expected: list[int] | None) -> None:
    assert mapping(RUN, theirs) == expected


def test_names_are_compared_after_normalization() -> None:
    assert mapping(["caf\u00e9", "the"], ["the", "cafe\u0301"]) == [1, 0]


def test_a_name_that_stands_for_two_classes_is_not_found_unless_the_lists_are_equal() -> None:
    crane = ["crane", "owl", "crane"]
    assert mapping(crane, crane) == [0, 1, 2]
    assert find(crane, ["crane", "owl"]) == [None, 1]
    assert mapping(["caf\u00e9", "cafe\u0301"], ["caf\u00e9"]) is None


def test_numbers_are_names_of_none() -> None:
    assert are_numbers(["0", "1", "2"]) and are_numbers([])
    assert not any(map(are_numbers, (["1", "0"], ["1", "2"], ["00"], RUN)))
    assert mapping(["0", "1", "2"], ["0", "1"]) == [0, 1]
    assert mapping([str(i) for i in range(10)], ["3", "7"]) == [3, 7]


@pytest.mark.parametrize(
    ("names", "theirs", "expected"),
    [
        (RUN, ["0", "1", "2"], True),
        (RUN, ["0", "1"], True),
        (RUN, ["0", "1", "2", "3"], False),
        (["0", "1", "2"], RUN, True),
        (["0", "1", "2", "3"], RUN, False),
        (RUN, ["cat", "dog", "owl"], False),
        (["0", "1"], ["0", "1"], False),
    ],
)
def test_numbers_meet_names_where_they_fit(names: list[str], theirs: list[str], expected: bool) -> None:
    assert match_by_number(names, theirs) is expected


def test_long_lists_are_shortened_so_that_the_difference_is_seen() -> None:
    many = [f"class {i}" for i in range(1000)]
    other = [name if name != "class 500" else "class five hundred" for name in many]
    assert listed(many, other).startswith("class 500, class 0, ") and listed(many, other).endswith("… of 1,000")
    assert compared(many, other).count("five hundred") == 1
    assert listed(RUN, ()) == "blue, green, red"
    assert listed(["a\x1b[2J\n", "x" * 100], ()) == "a\\x1b[2J\\n, " + "x" * 40 + "…"


@pytest.mark.parametrize("value", [None, "abc", ["a"], ["a", 1, "c"], {"0": "a", "1": "b", "2": "c"}, 3])
def test_what_is_no_list_of_so_many_names_is_none(value: object) -> None:
    assert parse(value, 3) is None
    assert parse(RUN, 3) == tuple(RUN)
