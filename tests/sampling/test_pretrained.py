"""The classes of a trained network, renumbered for a run whose data numbers them otherwise."""

from __future__ import annotations

import re

import pytest
import torch

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.sampling.pretrained import Pretrained, with_classes

TABLE = "class_embedding.weight"


def model(*names: str, known: bool = True) -> Pretrained:
    """Row i of its table holds i; the last one is the null label."""
    config = Config.model_validate({"model": {"num_classes": len(names)}})
    rows = torch.arange(len(names) + 1.0)[:, None].repeat(1, 4)
    return Pretrained(config, {TABLE: rows, "x": torch.ones(1)}, "id", class_names=names if known else None)


@pytest.mark.parametrize(
    ("theirs", "ours", "rows", "told"),
    [
        (["blue", "red"], ["blue", "red"], [0, 1, 2], ""),
        (["blue", "red"], ["red", "blue"], [1, 0, 2], r"matched by name \(\[blue, red\] there, \[red, blue\] here\)"),
        (["a", "b", "c"], ["c", "a"], [2, 0, 3], "matched by name"),
        (["a", "b"], ["b", "new", "a"], [1, 2, 0, 2], "lacks the classes new: they begin as its null label"),
        (["caf\u00e9", "b"], ["b", "cafe\u0301"], [1, 0, 2], "matched by name"),
        (["0", "1"], ["red", "blue"], [0, 1, 2], "numbers cannot be compared with names"),
        (["red", "blue"], ["0", "1"], [0, 1, 2], "numbers cannot be compared with names"),
        (["0", "1", "2"], ["0", "1"], [0, 1, 3], "matched by name"),
    ],
)
def test_the_rows_of_the_table_follow_the_names(
    theirs: list[str], ours: list[str], rows: list[int], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = with_classes(model(*theirs), ours, "train.init_from old")
    assert taken.weights[TABLE][:, 0].tolist() == rows
    assert taken.config.model.num_classes == len(ours)
    said = capsys.readouterr().err
    assert bool(said) == bool(told) and re.search(told, said)


def test_a_model_without_names_has_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    taken = with_classes(model("a", "b", known=False), ["red", "blue"], "old")
    assert taken.weights[TABLE][:, 0].tolist() == [0, 1, 2]
    assert "[0, 1] there, [red, blue] here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["blue", "green", "red"], ["cat", "dog", "owl"]),
        (["blue", "green", "red"], ["blue", "green", "owl"]),
        (["0", "1", "2"], ["red", "blue"]),
        (["red", "blue"], ["0", "1", "2"]),
    ],
)
def test_other_classes_are_refused_with_both_lists(theirs: list[str], ours: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        with_classes(model(*theirs), ours, "train.init_from old")
    assert f"[{', '.join(theirs)}] there, [{', '.join(ours)}] here" in str(refusal.value)
