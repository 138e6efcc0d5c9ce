"""Whatever is done to a set, of ours or indexed, is found and named, and never ends in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.shards.verify import check, verify
from tests.data.shards.test_sample_set import draw, finish, sample_set
from tests.jobs import index
from tests.test_index import parts, tarred, theirs, zipped

Path_ = tuple[str | int, ...]


def ours(directory: Path) -> Path:
    parts(zipped(directory, 11), [directory / "set"])
    return directory / "set"


def indexed(directory: Path) -> Path:
    theirs(directory / "wds", tars=2, samples=3)
    tarred(directory / "wds" / "bad.tar", [("a.png", b"bad"), ("b.txt", b"words")])
    index([str(directory / "wds")], str(directory / "set"), max_bad_fraction=1, quiet=True)
    return directory / "set"


def samples(directory: Path) -> Path:
    drawn = sample_set(str(directory / "set"), size=3, shard_samples=3)
    draw(drawn, "0-5")
    assert finish(drawn, "0-5")
    return directory / "set"


SETS = {"ours": ours, "indexed": indexed, "samples": samples}


@pytest.fixture(scope="module", params=SETS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = SETS[request.param](tmp_path_factory.mktemp(request.param))
    assert verify(str(directory)) == []
    return directory


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy to do harm to, beside its tars."""
    shutil.copytree(sound.parent, tmp_path / "copy")
    return tmp_path / "copy" / "set"


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Where the single values are in a JSON document, and empty lists and objects."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield path
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def changed(document: Any, path: Path_) -> Iterator[Any]:
    """The document with one value another, of another kind, or gone."""
    place = document
    for key in path[:-1]:
        place = place[key]
    was = place[path[-1]]
    others: list[Any] = [was + 1 if isinstance(was, int | float) else f"{was}x", [5], {"a": {}}, "x", -1, 1]
    for value in others:
        if value != was:
            place[path[-1]] = value
            yield document
    if isinstance(place, dict):
        del place[path[-1]]
        yield document
        place[path[-1]] = was


TELLS_NOTHING = {"stamp", "environment", "seeds", "count"}
"""What a record says beside what is checked: when to read a tar again; how samples came about, for another check."""


@pytest.mark.parametrize("file", ["index", "record"])
def test_every_field_of_index_and_records_is_checked(damaged: Path, file: str) -> None:
    name = "index.json" if file == "index" else sorted(path.name for path in damaged.glob("*0000.json"))[0]
    text = (damaged / name).read_text()
    overlooked = []
    for path in leaves(json.loads(text)):
        if path[0] in TELLS_NOTHING or (file == "record" and path[:2] == ("source", "urls")):
            continue
        for value in changed(json.loads(text), path):
            (damaged / name).write_text(json.dumps(value))
            findings = verify(str(damaged))
            if not findings:
                overlooked.append((path, value.get(path[0], "gone")))
    assert overlooked == []


def test_a_flipped_byte_in_any_json_or_sidecar_is_found_or_changes_no_value(damaged: Path) -> None:
    for path in (*sorted(damaged.glob("*.json"))[:2], *sorted(damaged.glob("*.npy"))[:1], damaged / "rejected.jsonl"):
        data = path.read_bytes() if path.exists() else b""
        for position in range(0, len(data), 1 + len(data) // 150):
            harmed = bytearray(data)
            harmed[position] ^= 0x14
            path.write_bytes(harmed)
            if not verify(str(damaged)):
                assert path.suffix == ".json", (path.name, position)
                assert _said(harmed, data) == _said(data, data), (path.name, position)
        path.write_bytes(data) if data else None


def _said(data: bytes | bytearray, sound: bytes) -> Any:
    document = json.loads(data)
    if "shards" not in document and isinstance(document.get("source"), dict):
        document["source"].pop("urls", None)
    return {key: document.get(key) for key in json.loads(sound).keys() - TELLS_NOTHING}


def test_json_and_sidecars_that_are_no_files_are_found(damaged: Path) -> None:
    for path in sorted(damaged.iterdir()):
        if path.suffix == ".tar":
            continue
        data = path.read_bytes()
        path.unlink()
        path.mkdir()
        assert verify(str(damaged)), path.name
        path.rmdir()
        path.symlink_to(path)
        assert verify(str(damaged)), path.name
        path.unlink()
        path.write_bytes(b"")
        if data:
            assert verify(str(damaged)), path.name
        path.write_bytes(data)
    assert verify(str(damaged)) == []


def test_a_changed_byte_anywhere_in_a_tar_is_found_and_its_sample_is_named(damaged: Path) -> None:
    shards = ShardSet.open(str(damaged))
    which = next(i for i, record in enumerate(shards.shards) if record.samples > 2)
    tar, rows, name = Path(shards.tar(which)), shards.sidecar(which), shards.shards[which].name
    data, last = tar.read_bytes(), int(rows["offset"][1] + rows["length"][1])
    for position in (*range(0, last, 7), *range(last, len(data), 512), len(data) - 1):
        harmed = bytearray(data)
        harmed[position] ^= 1 + position % 255
        tar.write_bytes(harmed)
        (findings,) = check(shards, [which], lambda: None)
        assert findings[0] == f"{name}: does not have the sha256 of the index", position
        inside = np.flatnonzero((rows["offset"] <= position) & (position < rows["offset"] + rows["length"]))
        if len(inside):
            assert findings[1].startswith(f"{name}: sample ") and "crc32" in findings[1] and len(findings) == 2, (
                position
            )


def test_a_tar_cut_at_any_block_is_found_with_the_number_of_whole_samples(damaged: Path) -> None:
    shards = ShardSet.open(str(damaged))
    which = next(i for i, record in enumerate(shards.shards) if record.samples > 2)
    tar, rows, name = Path(shards.tar(which)), shards.sidecar(which), shards.shards[which].name
    data = tar.read_bytes()
    for cut in range(0, len(data), 512):
        tar.write_bytes(data[:cut])
        findings = [finding for found in check(shards, [which], lambda: None) for finding in found]
        whole = int(np.sum(rows["offset"] + rows["length"] <= cut))
        assert findings[0].startswith(f"{name}: {cut} bytes, the index says {len(data)} (cut short or changed): ")
        assert findings[0].endswith(f"the index says {len(rows)} samples, {whole} are whole")


def test_tars_and_sidecars_that_change_places_are_found(damaged: Path) -> None:
    shards = ShardSet.open(str(damaged))
    one, two = [i for i, record in enumerate(shards.shards) if record.samples][:2]
    for place in (shards.tar, shards.sidecar_path, shards.record_path):
        a, b = Path(place(one)), Path(place(two))
        before = a.read_bytes(), b.read_bytes()
        a.write_bytes(before[1])
        b.write_bytes(before[0])
        findings = verify(str(damaged))
        named = {finding.split(":")[0].rpartition("/")[2] for finding in findings}
        assert {a.name, b.name} <= named
        assert a.suffix != ".tar" or "holds the bytes of" in "".join(findings)
        a.write_bytes(before[0])
        b.write_bytes(before[1])
    assert verify(str(damaged)) == []
