"""The set on its way: which shards are missing, what may be in the way, and what a shard holds."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.data.images.preprocess import PREPROCESSING, decode
from pipeline.data.shards import build
from pipeline.data.shards.build import ShardSetBuilder, Task
from pipeline.data.shards.image_task import ImageTask
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.settings import ShardSettings
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.shards.verify import verify
from pipeline.data.sources.listing import Listing, Reader, list_inputs
from pipeline.errors import ConfigError


def settings(**changes: Any) -> ShardSettings:
    return ShardSettings(**{"size": (8, 8), "shard_samples": 4, **changes})


def write_images(directory: Path, names: list[str], side: tuple[int, int] = (10, 12)) -> str:
    for i, name in enumerate(names):
        image = np.random.default_rng(i).integers(0, 256, (*side, 3), dtype=np.uint8)
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(image).save(path, "PNG")
    return str(directory)


def write(images: ShardSetBuilder, tasks: list[Task], listing: Listing, **changes: object) -> list[ShardRecord]:
    image_task = ImageTask(Reader(listing.sources), settings(**changes))
    made = itertools.chain.from_iterable(map(image_task.make, images.chunks(tasks, 2)))
    return images.write(tasks, made)


def make(out: Path, source: str, limit: int | None = None, **changes: object) -> ShardSetBuilder:
    """The whole job in this process; with a limit, so many shards of it."""
    listing = list_inputs([source])
    images = ShardSetBuilder(str(out), settings(**changes), [source], listing)
    tasks = images.missing(images.tasks)[:limit]
    assert len(write(images, tasks, listing, **changes)) == len(tasks)
    images.refresh()
    if not images.missing(images.tasks):
        images.publish()
    return images


def rejected(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def samples(out: Path) -> list[dict[str, object]]:
    tars = sorted(str(path) for path in out.glob("*.tar"))
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))


NAMES = ["a/photo.1.jpg", "a/photo.2.jpg", "a/.hidden", "b/x#y z.jpg", "b/" + "n" * 200, "c/1", "c/2", "c/3", "top.png"]


def test_every_input_is_a_sample_or_a_rejected_line(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", NAMES)
    for name, data in [("a/notes.txt", b"text"), ("b/empty.jpg", b""), ("zzz", b"\0\1\2\3")]:
        (tmp_path / "in" / name).write_bytes(data)
    images = make(tmp_path / "set", source)
    taken, lines = samples(tmp_path / "set"), rejected(tmp_path / "set")
    names = sorted([*NAMES, "a/notes.txt", "b/empty.jpg", "zzz"])
    found = {int(str(entry["__key__"])): json.loads(entry["json"])["source"] for entry in taken}
    found |= {int(line["key"]): line["source"] for line in lines}
    assert found == dict(enumerate(names))  # the key is the position in the sorted list, so dots do not collide
    assert {line["source"]: line["reason"] for line in lines} == {
        "a/notes.txt": "not_an_image", "b/empty.jpg": "empty", "zzz": "not_an_image",
    }  # fmt: skip
    counts = images.counts()
    assert (counts["inputs"], counts["taken"]) == (12, 9)
    assert counts["rejected"] == {"empty": 1, "not_an_image": 2}
    assert counts["classes"] == {"a": 3, "b": 2, "c": 3}
    assert verify(str(tmp_path / "set")) == []


def test_an_input_lost_from_the_counts_is_a_finding(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", NAMES)
    (tmp_path / "in" / "a" / "bad").write_bytes(b"bad")
    make(tmp_path / "set", source)
    path = tmp_path / "set" / "rejected.jsonl"
    line = path.read_text()
    for text in ("", line.replace("not_an_image", "empty"), line * 2):
        path.write_text(text)
        assert verify(str(tmp_path / "set")) == ["rejected.jsonl: missing, or not what the shards' records say"]
    path.write_text(line)
    record = tmp_path / "set" / "set-000000.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"rejected": []}))
    path.write_text("")
    assert verify(str(tmp_path / "set")) == [
        "set-000000.json: differs from the index in what its counts add up to (of another shard, or changed)",
        "index.json: 1 of 10 inputs are neither a sample nor in rejected.jsonl",
    ]


def test_the_index_says_what_the_set_is(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", NAMES)
    make(tmp_path / "set", source, size=(6, 10), channels=1)
    shards = ShardSet.open(str(tmp_path / "set"))
    assert (shards.size, shards.channels, shards.classes, shards.samples) == ((6, 10), 1, ("a", "b", "c"), 9)
    assert [record.name for record in shards.shards] == [f"set-{i:06d}.tar" for i in range(3)]
    assert shards.settings["crop"] == "center" and shards.counts["taken"] == 9
    for entry in samples(tmp_path / "set"):
        assert decode(entry["png"], 1).shape == (6, 10, 1)
        assert json.loads(entry["json"])["original_size"] == [10, 12]
    labels = [entry.get("cls") for entry in samples(tmp_path / "set")]
    assert labels == [b"0"] * 3 + [b"1"] * 2 + [b"2"] * 3 + [None]


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3])
def test_a_set_continues_where_it_stopped(tmp_path: Path, stopped_after: int) -> None:
    source = write_images(tmp_path / "in", NAMES)
    make(tmp_path / "a" / "set", source)
    make(tmp_path / "b" / "set", source, limit=stopped_after)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "b" / "set").glob("*.tar")}
    (tmp_path / "b" / "set").mkdir(parents=True, exist_ok=True)
    (tmp_path / "b" / "set" / ".set-000002.tar.0123abcd.tmp").write_bytes(b"left by a kill")
    images = ShardSetBuilder(str(tmp_path / "b" / "set"), settings(), [source], list_inputs([source]))
    assert len(images.missing(images.tasks)) == 3 - stopped_after
    make(tmp_path / "b" / "set", source)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for path in (tmp_path / "a" / "set").iterdir():
        assert (tmp_path / "b" / "set" / path.name).read_bytes() == path.read_bytes()
    extra = set(os.listdir(tmp_path / "b" / "set")) - set(os.listdir(tmp_path / "a" / "set"))
    assert not extra or stopped_after == 3  # a finished set is not touched


def test_a_shard_whose_inputs_end_early_is_not_there(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", NAMES)
    listing = list_inputs([source])
    image_task = ImageTask(Reader(listing.sources), settings())
    for inputs in range(9):
        images = ShardSetBuilder(str(tmp_path / "set"), settings(), [source], listing)
        made = itertools.chain.from_iterable(map(image_task.make, images.chunks(images.tasks, 2)))
        records = images.write(images.tasks, itertools.islice(made, inputs))
        assert [record.stem for record in records] == [task.stem for task in images.tasks[: inputs // 4]]
        assert len(list((tmp_path / "set").glob("set-*"))) == 3 * (inputs // 4)
        build.clear(str(tmp_path / "set"))


def test_a_finished_set_is_unchanged_and_a_damaged_one_is_repaired(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", NAMES)
    out = tmp_path / "set"
    make(out, source)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    make(out, source)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    for name in ("set-000001.tar", "set-000001.npy", "set-000002.json", "index.json", "rejected.jsonl"):
        (out / name).unlink()
        make(out, source)
        assert {path: path.read_bytes() for path in out.iterdir()} == {path: data for path, (data, _) in before.items()}


def test_crops_are_keyed_by_position_alone(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", [f"{i}" for i in range(20)], side=(8, 40))
    boxes = {}
    for shard_samples in (3, 20):
        out = tmp_path / f"set{shard_samples}"
        make(out, source, crop="random", shard_samples=shard_samples)
        boxes[shard_samples] = [json.loads(entry["json"])["box"] for entry in samples(out)]
    assert boxes[3] == boxes[20]
    assert len({box[0] for box in boxes[3]}) > 8 and all(0 <= box[0] <= 32 for box in boxes[3])


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"size": (16, 16)}, "size was [8, 8], now [16, 16]"),
        ({"crop": "random"}, "crop was center, now random"),
        ({"shard_samples": 5}, "shard_samples was 4, now 5"),
        ({"format": "webp", "min_size": 2}, "format was png, now webp; min_size was 1, now 2"),
        ({"preprocessing": 99}, f"preprocessing was {PREPROCESSING}, now 99"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_the_difference(
    tmp_path: Path, changes: dict[str, object], difference: str, finished: bool
) -> None:
    source = write_images(tmp_path / "in", NAMES)
    make(tmp_path / "set", source, limit=None if finished else 1)
    with pytest.raises(ConfigError) as refused:
        make(tmp_path / "set", source, **changes)
    remedy = "choose another --out, or give --overwrite"
    assert str(refused.value) == f"{tmp_path}/set was made from other sources or settings ({difference}): {remedy}"
    build.clear(str(tmp_path / "set"))
    make(tmp_path / "set", source, **changes)
    assert verify(str(tmp_path / "set")) == []


def test_a_changed_source_is_refused_with_the_difference(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", NAMES)
    make(tmp_path / "set", source, limit=1)
    os.utime(tmp_path / "in" / "top.png", (1, 1))
    with pytest.raises(ConfigError, match=r"\(files of the source have other names, times or labels\): choose"):
        make(tmp_path / "set", source)
    (tmp_path / "in" / "new.png").write_bytes(b"1")
    with pytest.raises(ConfigError, match=r"\(the source had 9 files, now 10\): choose another --out"):
        make(tmp_path / "set", source)


def test_a_place_that_holds_something_else_is_refused_and_never_cleared(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", NAMES)
    out = tmp_path / "mine"
    for name in ("thesis.tex", "cat-000001.json", "index.json"):
        out.mkdir()
        (out / name).write_text("{}")
        with pytest.raises(
            ConfigError, match=rf"mine exists and holds something else \({name}\): choose another --out"
        ):
            make(out, source)
        build.clear(str(out))
        assert os.listdir(out) == [name]
        (out / name).unlink()
        out.rmdir()
    out.write_text("a file")
    with pytest.raises(ConfigError, match="mine is a file: give --out a directory"):
        make(out, source)


def test_clearing_removes_the_set_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "set", write_images(tmp_path / "in", NAMES))
    (tmp_path / "set" / "notes.md").write_text("mine")
    build.clear(str(tmp_path / "set"))
    assert os.listdir(tmp_path / "set") == ["notes.md"]
    build.clear(str(tmp_path / "nowhere"))


def test_a_set_inside_its_source_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "in", NAMES)
    for out in ("in/set", "in"):
        with pytest.raises(ConfigError, match="lies inside the source"):
            build.refuse_nesting([str(tmp_path / "in")], str(tmp_path / out))
    build.refuse_nesting([str(tmp_path / "in")], str(tmp_path / "inside"))
    for source in (f"file://{tmp_path}/in", f"{tmp_path}/in/**/*.png"):
        with pytest.raises(ConfigError, match="lies inside the source"):
            build.refuse_nesting([source], str(tmp_path / "in" / "set"))
    build.refuse_nesting([f"{tmp_path}/in/*.tar"], str(tmp_path / "in" / "set"))


@pytest.mark.parametrize(
    ("directory", "prefix"), [("cats-64_v2", "cats-64_v2"), ("Cats", "shard"), ("mit leer", "shard")]
)
def test_shards_are_named_after_the_directory(tmp_path: Path, directory: str, prefix: str) -> None:
    make(tmp_path / directory, write_images(tmp_path / "in", NAMES), limit=1)
    (tmp_path / directory).rename(tmp_path / "renamed")
    make(tmp_path / "renamed", str(tmp_path / "in"))
    assert sorted(path.name for path in (tmp_path / "renamed").glob("*.tar")) == [
        f"{prefix}-{i:06d}.tar" for i in range(3)
    ]


def test_names_that_are_not_utf8_survive_as_escaped_json(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", ["a/1"])
    path = os.path.join(os.fsencode(tmp_path), b"in", b"caf\xe9", b"\xff.png")
    os.makedirs(os.path.dirname(path))
    os.link(tmp_path / "in" / "a" / "1", path)
    with open(os.path.join(os.path.dirname(path), b"\xfe"), "wb") as file:
        file.write(b"bad")
    make(tmp_path / "set", source)
    assert verify(str(tmp_path / "set")) == []
    assert [os.fsencode(name) for name in ShardSet.open(str(tmp_path / "set")).classes or ()] == [b"a", b"caf\xe9"]
    assert os.fsencode(json.loads(samples(tmp_path / "set")[1]["json"])["source"]) == b"caf\xe9/\xff.png"
    assert os.fsencode(rejected(tmp_path / "set")[0]["source"]) == b"caf\xe9/\xfe"


def test_members_of_hostile_tars_become_digits(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name in ("../../etc/x.png", "/abs.png", "a\nb.png"):
            info = tarfile.TarInfo(name)
            info.size = len(image.getvalue())
            tar.addfile(info, io.BytesIO(image.getvalue()))
    make(tmp_path / "set", str(tmp_path / "in.tar"))
    assert [entry["__key__"] for entry in samples(tmp_path / "set")] == ["000000000", "000000001", "000000002"]
    assert sorted(os.listdir(tmp_path)) == ["in.tar", "set"]
