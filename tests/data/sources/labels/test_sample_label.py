"""The class in `.cls` and `.json`, and texts that are no class."""

from __future__ import annotations

import pytest

from pipeline.data.sources.keys import group_members
from pipeline.data.sources.labels.sample_label import Label, read_label
from pipeline.errors import DataError


def label(data: bytes, ending: str = "cls") -> Label:
    (sample,) = group_members(("jpg", ending)).samples
    return read_label(sample, ["a.jpg", f"a.{ending}"], [b"", data].__getitem__, "x.tar")


@pytest.mark.parametrize(
    ("data", "stated"),
    [
        (b"3", 3), (b" 12\n", 12), (b"007", 7), (b"\xef\xbb\xbf5", 5), (b"5.0", 5), (b"-1", None), (b"", None),
        (b"\n", None),
        (b"nan", None), (b"NA", None), (b"golden retriever", "golden retriever"), (b"K\xc3\xa4se", "Käse"),
        ("Ka\u0308se".encode(), "Käse"), (b"n02094433", "n02094433"), (b"C-3PO", "C-3PO"),
    ],
)  # fmt: skip
def test_the_text_of_a_cls(data: bytes, stated: Label) -> None:
    assert label(data) == stated


@pytest.mark.parametrize("ending", ["label", "class", "target", "category", "cls.txt", "label.txt"])
def test_other_names_of_a_cls(ending: str) -> None:
    assert label(b"3", ending) == 3


@pytest.mark.parametrize("ending", ["txt", "caption", "id", "classes.txt"])
def test_text_that_is_no_class(ending: str) -> None:
    assert label(b"3", ending) is None


@pytest.mark.parametrize(
    ("data", "stated"),
    [
        (b'{"label": 3}', 3), (b'{"target": 3}', 3), (b'{"LABEL": 3}', 3), (b'{"class": "cat"}', "cat"),
        (b'{"class_id": 4, "class_name": "cat"}', "cat"),
        (b'{"label": "3"}', 3), (b'{"label": 3.0}', 3), (b'{"label": true}', 1), (b'{"label": null}', None),
        (b'{"label": -1}', None),
        (b'{"label": ""}', None), (b'{"label": NaN}', None), (b'{"label": 2, "score": NaN}', 2), (b"5", 5),
        (b'"a caption"', None),
        (b'{"caption": "the label: 3", "y": 4}', None), (b"no json", None), (b"[" * 100_000, None),
        (b'{"objects": [{"label": 3}]}', None),
    ],
)  # fmt: skip
def test_the_field_of_a_json(data: bytes, stated: Label) -> None:
    assert label(data, "json") == stated


@pytest.mark.parametrize(
    ("ending", "data"),
    [
        ("cls", b"1 5 7"), ("cls", b"[0, 1]"), ("cls", b"1.5"), ("cls", b"-7"), ("cls", b"18446744073709551615"),
        ("cls", b"2147483648"),
        ("cls", b"\x80\x04K\x03."), ("cls", b"a\nb"), ("cls", b"\x1b[31mred"), ("cls", b"x" * 5000),
        ("label", b"\0\1\2"),
        ("json", b'{"label": [0, 1]}'), ("json", b'{"label": {"id": 3}}'), ("json", b'{"class": 1.5}'),
        ("json", b'{"label": 1'),
        ("json", b'{"label": ' + b"9" * 30 + b"}"), ("json", b'{"label": 1e999}'),
        ("json", b'{"label": ' + b"[" * 100_000),
    ],
)  # fmt: skip
def test_what_is_found_and_is_no_class_is_told_with_the_way_on(ending: str, data: bytes) -> None:
    with pytest.raises(DataError, match=rf"^x.tar: a.{ending}: .*--labels none$") as refused:
        label(data, ending)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400
