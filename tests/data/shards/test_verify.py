"""The verifier finds every damage and names the shard, and the sample where one can be told."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.shard_set import Sample, ShardSet, key, pack, write_shard
from pipeline.data.shards.verify import verify
from tests.data.shards.test_shard_set import edit_index, sample, write_set


def test_a_sound_set_has_no_findings(tmp_path: Path) -> None:
    for extension in ("png", "jpg", "webp"):
        write_set(tmp_path / extension, extension=extension)
        assert verify(str(tmp_path / extension)) == []
    write_set(tmp_path / "none", label=None)
    assert verify(str(tmp_path / "none")) == []


def test_a_cut_at_any_block_is_found(tmp_path: Path) -> None:
    path = Path(write_set(tmp_path).tar(1))
    data = path.read_bytes()
    for cut in range(0, len(data), 512):
        path.write_bytes(data[:cut])
        finding = verify(str(tmp_path))[0]
        assert finding.startswith(f"set-000001.tar: {cut} bytes, the index says {len(data)}")
        assert "the index says 3 samples" in finding


def test_lost_samples_are_counted(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    path = Path(shards.tar(1))
    path.write_bytes(path.read_bytes()[: int(shards.sidecar(1)["offset"][2])])  # ends cleanly for any tar reader
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 6
    assert verify(str(tmp_path))[0].endswith("the index says 3 samples, 2 are whole")


def test_every_flipped_bit_is_found_and_its_sample_named(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    rng = random.Random(0)
    for i in range(3):
        path, rows = Path(shards.tar(i)), shards.sidecar(i)
        sound = path.read_bytes()
        for position in [0, 100, 257, *(rng.randrange(len(sound)) for _ in range(40)), len(sound) - 1]:
            damaged = bytearray(sound)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            findings = verify(str(tmp_path))
            assert f"set-{i:06d}.tar: does not have the sha256 of the index" in findings
            for n, row in enumerate(rows.astype([(name, "i8") for name in rows.dtype.names])):
                if row["image_offset"] <= position - row["offset"] < row["image_offset"] + row["image_length"]:
                    assert any(f"sample {key(3 * i + n)}: " in finding for finding in findings)
                elif row["offset"] <= position < row["offset"] + row["length"]:
                    assert any(f"set-{i:06d}.tar: sample " in finding for finding in findings)
        path.write_bytes(sound)
    assert verify(str(tmp_path)) == []


@pytest.mark.parametrize("ending", ["tar", "npy", "json"])
def test_missing_extra_renamed_and_swapped_files_are_found(tmp_path: Path, ending: str) -> None:
    write_set(tmp_path)
    one, two, new = (tmp_path / f"set-{i:06d}.{ending}" for i in (1, 2, 9))

    one.rename(new)
    findings = verify(str(tmp_path))
    assert any(finding.startswith(f"{one.name}: ") and "missing" in finding for finding in findings)
    assert any(finding.startswith(f"{new.name}: not in the index") for finding in findings)
    new.rename(one)

    new.write_bytes(one.read_bytes())
    assert verify(str(tmp_path)) == [f"{new.name}: not in the index (renamed, or left by another job)"]
    new.unlink()

    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    findings = verify(str(tmp_path))
    assert {finding.split(":")[0] for finding in findings} == {one.name, two.name}
    if ending == "tar":
        assert findings[0] == f"{one.name}: holds the bytes of {two.name} (swapped or renamed)"


def test_shards_swapped_with_their_sidecars_and_records_are_found(tmp_path: Path) -> None:
    write_set(tmp_path)
    for ending in ("tar", "npy", "json"):
        one, two = (tmp_path / f"set-{i:06d}.{ending}" for i in (1, 2))
        a, b = one.read_bytes(), two.read_bytes()
        one.write_bytes(b.replace(b"set-000002", b"set-000001") if ending == "json" else b)
        two.write_bytes(a.replace(b"set-000001", b"set-000002") if ending == "json" else a)
    assert verify(str(tmp_path))
    index = json.loads((tmp_path / "index.json").read_text())
    one, two = index["shards"][1], index["shards"][2]
    one["name"], two["name"] = two["name"], one["name"]
    edit_index(tmp_path, shards=[index["shards"][0], two, one])
    ShardSet.open(str(tmp_path))
    findings = verify(str(tmp_path))  # only the keys tell now
    assert "set-000001.tar: sample 000000006: its key is outside this shard's range, 3 to 6" in findings
    assert "set-000002.tar: sample 000000003: its key is outside this shard's range, 6 to 9" in findings


def odd(position: int, **changes: object) -> Sample:
    values = {**vars(sample(position)), **changes}
    return Sample(**values)


@pytest.mark.parametrize(
    ("samples", "finding"),
    [
        ([sample(0, side=9)], "sample 000000000: its image is (9, 9, 3), the index says (8, 8, 3)"),
        ([sample(0), odd(1, image=b"not an image")], "sample 000000001: its image cannot be decoded (damaged)"),
        ([odd(0, image=sample(0).image[:-40])], "sample 000000000: its image cannot be decoded (damaged)"),
        ([sample(0, label=2)], "sample 000000000: class 2 is not one of the 2 of the index"),
        ([sample(2), sample(1)], "sample 000000001: its key is not above the one before it"),
        ([sample(1), sample(1)], "sample 000000001: its key is not above the one before it"),
        ([sample(3)], "sample 000000003: its key is outside this shard's range, 0 to 3"),
        ([odd(0, key="../../etc/x")], "member '../../etc/x.cls' has no place in it"),
        ([odd(0, key="a" * 9)], "has no place in it"),
        ([odd(0, extension="exe")], "has no place in it"),
    ],
)
def test_sets_that_agree_with_their_hashes_but_not_with_the_format_are_found(
    tmp_path: Path, samples: list[Sample], finding: str
) -> None:
    record = write_shard(str(tmp_path), "set-000000", map(pack, samples), dict)
    settings = {"shard_samples": 3}
    write_index(
        str(tmp_path), [record], size=(8, 8), channels=3, classes=["a", "b"], source="", settings=settings, counts={}
    )
    (found,) = verify(str(tmp_path))
    assert found.startswith("set-000000.tar: sample ") and finding in found


def forge(directory: Path, change: Callable[[bytearray, np.ndarray], None]) -> list[str]:
    """Change a shard's bytes and sidecar, and let every hash agree."""
    shards = write_set(directory)
    tar, rows = bytearray(Path(shards.tar(0)).read_bytes()), shards.sidecar(0).copy()
    change(tar, rows)

    def hashed(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    buffer = io.BytesIO()
    np.save(buffer, rows)
    Path(shards.tar(0)).write_bytes(tar)
    (directory / "set-000000.npy").write_bytes(buffer.getvalue())
    index = json.loads((directory / "index.json").read_text())
    index["shards"][0] |= {"bytes": len(tar), "sha256": hashed(tar), "sidecar_sha256": hashed(buffer.getvalue())}
    edit_index(directory, **index)
    (directory / "set-000000.json").write_text(json.dumps(index["shards"][0]))
    return verify(str(directory))


def relabel(tar: bytearray, rows: np.ndarray) -> None:
    rows["label"][1] = 0


def shift_image(tar: bytearray, rows: np.ndarray) -> None:
    rows["image_offset"][1] += 512


def overlap(tar: bytearray, rows: np.ndarray) -> None:
    rows["offset"][2] = rows["offset"][1]


def append(tar: bytearray, rows: np.ndarray) -> None:
    tar += b"x" * 512


def drop_end(tar: bytearray, rows: np.ndarray) -> None:
    del tar[int(rows["offset"][2] + rows["length"][2]) :]


def link(tar: bytearray, rows: np.ndarray) -> None:
    """The first member becomes a symbolic link."""
    info = tarfile.TarInfo("000000000.cls")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar[:512] = info.tobuf(tarfile.USTAR_FORMAT)[:512]
    rows["crc32"][0] = zlib.crc32(tar[: rows["length"][0]])


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (relabel, "set-000000.tar: sample 000000001: its class is not that of the sidecar"),
        (shift_image, "set-000000.tar: sample 000000001: its image is not where the sidecar says"),
        (overlap, "set-000000.npy: row 2 starts at byte"),
        (append, "set-000000.tar: no end-of-archive mark after the last sample, or something follows it"),
        (drop_end, "set-000000.tar: no end-of-archive mark after the last sample, or something follows it"),
        (link, "member '000000000.cls' has no place in it"),
    ],
)
def test_forged_sidecars_and_tars_are_found(
    tmp_path: Path, change: Callable[[bytearray, np.ndarray], None], finding: str
) -> None:
    found = forge(tmp_path, change)
    assert len(found) == 1 and finding in found[0]


def test_the_forger_alone_changes_nothing(tmp_path: Path) -> None:
    assert forge(tmp_path, lambda tar, rows: None) == []


def test_nothing_is_written_or_unpacked(tmp_path: Path) -> None:
    record = write_shard(str(tmp_path / "set"), "set-000000", [pack(odd(0, key="../../escaped"))], dict)
    write_index(
        str(tmp_path / "set"), [record], size=(8, 8), channels=3, classes=None, source="", settings={}, counts={}
    )
    before = sorted(os.walk(tmp_path))
    assert verify(str(tmp_path / "set"))
    assert sorted(os.walk(tmp_path)) == before


def test_a_set_without_an_index_is_one_finding(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "index.json").unlink()
    (finding,) = verify(str(tmp_path))
    assert "is an unfinished shard set (no index.json)" in finding
