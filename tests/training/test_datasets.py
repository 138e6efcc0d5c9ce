"""Whether a shard set is what a run takes, and in which numbers its labels are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from pipeline.cluster.world import World
from pipeline.config import Config, DataSection
from pipeline.data.images.preprocess import encode
from pipeline.data.loading.batches import Batches, read_all
from pipeline.data.loading.order import Order
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.shard_set import Sample, ShardSet, key, pack, write_shard
from pipeline.errors import ConfigError, DataError
from pipeline.sampling.generator import load
from pipeline.train import train
from pipeline.training.datasets import agree_on_classes, check_fit, fit_classes, open_sets

RUN = ("blue", "green", "red")


def a_set(directory: Path, classes: list[str] | None, labels: list[int | None]) -> ShardSet:
    """A sample of its own grey for each label."""
    samples = [
        Sample(key(i), encode(np.full((4, 4, 1), i, np.uint8), "png"), "png", label, {})
        for i, label in enumerate(labels)
    ]
    record = write_shard(str(directory), "s-000000", map(pack, samples), dict)
    write_index(
        str(directory), [record], size=(4, 4), channels=1, classes=classes, source={}, settings={}, counts={}
    )  # fmt: skip
    return ShardSet.open(str(directory))


def labels_of(shards: ShardSet) -> list[int]:
    return read_all(shards).labels.tolist()


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (["blue", "green", "red"], [0, 1, 2], [0, 1, 2]),
        (["green", "red", "blue"], [0, 1, 2, None], [1, 2, 0, -1]),
        (["red", "blue"], [1, 1, 0], [0, 0, 2]),
        (["0", "1", "2"], [2, 0], [2, 0]),
    ],
)
def test_labels_are_read_in_the_numbers_of_the_run(
    tmp_path: Path, classes: list[str], labels: list[int | None], expected: list[int]
) -> None:
    fitted = fit_classes(a_set(tmp_path, classes, labels), RUN)
    assert labels_of(fitted) == expected
    assert fitted.classes == RUN
    images = read_all(fitted).images[:, 0, 0, 0].tolist()
    assert images == list(range(len(labels)))  # the order is that of the set


def test_batches_have_the_same_images_in_the_same_order(tmp_path: Path) -> None:
    plain = a_set(tmp_path, ["green", "red", "blue"], [0, 1, 2, 0, 1, 2])
    order = Order(7, plain.shard_samples, 6, 6, 4)
    drawn = []
    for shards in (plain, fit_classes(plain, RUN)):
        with Batches(shards, order, rank=0, world_size=1, first_sample=0, workers=0, flip=True) as batches:
            drawn.append(next(batches))
    assert drawn[0].images.equal(drawn[1].images) and drawn[0].positions.equal(drawn[1].positions)
    assert [(1, 2, 0)[label] for label in drawn[0].labels] == drawn[1].labels.tolist()


def test_an_unconditional_network_takes_a_set_as_it_is(tmp_path: Path) -> None:
    shards = a_set(tmp_path, ["cat", "dog"], [1, 0])
    assert fit_classes(shards, None) is shards
    assert agree_on_classes([shards], 0, ["blue"]) is None


@pytest.mark.parametrize(
    "classes", [["cat", "dog", "owl"], ["blue", "green", "red", "owl"], ["blue", "Green"], None, []]
)
def test_other_classes_are_refused_with_both_lists(tmp_path: Path, classes: list[str] | None) -> None:
    with pytest.raises(ConfigError) as refusal:
        fit_classes(a_set(tmp_path, classes, [None]), RUN)
    assert "blue, green, red" in str(refusal.value) and ", ".join(classes or []) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (["blue", "green", "red"], ""),
        (["green", "red", "blue"], r"in another order \(\[green, red, blue\]\)"),
        (["red", "green"], r"has no images of 1 of the run's classes \(blue\)"),
        (["0", "1", "2"], r"numbers cannot be compared with names"),
    ],
)
def test_surprises_are_reported(tmp_path: Path, classes: list[str], told: str) -> None:
    lines: list[str] = []
    fit_classes(a_set(tmp_path, classes, [0]), RUN, lines.append, lines.append)
    assert bool(lines) == bool(told)
    assert re.search(told, "\n".join(lines))


def test_classes_that_a_run_does_not_learn_are_told_once_and_missing_ones_refused(tmp_path: Path) -> None:
    shards, lines = a_set(tmp_path / "a", list(RUN), [0]), list[str]()
    assert agree_on_classes([shards], 0, None, lines.append) is agree_on_classes([shards], 0, list(RUN), lines.append)
    assert len(lines) == 1 and "3 classes, which this run does not learn" in lines[0]
    assert lines[0].endswith("model.num_classes=3 learns them")
    with pytest.raises(
        ConfigError, match=r"no classes: set model\.num_classes=0 for an unconditional model, or make the set"
    ):
        agree_on_classes([a_set(tmp_path / "b", None, [None])], 3, None)


def test_a_label_that_the_index_does_not_name_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the label 3, but the index names 3 classes"):
        read_all(fit_classes(a_set(tmp_path, list(RUN), [0, 3]), RUN))


@pytest.mark.parametrize(
    ("stored", "own", "expected"),
    [
        (None, ["blue", "green", "red"], RUN),  # a new run, or one that wrote no names
        (["red", "green", "blue"], ["blue", "green", "red"], ("red", "green", "blue")),
        (["0", "1", "2"], ["blue", "green", "red"], RUN),
        (["blue", "green", "red"], ["0", "1", "2"], RUN),
        (["blue"], ["green", "red", "blue"], ("green", "red", "blue")),  # not the names of three classes
        (["blue", "green", "red"], ["red"], RUN),
    ],
)
def test_a_run_keeps_its_names_and_takes_those_of_its_data_where_it_has_none(
    tmp_path: Path, stored: list[str] | None, own: list[str], expected: tuple[str, ...]
) -> None:
    lines: list[str] = []
    shards = a_set(tmp_path, own, [0])
    assert agree_on_classes([shards], 3, stored, warn=lines.append) == expected
    assert any("had no names" in line for line in lines) == (stored == ["0", "1", "2"])


def test_a_new_run_wants_as_many_classes_as_its_data_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 classes: set model\.num_classes=2, or model\.num_classes=0 for"):
        agree_on_classes([a_set(tmp_path, ["cat", "dog"], [0])], 3, None)


def test_the_validation_set_is_opened_only_where_it_is_used(tmp_path: Path) -> None:
    train, val = (str(a_set(tmp_path / name, None, [None] * 6).url) for name in ("train", "val"))
    data = {"shards": train, "val_shards": val, "size": 4, "channels": 1}
    for val_every, expected in ((1, [train, val]), (0, [train])):
        config = Config.model_validate({"data": data, "model": {"channel_mults": [1]}, "run": {"val_every": val_every}})
        one_rank = cast(World, SimpleNamespace(on_rank0=lambda question: question()))
        assert [shards.url for shards in open_sets(config, one_rank)] == expected


def test_images_of_another_kind_are_refused(tmp_path: Path) -> None:
    shards = a_set(tmp_path, None, [None])
    check_fit(shards, DataSection(size=4, channels=1))
    for section, message in (
        (DataSection(size=8, channels=1), r"data\.size is 8x8"),
        (DataSection(size=4), "channels is 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_fit(shards, section)


def test_a_run_continues_with_data_of_another_numbering_but_not_of_other_classes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own names stay those of its numbers, in its checkpoints and for `ddpm sample`."""
    for name, classes in (("a", ["blue", "red"]), ("b", ["red", "blue"]), ("c", ["cat", "dog"]), ("d", ["red"])):
        a_set(tmp_path / name, classes, [0, len(classes) - 1] * 4)
    network = {"base_channels": 4, "channel_mults": [1], "attention_sizes": [], "blocks_per_level": 1, "num_classes": 2}
    steps = {"global_batch": 4, "micro_batch": 4, "warmup_steps": 0, "precision": "fp32", "device": "cpu"}
    run = tmp_path / "run"

    def train_until(shards: str, until: int, **data: str) -> str:
        sections = {
            "data": {"shards": str(tmp_path / shards), "size": 4, "channels": 1, "workers": 0} | data,
            "model": network, "train": steps | {"steps": until},
            "run": {"dir": str(run), "preview_every": 0, "val_every": 1 if "val_shards" in data else 0},
        }  # fmt: skip
        train(Config.model_validate(sections), overrides=["data.shards"])
        return capfd.readouterr().err

    def stored(step: int) -> list[str]:
        return json.loads((run / f"checkpoints/step_{step:08d}/state.json").read_text())["classes"]

    with pytest.raises(ConfigError, match=r"has the classes \[cat, dog\], but the run has \[blue, red\]"):
        train_until("a", 1, val_shards=str(tmp_path / "c"))
    assert not run.exists()
    train_until("a", 1)
    assert "in another order ([red, blue]) than the run ([blue, red])" in train_until("b", 2)
    assert "has no images of 1 of the run's classes (blue)" in train_until("d", 3, val_shards=str(tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"has the classes \[cat, dog\], but the run has \[blue, red\]"):
        train_until("c", 4)
    assert [stored(step) for step in (1, 2, 3)] == [["blue", "red"]] * 3
    assert load(str(run), torch.device("cpu")).class_names == ("blue", "red")
