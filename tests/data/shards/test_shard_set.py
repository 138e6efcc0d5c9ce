"""The shard set: reproducible, readable by others, and never mistaken for whole when it is not."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset import tariterators

from pipeline.data.images.preprocess import EXTENSIONS, encode
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.shard_set import Sample, ShardSet, key, pack, read_record, write_shard
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files


def sample(position: int, *, extension: str = "png", label: int | None = 1, side: int = 8) -> Sample:
    image = np.random.default_rng(position).integers(0, 256, (side, side, 3), dtype=np.uint8)
    format = next(name for name, ending in EXTENSIONS.items() if ending == extension)
    return Sample(key(position), encode(image, format), extension, label, {"source": f"photo.{position}.jpg"})


def write_set(directory: Path, samples: int = 9, shard_samples: int = 3, **options: object) -> ShardSet:
    records = []
    for i, first in enumerate(range(0, samples, shard_samples)):
        positions = range(first, min(first + shard_samples, samples))
        records.append(
            write_shard(str(directory), f"set-{i:06d}", [pack(sample(p, **options)) for p in positions], dict)
        )
    write_index(
        str(directory),
        records,
        size=(8, 8),
        channels=3,
        classes=["a", "b"],
        source="test",
        settings={"shard_samples": shard_samples},
        counts={},
    )
    return ShardSet.open(str(directory))


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one"), write_set(tmp_path / "two")
    assert one.sha256 == two.sha256 and one.shards == two.shards
    for name in sorted(os.listdir(tmp_path / "one")):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert write_set(tmp_path / "three", label=0).sha256 != one.sha256


def test_tars_say_nothing_of_clock_user_or_host(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    with tarfile.open(shards.tar(0)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.isreg() and member.mode == 0o444


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
@pytest.mark.parametrize("label", [0, 11, None])
def test_plain_webdataset_reads_what_was_written(tmp_path: Path, extension: str, label: int | None) -> None:
    shards = write_set(tmp_path, extension=extension, label=label)
    urls = [shards.tar(i) for i in range(len(shards.shards))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [entry["__key__"] for entry in found] == [f"{position:09d}" for position in range(9)]
    for position, entry in enumerate(found):
        written = sample(position, extension=extension)
        assert entry[extension] == written.image
        assert json.loads(entry["json"]) == written.meta
        assert entry.get("cls") == (None if label is None else str(label).encode())
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")))
    assert decoded[extension].shape == (8, 8, 3) and decoded.get("cls") == label


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
@pytest.mark.parametrize("label", [7, None])
def test_the_sidecar_leads_to_every_sample(tmp_path: Path, extension: str, label: int | None) -> None:
    shards = write_set(tmp_path, extension=extension, label=label)
    assert tuple(shards.shard_samples) == (3, 3, 3) and shards.samples == 9
    for i in range(3):
        tar = Path(shards.tar(i)).read_bytes()
        for n, row in enumerate(shards.sidecar(i)):
            written = sample(3 * i + n, extension=extension)
            whole = tar[row["offset"] : row["offset"] + row["length"]]
            assert zlib.crc32(whole) == row["crc32"]
            assert whole[row["image_offset"] :][: row["image_length"]] == written.image
            assert row["label"] == (-1 if label is None else label)
            # A range of whole samples is a tar that webdataset reads, without an end mark.
            stream = {"url": "memory", "stream": io.BytesIO(whole)}
            (entry,) = tariterators.group_by_keys(tariterators.tar_file_expander([stream]))
            assert entry["__key__"] == written.key


def test_samples_larger_than_the_writers_buffer_are_measured_rightly(tmp_path: Path) -> None:
    big = [
        Sample(key(i), bytes([i]) * size, "png", None, {}) for i, size in enumerate([1, 30_000, 511, 512, 10_240, 0])
    ]
    record = write_shard(str(tmp_path), "s-000000", map(pack, big), dict)
    tar = (tmp_path / "s-000000.tar").read_bytes()
    rows = np.load(tmp_path / "s-000000.npy")
    assert record.bytes == len(tar)
    for row, written in zip(rows, big):
        assert zlib.crc32(tar[row["offset"] : row["offset"] + row["length"]]) == row["crc32"]
        assert tar[row["offset"] + row["image_offset"] :][: row["image_length"]] == written.image


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    record = write_shard(str(tmp_path), "s-000000", [], lambda: {"rejected": ["all"]})
    assert record.samples == 0 and read_record(str(tmp_path), "s-000000") == record
    assert list(webdataset.WebDataset(str(tmp_path / "s-000000.tar"), shardshuffle=False, empty_check=False)) == []


def test_a_shard_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    def failing():
        yield pack(sample(0))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(str(tmp_path), "s-000000", failing(), dict)
    assert os.listdir(tmp_path) == []


def test_a_shard_written_anew_stays_valid_until_the_new_one_is_complete(tmp_path: Path) -> None:
    def failing():
        yield from map(pack, (sample(0), sample(1)))
        raise RuntimeError

    def refusing():
        raise ConfigError("not mine")

    write_shard(str(tmp_path), "s-000000", [pack(sample(0))], dict)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for samples, extra, error in ((failing(), dict, RuntimeError), ([pack(sample(1))], refusing, ConfigError)):
        with pytest.raises(error):
            write_shard(str(tmp_path), "s-000000", samples, extra)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_shard_made_twice_is_there_all_the_time(tmp_path: Path, monkeypatch) -> None:
    record = write_shard(str(tmp_path), "s-000000", [pack(sample(0))], dict)
    replace, looked = os.replace, []

    def looking(source, target):
        replace(source, target)
        looked.append(read_record(str(tmp_path), "s-000000"))

    monkeypatch.setattr("os.replace", looking)
    write_shard(str(tmp_path), "s-000000", [pack(sample(0))], dict)
    assert looked == [record] * 3


@pytest.mark.parametrize("published", ["s-000000.tar", "s-000000.npy"])
def test_an_old_record_never_vouches_for_new_bytes(tmp_path: Path, monkeypatch, published: str) -> None:
    write_shard(str(tmp_path), "s-000000", [pack(sample(0))], dict)
    replace = os.replace

    def killed_after(source, target):
        replace(source, target)
        if str(target).endswith(published):
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed_after)
    with pytest.raises(KeyboardInterrupt):
        write_shard(str(tmp_path), "s-000000", [pack(sample(0)), pack(sample(1))], dict)
    assert read_record(str(tmp_path), "s-000000") is None


def test_a_shard_counts_once_its_record_is_there_and_fits(tmp_path: Path) -> None:
    write_shard(str(tmp_path), "s-000000", [pack(sample(0))], lambda: {"seeds": "0-9"})
    record = read_record(str(tmp_path), "s-000000")
    assert record is not None and record.extra == {"seeds": "0-9"}
    tar, contents = tmp_path / "s-000000.tar", {path: path.read_bytes() for path in tmp_path.iterdir()}
    damages = [lambda: tar.write_bytes(tar.read_bytes()[:-512])]
    damages += [path.unlink for path in contents]
    damages += [lambda: (tmp_path / "s-000000.json").write_text("{")]
    damages += [lambda: (tmp_path / "s-000000.json").write_text("[]")]
    for damage in damages:
        damage()
        assert read_record(str(tmp_path), "s-000000") is None
        for path, data in contents.items():
            path.write_bytes(data)
    assert read_record(str(tmp_path), "s-000000") == record


def edit_index(directory: Path, **changes: object) -> None:
    path = directory / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "index.json").unlink(),
            "is an unfinished shard set (no index.json): run the same `ddpm shard`",
        ),
        (lambda d: (d / "index.json").write_text("{"), "index.json is not JSON"),
        (lambda d: (d / "index.json").write_text("[]"), "index.json is not the index of a shard set"),
        (lambda d: edit_index(d, version=3), "index.json has format 3, this program reads 1 and 2: upgrade it"),
        (lambda d: edit_index(d, samples=10), "`samples` is not the sum over the shards: damaged"),
        (lambda d: edit_index(d, size=[8]), "index.json is not the index of a shard set"),
        (lambda d: edit_index(d, channels=True), "`channels` is True, not a whole number"),
    ],
)
def test_unusable_sets_are_refused_with_the_fix(tmp_path: Path, damage, message: str) -> None:
    write_set(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError) as refused:
        ShardSet.open(str(tmp_path))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_lies_there_instead_is_named_with_the_command_to_run(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    for path in (
        "flat/1.png", "deep/cat/1.JPG", "tables/a.parquet", "run/config.yaml", "run/checkpoints/x", "photos.zip",
        "tars/1.tar", "drawn/shard_000000.json", "drawn/shard_000000.tar", "files/shard_000000.json",
        "files/000000001.png", "other/notes.txt",
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    for name, told in {
        "flat": "is a directory of images (1.png), not a shard set: run `ddpm shard {} --out SHARDSET --size PIXELS` ",
        "deep": "is a directory of images (cat/1.JPG), not a shard set: run `ddpm shard {} --out SHARDSET",
        "tables": "is a directory of archives or tables (a.parquet), not a shard set: run `ddpm shard {} --out",
        "photos.zip": "is a file, not a shard set: run `ddpm shard {} --out",
        "run": "is a run, not a shard set: draw samples with `ddpm sample {} --seeds 0-9999 --out SAMPLES` and give ",
        "tars": "holds tars without an index: run `ddpm index {} --out SHARDSET`",
        "drawn": "is an unfinished sample set (no index.json): run the same `ddpm sample` command again",
        "files": "holds samples as single files, not in tars: draw them with --format tar, or",
        "other": "is a directory, not a shard set: give the directory that `ddpm shard --out` wrote",
        "set/set-000000.tar": "is a file of a shard set: give its directory, " + str(tmp_path / "set"),
        "set/index.json": "is a file of a shard set: give its directory, ",
    }.items():
        with pytest.raises(DataError) as refused:
            ShardSet.open(str(tmp_path / name))
        assert str(refused.value).startswith(f"{tmp_path / name} {told}".replace("{}", str(tmp_path / name)))


def test_a_missing_directory_is_named() -> None:
    with pytest.raises(DataError, match="nowhere: no such directory: give the directory that `ddpm shard --out` wrote"):
        ShardSet.open("nowhere")


def test_a_tar_cut_at_any_block_or_missing_is_not_read(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    path = Path(shards.tar(1))
    data = path.read_bytes()
    for cut in range(0, len(data), 512):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=f"set-000001.tar is cut short or changed: {cut} bytes, the index says"):
            shards.open_tar(1, 0)
    path.unlink()
    with pytest.raises(DataError, match=r"set-000001.tar is missing: run the command that made the set again"):
        shards.open_tar(1, 0)


def test_a_sidecar_is_checked_before_use(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    path = tmp_path / "set-000002.npy"
    path.write_bytes((tmp_path / "set-000001.npy").read_bytes())
    with pytest.raises(DataError, match=r"set-000002.npy does not have the sha256 of the index"):
        shards.sidecar(2)
    path.unlink()
    with pytest.raises(DataError, match=r"set-000002.npy is missing"):
        shards.sidecar(2)


def test_sets_live_on_object_stores_too(tmp_path: Path) -> None:
    local = write_set(tmp_path)
    url = "memory://sets/remote"
    records = [write_shard(url, f"set-{i:06d}", [pack(sample(3 * i + n)) for n in range(3)], dict) for i in range(3)]
    write_index(url, records, size=(8, 8), channels=3, classes=None, source="", settings={}, counts={})
    remote = ShardSet.open(url)
    assert remote.sha256 == local.sha256
    assert (remote.sidecar(1) == local.sidecar(1)).all()
    data = files.read_bytes(remote.tar(1))
    for changed, message in ((data[:-9], "set-000001.tar: it has only"), (data + b"x", "set-000001.tar has more than")):
        files.write_bytes(remote.tar(1), changed)
        with pytest.raises(DataError, match=message), remote.open_tar(1, 0) as file:
            assert file.read() == data
    files.remove(remote.tar(1))
    with pytest.raises(DataError, match=r"set-000001.tar is missing"):
        remote.open_tar(1, 0)
