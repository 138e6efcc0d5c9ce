"""Tars that are there become a shard set where they lie: a webdataset made by others, or the parts of a set of ours."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.data.images.preprocess import preprocess_image
from pipeline.data.loading.batches import read_all
from pipeline.data.shards import index_tars
from pipeline.data.shards import verify as integrity
from pipeline.data.shards.index_tars import Tar, scan
from pipeline.data.shards.settings import IndexSettings
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.sources import tar_stream
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.verify import verify
from tests import warm
from tests.jobs import index, shard
from tests.launch import ENVIRONMENT, TINY, command, ddpm

Members = dict[str, bytes]


def encoded_image(number: int, side: tuple[int, int] = (8, 8), format: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def sample(number: int, **options: object) -> Members:
    """As ImageNet's webdatasets have them."""
    image = encoded_image(number, format="JPEG", **options)  # type: ignore[arg-type]
    return {"jpg": image, "cls": str(number % 3).encode(), "json": json.dumps({"label": 9}).encode()}


def tarred(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def theirs(directory: Path, tars: int = 2, samples: int = 5, **options: object) -> list[str]:
    """A webdataset as its own writer makes it, with keys that are paths."""
    directory.mkdir(parents=True, exist_ok=True)
    urls = [str(directory / f"train-{i:06d}.tar") for i in range(tars)]
    for i, url in enumerate(urls):
        with webdataset.TarWriter(url) as writer:
            for n in range(i * samples, (i + 1) * samples):
                writer.write({"__key__": f"n0{n % 3}/n0{n % 3}_{n}", **sample(n, **options)})
    return urls


def rejected(out: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return [(line["key"], line["reason"]) for line in lines]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_webdataset_of_others_is_read_where_it_lies(tmp_path: Path) -> None:
    urls = theirs(tmp_path / "wds")
    before = files(tmp_path / "wds")
    summary = index([str(tmp_path / "wds" / "train-{000000..000001}.tar")], str(tmp_path / "set"), quiet=True)
    assert (summary.inputs, summary.taken, summary.shards, summary.rejected) == (10, 10, 2, {})
    assert files(tmp_path / "wds") == before
    metadata = {f"index-{i:06d}.{ending}" for i in range(2) for ending in ("npy", "json")}
    assert set(os.listdir(tmp_path / "set")) == {"index.json", "rejected.jsonl"} | metadata
    shards = ShardSet.open(str(tmp_path / "set"))
    assert (shards.size, shards.channels, shards.classes) == ((8, 8), 3, ("0", "1", "2"))
    assert tuple(shards.shard_samples) == (5, 5)
    assert shards.counts["classes"] == {"0": 4, "1": 3, "2": 3}
    found = read_all(shards)
    plain = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert found.labels.tolist() == [int(one["cls"]) for one in plain]
    for image, one in zip(found.images.permute(0, 2, 3, 1).numpy(), plain):
        assert (image == preprocess_image(one["jpg"], size=(8, 8)).array).all()
    assert verify(str(tmp_path / "set"), quiet=True) == []


def test_images_of_several_sizes_need_a_size_and_are_cropped_to_it_when_they_are_read(tmp_path: Path) -> None:
    sides = [(8, 8), (20, 30), (20, 30), (41, 17)]
    tar = tarred(tmp_path / "a.tar", [(f"{i}.png", encoded_image(i, side)) for i, side in enumerate(sides)])
    with pytest.raises(
        DataError, match=r"several sizes, height x width \(2 of 20x30, 1 of 8x8, 1 of 41x17\): give --size"
    ):
        index([tar], str(tmp_path / "set"), quiet=True)
    assert not (tmp_path / "set" / "index.json").exists()
    index([tar], str(tmp_path / "set"), size=(6, 9), channels=1, quiet=True)
    shards = ShardSet.open(str(tmp_path / "set"))
    assert (shards.size, shards.channels) == ((6, 9), 1)
    for i, image in enumerate(read_all(shards).images.permute(0, 2, 3, 1).numpy()):
        assert (image == preprocess_image(encoded_image(i, sides[i]), size=(6, 9), channels=1).array).all()
    assert verify(str(tmp_path / "set"), quiet=True) == []


def test_an_image_that_is_stored_turned_has_the_size_it_has_upright(tmp_path: Path) -> None:
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(turned, "JPEG", exif=exif)
    tar = tarred(tmp_path / "a.tar", [("a.jpg", turned.getvalue()), ("b.png", encoded_image(0, (20, 10)))])
    index([tar], str(tmp_path / "set"), quiet=True)
    assert ShardSet.open(str(tmp_path / "set")).size == (20, 10)


GOOD = encoded_image(0)


@pytest.mark.parametrize(
    ("members", "lines"),
    [
        (
            [("a.png", GOOD), ("b.png", GOOD), ("a.cls", b"1"), ("b.cls", b"1")],
            [("a", "scattered"), ("b", "scattered")],
        ),
        ([("a.png", GOOD), ("a.png", GOOD)], [("a", "scattered")]),
        ([("a.x.png", GOOD), ("a.y.png", GOOD)], [("a", "several_pictures")]),
        ([("a.png", GOOD), ("a.jpg", GOOD)], [("a", "several_pictures")]),
        ([("a.cls", b"1")], [("a", "label_file")]),
        ([("._a.png", b"x"), ("Thumbs.db", b"x")], [("._a.png", "system_file"), ("Thumbs.db", "system_file")]),
        ([("README", b"words")], [("README", "no_picture")]),
        ([(".png", GOOD)], [(".png", "no_picture")]),
        ([("a.png", b"")], [("a", "empty")]),
        ([("a.png", b"words")], [("a", "not_an_image")]),
        ([("a.png", GOOD[:-40])], [("a", "truncated")]),
    ],
)
def test_what_cannot_be_trained_on_is_a_line_with_its_reason_and_the_rest_is_taken(
    tmp_path: Path, members: list[tuple[str, bytes]], lines: list[tuple[str, str]]
) -> None:
    tar = tarred(tmp_path / "a.tar", [("first.png", encoded_image(1)), *members, ("last.png", encoded_image(2))])
    summary = index([tar], str(tmp_path / "set"), max_bad_fraction=1, quiet=True)
    assert rejected(tmp_path / "set") == lines
    assert (summary.taken, sum(summary.rejected.values())) == (2, len(lines))
    found = read_all(ShardSet.open(str(tmp_path / "set"))).images.permute(0, 2, 3, 1).numpy()
    assert (found[0] == preprocess_image(encoded_image(1), size=(8, 8)).array).all()
    assert (found[1] == preprocess_image(encoded_image(2), size=(8, 8)).array).all()
    assert verify(str(tmp_path / "set"), quiet=True) == []


@pytest.mark.parametrize(
    ("members", "labels", "lines", "image_ext"),
    [
        ([("1.jpg", 0), ("1.cls", b"cat"), ("2.jpg", 1), ("2.cls", b"ant")], ["cat", "ant"], [], None),
        ([("1.jpg", 0), ("1.json", b'{"label": "b"}'), ("2.jpg", 1)], ["b", None], [], None),
        ([("1.jpg", 0), ("1.cls", b"99999999"), ("2.jpg", 1), ("2.cls", b"7")], ["99999999", "7"], [], None),
        ([("1.5.jpg", 0), ("1.5.cls", b"1"), ("1.6.jpg", 1), ("1.6.cls", b"0")], ["1", "0"], [], None),
        (
            [("1.5.jpg", 0), ("1.6.jpg", 1), ("1.5.cls", b"1"), ("1.6.cls", b"0"), ("2.jpg", 2)],
            [None],
            [("1.5", "several_pictures"), ("1.6", "several_pictures")],
            None,
        ),
        ([("1.jpg", 0), ("1.seg.png", 1), ("1.cls", b"0")], ["0"], [("1.seg.png", "beside_image")], None),
        ([("1.a.jpg", 0), ("1.b.jpg", 1), ("1.cls", b"0")], ["0"], [("1.a.jpg", "beside_image")], "b.jpg"),
        ([("1.jpg", 0), ("._1.jpg", b"x"), ("1.cls", b"0")], ["0"], [("._1.jpg", "system_file")], None),
    ],
)
def test_samples_and_classes_are_those_of_ddpm_shard(
    tmp_path: Path,
    members: list[tuple[str, int | bytes]],
    labels: list[str | None],
    lines: list[tuple[str, str]],
    image_ext: str | None,
) -> None:
    files = [(name, encoded_image(data, format="JPEG") if isinstance(data, int) else data) for name, data in members]
    tar = tarred(tmp_path / "a.tar", files)
    index([tar], str(tmp_path / "set"), image_ext=image_ext, max_bad_fraction=1, quiet=True)
    found = ShardSet.open(str(tmp_path / "set"))
    names = [None if label < 0 else (found.classes or ())[label] for label in read_all(found).labels.tolist()]
    assert (names, rejected(tmp_path / "set")) == (labels, lines)
    assert verify(str(tmp_path / "set"), quiet=True) == []
    if not any(reason == "several_pictures" for _, reason in lines):
        shard([tar], str(tmp_path / "shards"), size=8, image_ext=image_ext, workers=1, quiet=True)
        made = ShardSet.open(str(tmp_path / "shards"))
        assert made.classes == found.classes
        assert read_all(made).labels.tolist() == read_all(found).labels.tolist()


def test_tars_whose_classes_have_names_get_one_numbering(tmp_path: Path) -> None:
    urls = [
        tarred(
            tmp_path / f"{names[0]}.tar",
            [(f"{n}.{e}", d) for n in names for e, d in (("png", GOOD), ("cls", n.encode()))],
        )
        for names in (("dog", "ant"), ("bee", "dog"))
    ]
    out = tmp_path / "set"
    for given, classes, labels in (
        (urls[:1], ("ant", "dog"), [1, 0]),
        (urls, ("ant", "bee", "dog"), [2, 0, 1, 2]),
        (urls, ("ant", "bee", "dog"), [2, 0, 1, 2]),
    ):
        index(given, str(out), quiet=True)
        found = ShardSet.open(str(out))
        assert (found.classes, read_all(found).labels.tolist()) == (classes, labels)
        assert verify(str(out), quiet=True) == []
    assert index(urls, str(out), quiet=True).shards_made == 0
    numbers = tarred(tmp_path / "n.tar", [("1.png", GOOD), ("1.cls", b"1")])
    with pytest.raises(DataError, match=r"1 in tar .*n.tar is among names such as 'ant'.*--labels none"):
        index([*urls, numbers], str(out), quiet=True)


def test_a_class_that_cannot_be_read_stops_the_job_with_the_fix(tmp_path: Path) -> None:
    tar = tarred(tmp_path / "a.tar", [("1.png", GOOD), ("1.json", b'{"label": [1, 2]}')])
    told = r"a.tar: 1.json: 'label' \[1, 2\] is not one class: .*--labels none"
    with pytest.raises(DataError, match=told):
        index([tar], str(tmp_path / "set"), quiet=True)
    with pytest.raises(DataError, match=told):
        shard([tar], str(tmp_path / "shards"), size=8, quiet=True)


def test_links_and_sparse_members_have_a_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.REGTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "a.png", len(GOOD) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(GOOD))
    index([str(tmp_path / "a.tar")], str(tmp_path / "set"), max_bad_fraction=1, quiet=True)
    assert rejected(tmp_path / "set") == [("b", "unreadable"), ("c", "unreadable")]


def test_a_set_of_an_older_version_is_read_again(tmp_path: Path) -> None:
    (url,) = theirs(tmp_path / "wds", tars=1)
    out = tmp_path / "set"
    index([url], str(out), quiet=True)
    now = files(out)
    for name in ("index.json", "index-000000.json"):
        told = json.loads((out / name).read_text())
        del told["settings"]["keys"]
        (out / name).write_text(json.dumps(told))
    assert index([url], str(out), quiet=True).shards_made == 1
    assert files(out) == now


def test_a_sample_too_large_to_hold_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is that of images; here it is lowered, which a worker process would not know of."""
    for module in (index_tars, tar_stream):
        monkeypatch.setattr(module, "MAX_BYTES", 3_000_000)
    members = [("a.png", GOOD), ("a.mp4", bytes(100_000_000)), ("a.cls", b"0"), ("b.png", GOOD), ("b.cls", b"1")]
    tar = tarred(tmp_path / "a.tar", members)
    tracemalloc.start()
    found = scan(tar, IndexSettings(), lambda: None)
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()
    assert [getattr(one, "reason", "") for one in found.samples.values()] == ["too_many_bytes", ""]
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert found.rows["offset"][0] == tar.getmember("b.png").offset
    assert found.bytes == (tmp_path / "a.tar").stat().st_size


@pytest.mark.parametrize(
    ("told", "label"),
    [
        ({"cls": b"2"}, 2),
        ({"cls": b" 2\n", "json": b"5"}, 2),
        ({"cls": b"-1"}, -1),
        ({"json": b"5"}, 5),
        ({"json": b'{"label": 5, "x": 1}'}, 5),
        ({"json": b'{"caption": "a cat"}'}, -1),
        ({"json": b'{"label": null}'}, -1),
        ({"json": b"not json"}, -1),
        ({"json": b"[" * 100_000}, -1),
        ({"txt": b"7"}, -1),
        ({}, -1),
    ],
)
def test_the_class_is_the_number_in_cls_else_in_json(tmp_path: Path, told: Members, label: int) -> None:
    members = [("a.png", GOOD), *((f"a.{name}", data) for name, data in told.items())]
    for labels, expected in (("auto", label), ("none", -1)):
        out = tmp_path / labels
        index([tarred(tmp_path / "a.tar", members)], str(out), labels=labels, quiet=True)  # type: ignore[arg-type]
        shards = ShardSet.open(str(out))
        assert read_all(shards).labels.tolist() == [expected]
        assert shards.classes == (None if expected < 0 else tuple(map(str, range(expected + 1))))
        assert verify(str(out), quiet=True) == []


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_any_writer_are_read_as_webdataset_reads_them(tmp_path: Path, format: int) -> None:
    long = "deep/" * (12 if format == tarfile.USTAR_FORMAT else 60)
    names = ["./a/b.c.jpg", "a.b/c.jpg", f"{long}näme.JPG", "__meta__/x.jpg", "x y/#1.jpg", "0001.Jpeg"]
    tar = tarred(tmp_path / "a.tar", [(name, encoded_image(i, format="JPEG")) for i, name in enumerate(names)], format)
    with tarfile.open(tar, "a", format=format) as more:
        directory, link = tarfile.TarInfo("folder.jpg"), tarfile.TarInfo("link.jpg")
        directory.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        more.addfile(directory)
        more.addfile(link)
    index([tar], str(tmp_path / "set"), max_bad_fraction=1, quiet=True)
    assert rejected(tmp_path / "set") == [("link", "unreadable")]
    plain = list(webdataset.WebDataset(tar, shardshuffle=False))
    found = read_all(ShardSet.open(str(tmp_path / "set"))).images.permute(0, 2, 3, 1).numpy()
    assert len(found) == len(plain) == 5
    for image, one in zip(found, plain):
        data = next(value for name, value in one.items() if name.endswith(("jpg", "jpeg")))
        assert (image == preprocess_image(data, size=(8, 8)).array).all()
    assert verify(str(tmp_path / "set"), quiet=True) == []


def test_a_tar_that_is_cut_anywhere_or_has_a_damaged_header_is_refused_by_name(tmp_path: Path) -> None:
    (url,) = theirs(tmp_path, tars=1, samples=3)
    path, settings = Path(url), IndexSettings()
    data = path.read_bytes()
    with tarfile.open(url) as tar:
        headers = [member.offset for member in tar]
        end = tar.offset
    for cut in range(0, end + 1, 512):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"train-000000.tar is not a valid tar") as refused:
            scan(url, settings, lambda: None)
        assert "\n" not in str(refused.value)
    for header in headers:
        for byte in (*range(0, 100, 9), 124, 148, 156, 257, 300, 345):
            damaged = bytearray(data)
            damaged[header + byte] ^= 0x11
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"train-000000.tar is not a valid tar"):
                scan(url, settings, lambda: None)
        path.write_bytes(data[:header] + bytes(512) + data[header + 512 :])
        with pytest.raises(DataError, match=r"train-000000.tar is not a valid tar"):
            scan(url, settings, lambda: None)


@pytest.mark.parametrize(
    "damage", [lambda data: data + b"x", lambda data: data + data, lambda data: b"\x1f\x8b" + data]
)
def test_what_is_more_or_other_than_a_tar_is_refused_by_name(tmp_path: Path, damage) -> None:
    urls = theirs(tmp_path / "wds")
    Path(urls[1]).write_bytes(damage(Path(urls[1]).read_bytes()))
    refused = ddpm("index", *urls, "--out", tmp_path / "set", "--quiet")
    assert refused.returncode == 3
    assert refused.stderr.count("\n") == 1 and f"{urls[1]} is not a valid tar" in refused.stderr


def test_what_is_there_is_not_read_again_and_what_has_changed_is(tmp_path: Path) -> None:
    urls, out = theirs(tmp_path / "wds", tars=3), tmp_path / "set"
    assert index(urls, str(out), quiet=True).shards_made == 3
    before = files(out)
    assert index(urls, str(out), quiet=True).shards_made == 0
    assert files(out) == before
    shutil.copyfile(urls[0], urls[1])
    os.utime(urls[1], ns=(1, 1))
    assert index(urls, str(out), quiet=True).shards_made == 1
    shards = ShardSet.open(str(out))
    assert shards.shards[0].sha256 == shards.shards[1].sha256 != shards.shards[2].sha256
    (out / "index-000002.npy").write_bytes(b"damaged")
    assert index(urls, str(out), quiet=True).shards_made == 1
    assert index(urls[:2], str(out), quiet=True).shards == 2
    assert "index-000002.json" not in os.listdir(out)
    assert verify(str(out), quiet=True) == []


def test_a_job_that_is_stopped_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = theirs(tmp_path / "wds", tars=3)
    index(urls, str(tmp_path / "whole"), quiet=True)
    with monkeypatch.context() as patch:
        patch.setenv("DDPM_DEADLINE", "1")
        with pytest.raises(Stopped, match="stopped by the deadline: the same command continues from there"):
            index(urls, str(tmp_path / "set"), quiet=True)
    assert not (tmp_path / "set" / "index.json").exists()
    for workers in (1, 3):
        index(urls, str(tmp_path / "set"), workers=workers, quiet=True)
        assert files(tmp_path / "set") == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_ends_in_75_within_a_sample(tmp_path: Path, number: signal.Signals) -> None:
    large = tarred(tmp_path / "a.tar", [(f"{i}.png", GOOD) for i in range(20_000)])
    asked = command("index", large, "--out", tmp_path / "set", "--quiet")
    process = warm.Popen(asked, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not (tmp_path / "set").exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert errors == f"ddpm: stopped by {number.name}: the same command continues from there\n"
    assert os.listdir(tmp_path / "set") == []


def test_a_tar_that_kills_its_readers_is_named() -> None:
    with pytest.raises(DataError, match=r"x.tar: two processes died at it \(SIGSEGV\)"):
        index_tars.on_worker_death(Tar("x.tar", "x.tar", "index-000000", 0, 0), -signal.SIGSEGV)
    assert "shard 3: two processes died at it (exit code 9)" in integrity.on_worker_death(3, 9)[0]


def test_a_set_moves_with_its_tars_or_without_them_if_they_lie_elsewhere(tmp_path: Path) -> None:
    near, far = tmp_path / "a" / "near", tmp_path / "a" / "b" / "far"
    urls = theirs(tmp_path / "a" / "wds")
    index(urls, str(near), quiet=True)
    index(urls, str(far), quiet=True)
    index([str(tmp_path / "a" / "wds")], str(tmp_path / "a" / "wds"), quiet=True)
    assert ShardSet.open(str(near)).shards[0].name == "../wds/train-000000.tar"
    assert [record.name for record in ShardSet.open(str(far)).shards] == urls
    assert ShardSet.open(urls[0].rpartition("/")[0]).shards[0].name == "train-000000.tar"
    far.rename(tmp_path / "moved")
    assert verify(str(tmp_path / "moved"), quiet=True) == []
    (tmp_path / "a").rename(tmp_path / "z")
    for moved in (tmp_path / "z" / "near", tmp_path / "z" / "wds"):
        assert verify(str(moved), quiet=True) == []
        assert len(read_all(ShardSet.open(str(moved))).labels) == 10


def test_a_place_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    urls = theirs(tmp_path / "wds")
    for name, holds in (
        ("index.json", "holds an index.json of something else"),
        ("rejected.jsonl", "holds a rejected"),
    ):
        (tmp_path / name).write_text('{"__kind__": "wids"}')
        with pytest.raises(ConfigError, match=holds):
            index(urls, str(tmp_path), quiet=True)
        (tmp_path / name).unlink()
    index(urls, str(tmp_path / "set"), quiet=True)
    with pytest.raises(
        ConfigError, match=r"was made from other sources or settings \(channels was 3, now 1\): choose another --out"
    ):
        index(urls, str(tmp_path / "set"), channels=1, quiet=True)
    with pytest.raises(ConfigError, match="is a file: give --out a directory"):
        index(urls, urls[0], quiet=True)
    with pytest.raises(ConfigError, match=r"train-000000.tar is given twice"):
        index([*urls, urls[0]], str(tmp_path / "set"), quiet=True)
    for missing in ("none.tar", "none-*.tar", "none-{0..1}.tar"):
        with pytest.raises(ConfigError, match="none"):
            index([str(tmp_path / missing)], str(tmp_path / "new"), quiet=True)
    for wrong in ({"channels": 2}, {"size": (0, 8)}, {"size": (8, 20_000)}):
        with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}"):
            index(urls, str(tmp_path / "new"), quiet=True, **wrong)
    with pytest.raises(ConfigError, match=r"contains no .tar"):
        index([str(tmp_path / "set")], str(tmp_path / "new"), quiet=True)


def test_overwriting_with_another_job_never_touches_the_tars_of_others(tmp_path: Path) -> None:
    urls = theirs(tmp_path / "wds")
    index(urls, str(tmp_path / "wds"), quiet=True)
    before = files(tmp_path / "wds")
    with pytest.raises(ConfigError, match="holds something else"):
        shard([str(zipped(tmp_path))], str(tmp_path / "wds"), size=8, overwrite=True, quiet=True)
    assert files(tmp_path / "wds") == before


def test_too_many_bad_samples_end_in_3_with_the_set_written(tmp_path: Path) -> None:
    tar = tarred(tmp_path / "a.tar", [("a.png", GOOD), ("b.png", b"bad")])
    refused = ddpm("index", tar, "--out", tmp_path / "set", "--quiet")
    assert refused.returncode == 3 and "1 of 2 inputs were rejected (1 not_an_image)" in refused.stderr
    assert ShardSet.open(str(tmp_path / "set")).samples == 1
    bad = tarred(tmp_path / "b.tar", [("b.png", b"bad")])
    with pytest.raises(DataError, match=r"not one of 1 inputs is a readable image \(1 not_an_image\)"):
        index([bad], str(tmp_path / "none"), quiet=True)


def test_the_command_ends_with_a_summary_and_its_set_trains(tmp_path: Path) -> None:
    theirs(tmp_path / "wds", tars=2, samples=20, mode="L")
    out = tmp_path / "set"
    done = ddpm("index", tmp_path / "wds", "--out", out, "--channels", 1, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == {"0": 14, "1": 13, "2": 13}
    settings = (f"data.shards={out}", f"run.dir={tmp_path / 'run'}", "train.steps=3", "model.num_classes=3")
    trained = ddpm("train", *TINY, *settings)
    assert trained.returncode == 0, trained.stderr


# --- parts ---


def zipped(directory: Path, count: int = 23) -> Path:
    path = directory / "source.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(count):
            archive.writestr(
                zipfile.ZipInfo(f"{'cat' if n % 2 else 'dog'}/{n:03d}.png"), encoded_image(n) if n % 5 else b"bad"
            )
    return path


def parts(source: Path, outs: list[Path], **options: object) -> None:
    for number, out in enumerate(outs):
        settings = {"size": 8, "shard_samples": 4, "workers": 1, "max_bad_fraction": 1, **options}
        shard([str(source)], str(out), part=f"{number}/{len(outs)}", quiet=True, **settings)  # type: ignore[arg-type]


def test_parts_in_one_place_are_joined_to_the_bytes_of_one_job(tmp_path: Path) -> None:
    source = zipped(tmp_path)
    parts(source, [tmp_path / "whole" / "set"])
    parts(source, [tmp_path / "parts" / "set"] * 3)
    for name in ("index.json", "rejected.jsonl"):
        (tmp_path / "parts" / "set" / name).unlink()
    out = tmp_path / "parts" / "set"
    summary = index([str(out)], str(out), max_bad_fraction=1, quiet=True)
    assert (summary.inputs, summary.taken) == (23, 18)
    assert f"{summary.shards} of {summary.shards} shards joined in " in summary.as_text()
    assert files(out) == files(tmp_path / "whole" / "set")


def test_parts_in_places_of_their_own_are_joined_to_one_set(tmp_path: Path) -> None:
    source, places = zipped(tmp_path), [tmp_path / f"p{i}" for i in range(3)]
    parts(source, [tmp_path / "whole"])
    parts(source, places)
    index([str(place) for place in reversed(places)], str(tmp_path / "set"), max_bad_fraction=1, quiet=True)
    joined, whole = (ShardSet.open(str(tmp_path / name)) for name in ("set", "whole"))
    for name in ("samples", "size", "channels", "classes", "sha256", "source", "settings", "counts"):
        assert getattr(joined, name) == getattr(whole, name), name
    for one, other in zip(joined.shards, whole.shards):
        assert {**one.entry(), "name": ""} == {**other.entry(), "name": ""}
    assert (tmp_path / "set" / "rejected.jsonl").read_bytes() == (tmp_path / "whole" / "rejected.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path / "set")) == ["index.json", "rejected.jsonl"]
    assert (read_all(joined).images == read_all(whole).images).all()
    assert verify(str(tmp_path / "set"), quiet=True) == []


def test_parts_that_are_not_of_one_set_or_not_all_are_refused_by_name(tmp_path: Path) -> None:
    source, places = zipped(tmp_path), [tmp_path / f"p{i}" for i in range(3)]
    parts(source, places)
    parts(source, [tmp_path / "grey"] * 3, channels=1)
    (tmp_path / "more").mkdir()
    parts(zipped(tmp_path / "more", 24), [tmp_path / "other"] * 3)
    tars = [str(path) for place in places for path in sorted(place.glob("*.tar"))]

    def refused(urls: list[str]) -> str:
        with pytest.raises(DataError) as error:
            index(urls, str(tmp_path / "set"), quiet=True)
        assert "\n" not in str(error.value) and not (tmp_path / "set" / "index.json").exists()
        return str(error.value)

    assert "shards 000001, 000003 of 6 are missing" in refused([tar for n, tar in enumerate(tars) if n not in (1, 3)])
    copy = shutil.copytree(places[0], tmp_path / "copy")
    twins = [tars[0], str(copy / Path(tars[0]).name)]
    assert f"{twins[0]} and {twins[1]} are the same shard" in refused([*twins, *tars[1:]])
    grey = sorted(map(str, (tmp_path / "grey").glob("*.tar")))
    assert f"{grey[5]} is of another set than {tars[0]} (channels 3 there, 1 here)" in refused([*tars[:5], grey[5]])
    other = sorted(map(str, (tmp_path / "other").glob("*.tar")))
    assert f"{other[5]} is of another set than {tars[0]} (made of other inputs)" in refused([*tars[:5], other[5]])
    foreign = theirs(tmp_path / "wds")[0]
    assert f"{foreign} is not a complete shard of `ddpm shard`" in refused([*tars, foreign])
    Path(tars[2]).write_bytes(Path(tars[2]).read_bytes()[:-512])
    assert f"{tars[2]} is not a complete shard of `ddpm shard`" in refused(tars)
    with pytest.raises(ConfigError, match="is a shard of `ddpm shard`: leave out --size, --channels and --labels"):
        index(tars, str(tmp_path / "set"), size=(4, 4), quiet=True)
