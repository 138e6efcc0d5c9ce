"""Hostile files, each read by the parser that it attacks: `python -m tests.attacks DIRECTORY` prints results and costs.

`test_attacks.py` runs this once, in one process for all attacks, under limits of memory and CPU.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from pipeline.data.images.preprocess import Rejected, encode
from pipeline.data.shards import sample_set, verify
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.shard_set import SIDECAR, Sample, ShardSet, pack, write_shard
from pipeline.data.sources.listing import Reader, list_inputs
from pipeline.errors import ConfigError, DataError

GIB = 1 << 30
PNG = encode(np.zeros((8, 8, 3), np.uint8), "png")
Attack = Callable[[Path], str]
ATTACKS: dict[str, Attack] = {}


def attack(make: Attack) -> Attack:
    ATTACKS[make.__name__] = make
    return make


def listed(*files: Path) -> str:
    """The answer of `ddpm shard`: an error, or the result of each input."""
    listing = list_inputs([str(file) for file in files], "none")
    reader, results = Reader(listing.sources), set()
    for item in listing.inputs:
        try:
            results.add(f"{len(reader.read(item))} bytes")
        except Rejected as rejected:
            results.add(f"rejected: {rejected.reason}")
    return f"{len(listing.inputs)} inputs: {', '.join(sorted(results))}"


def zeros(count: int) -> bytes:
    """A raw deflate stream of this many zeros, by compressing only a MiB."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    mib = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return mib * (count >> 20) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def raw_zip(stored: bytes, method: int, size: int, *, extra: bytes = b"", offset: int = 0, times: int = 1) -> bytes:
    fields = (0, method, 0, 0x5A21, zlib.crc32(bytes(size)) if size < 1 << 20 else 1, len(stored), size & 0xFFFFFFFF, 5)
    body = struct.pack("<4s5H3I2H", b"PK\3\4", 20, *fields, 0) + b"a.png" + stored
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *fields, len(extra), 0, 0, 0, 0, offset) + b"a.png" + extra
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, times, times, len(entry) * times, len(body), 0)
    return body + entry * times + end


def put(directory: Path, name: str, data: bytes) -> Path:
    (directory / name).write_bytes(data)
    return directory / name


def npy(shape: Any, descr: str = "'|u1'", header_bytes: int = 0) -> bytes:
    told = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    length = header_bytes or len(told) + 1
    return b"\x93NUMPY\2\0" + struct.pack("<I", length) + told.ljust(length - 1) + b"\n" + bytes(100)


def npz(directory: Path, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(directory / "a.npz", "w", method) as archive:
        archive.writestr("images.npy", data)
    return directory / "a.npz"


@attack
def npz_claims_rows(directory: Path) -> str:
    return listed(npz(directory, npy((4_000_000, 32, 32, 3))))


@attack
def npz_header_of_100_mb(directory: Path) -> str:
    return listed(npz(directory, npy((3, 8, 8, 3), header_bytes=100_000_000)))


@attack
def npz_directory_that_lies(directory: Path) -> str:
    """The header and the size in the directory agree, but the packed bytes cannot inflate to that size."""
    data = npy((4_000_000, 32, 32, 3))
    file = npz(directory, data)
    raw = file.read_bytes().replace(struct.pack("<I", len(data)), struct.pack("<I", 4_000_000_000))
    return listed(put(directory, "b.npz", raw))


@attack
def npz_packed_otherwise(directory: Path) -> str:
    return listed(npz(directory, npy((3, 8, 8, 3)) + bytes(1000), zipfile.ZIP_BZIP2))


@attack
def npy_of_negative_shape(directory: Path) -> str:
    return listed(put(directory, "a.npy", npy((-3, -8, 8, 3))))


@attack
def npy_of_2_to_200_rows(directory: Path) -> str:
    return listed(put(directory, "a.npy", npy((2**200, 8, 8, 3))))


@attack
def npy_of_objects(directory: Path) -> str:
    return listed(put(directory, "a.npy", npy((3, 8, 8, 3), "'|O'")))


@attack
def npy_of_brackets(directory: Path) -> str:
    return listed(put(directory, "a.npy", b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000))


@attack
def zip_that_inflates(directory: Path) -> str:
    return listed(put(directory, "a.zip", raw_zip(zeros(2 * GIB), 8, 100)))


@attack
def zip_that_says_it_inflates(directory: Path) -> str:
    return listed(put(directory, "a.zip", raw_zip(zeros(2 * GIB), 8, 2 * GIB)))


@attack
def zip_of_bzip2_that_inflates(directory: Path) -> str:
    return listed(put(directory, "a.zip", raw_zip(bz2.compress(bytes(1 << 27)), 12, 100)))


@attack
def zip_of_lzma_with_4_gib_to_look_back(directory: Path) -> str:
    return listed(put(directory, "a.zip", raw_zip(struct.pack("<HHBI", 9, 5, 0x5D, 0xFFFFFFFF) + bytes(50), 14, 100)))


@attack
def zip_of_members_over_each_other(directory: Path) -> str:
    return listed(put(directory, "a.zip", raw_zip(zeros(1 << 26), 8, 1 << 26, times=2000)))


@attack
def zip_offset_of_64_bits(directory: Path) -> str:
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
    return listed(put(directory, "a.zip", raw_zip(PNG, 0, len(PNG), extra=extra, offset=0xFFFFFFFF)))


@attack
def zip_size_of_64_bits(directory: Path) -> str:
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
    return listed(put(directory, "a.zip", raw_zip(PNG, 0, 0xFFFFFFFF, extra=extra)))


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@attack
def tar_gz_that_inflates(directory: Path) -> str:
    data = gzip.compress(_tar_header("a.png", 2 * GIB)) + gzip.compress(bytes(1 << 20)) * 2048
    return listed(put(directory, "a.tar.gz", data + gzip.compress(bytes(1024))))


@attack
def tar_zst_that_inflates(directory: Path) -> str:
    frame = zstandard.ZstdCompressor().compress
    data = frame(_tar_header("a.png", 2 * GIB)) + frame(bytes(1 << 20)) * 2048
    return listed(put(directory, "a.tar.zst", data))


@attack
def pickle_that_names_a_billion_values(directory: Path) -> str:
    return listed(put(directory, "data_batch_1", b"\x80\x02}r" + struct.pack("<I", 1 << 30) + b"."))


@attack
def pickle_whose_key_is_nested(directory: Path) -> str:
    pairs = b")q\x00" + b"h\x00h\x00\x86q\x00" * 64
    return listed(put(directory, "data_batch_1", b"\x80\x02}" + pairs + b"K\x01s."))


@attack
def pickle_whose_name_is_nested(directory: Path) -> str:
    pairs = b")q\x00" + b"h\x00h\x00\x86q\x00" * 64
    return listed(put(directory, "data_batch_1", b"\x80\x02(" + pairs + b"K\x01d."))


@attack
def pickle_that_runs_a_program(directory: Path) -> str:
    return listed(put(directory, "data_batch_1", b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR."))


@attack
def pickle_of_labels_that_are_none(directory: Path) -> str:
    batch = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [2**70]}, 4)
    return listed(put(directory, "data_batch_1", batch))


@attack
def pipe_as_image(directory: Path) -> str:
    os.mkfifo(directory / "a.png")
    return listed(directory / "a.png")


@attack
def device_as_archive(directory: Path) -> str:
    (directory / "a.tar").symlink_to("/dev/zero")
    return listed(directory / "a.tar")


@attack
def directories_linked_crosswise(directory: Path) -> str:
    for i in range(16):
        (directory / f"d/{i:02d}").mkdir(parents=True)
    for i in range(15):
        for name in "ab":
            (directory / f"d/{i:02d}/{name}").symlink_to(f"../{i + 1:02d}")
    put(directory, "d/15/x.png", PNG)
    return listed(directory / "d/00")


@attack
def directories_1500_deep(directory: Path) -> str:
    here = os.getcwd()
    try:
        os.chdir(directory)
        os.mkdir("root")
        os.chdir("root")
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Path("x.png").write_bytes(PNG)
    finally:
        os.chdir(here)
    try:
        return listed(directory / "root")
    finally:
        subprocess.run(["rm", "-rf", directory / "root"], check=True)  # too deep for Python and pytest


def a_set(directory: Path, data: bytes | None = None, **row: int) -> tuple[Path, dict[str, Any]]:
    """A valid set of one shard, except for these bytes of its sample."""
    sample = pack(Sample("000000000", PNG, "png", None, {}))
    if data is not None:
        sample = sample._replace(data=data, crc32=zlib.crc32(data), **row)
    url = directory / "set"
    record = write_shard(str(url), "set-000000", [sample], dict)
    write_index(str(url), [record], size=(8, 8), channels=3, classes=None, source="", settings={}, counts={"taken": 1})
    return url, json.loads((url / "index.json").read_text())


def verified(url: Path, index: Any = None) -> str:
    if index is not None:
        (url / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    findings = verify.verify(str(url))
    assert all(line.isprintable() and len(line) < 2000 for line in findings)
    return f"found: {'; '.join(findings)}" if findings else "valid"


def _named(name: str, **more: Any) -> Attack:
    def make(directory: Path) -> str:
        url, index = a_set(directory)
        (directory / "secret").mkdir()
        (url / "set-000000.tar").replace(directory / "secret/set-000000.tar")
        shard = index["shards"][0] | {"name": name.format(directory=directory), "sidecar": "set-000000.npy"} | more
        (url / "set-000000.json").write_text(json.dumps(shard))
        return verified(url, index | {"shards": [shard]})

    return make


for _title, _name in {
    "a_device": "/dev/zero",
    "a_path_above": "../secret/set-000000.tar",
    "an_absolute_path": "{directory}/secret/set-000000.tar",
    "a_file_url": "file://{directory}/secret/set-000000.tar",
    "a_web_page": "http://127.0.0.1:9/set-000000.tar",
    "a_chain": "simplecache::file://{directory}/secret/set-000000.tar",
    "a_way_round": "x/../../secret/set-000000.tar",
    "a_title_of_the_terminal": "x\x1b]0;pwned\x07-000000.tar",
}.items():
    ATTACKS[f"index_names_{_title}"] = _named(_name)
ATTACKS["index_names_a_sidecar_outside"] = _named("set-000000.tar", sidecar="../secret/x.npy")


def _changed(**changes: Any) -> Attack:
    def make(directory: Path) -> str:
        url, index = a_set(directory)
        shard = {name: changes.pop(name) for name in list(changes) if name in index["shards"][0] and name != "samples"}
        return verified(url, index | {"shards": [index["shards"][0] | shard]} | changes)

    return make


for _title, _changes in {
    "size_of_a_text": {"size": ["8", "8"]},
    "size_below_zero": {"size": [-8, -8]},
    "settings_of_none": {"settings": None},
    "samples_of_10_to_30": {"samples": 10**30},
    "samples_true": {"samples": True},
    "bytes_of_10_to_30": {"bytes": 10**30},
    "sha256_of_a_list": {"sha256": [1]},
    "classes_of_numbers": {"classes": [1, 2]},
    "shards_of_one_number": {"shards": [7]},
    "places_of_numbers": {"places": [7]},
}.items():
    ATTACKS[f"index_has_{_title}"] = _changed(**_changes)


@attack
def index_of_infinite_size(directory: Path) -> str:
    url, index = a_set(directory)
    return verified(url, json.dumps(index | {"size": [float("inf"), 8]}))


@attack
def index_200000_deep(directory: Path) -> str:
    return verified(a_set(directory)[0], "[" * 200_000)


@attack
def index_of_a_number_of_5000_digits(directory: Path) -> str:
    return verified(a_set(directory)[0], "1" * 5000)


@attack
def key_of_5000_digits(directory: Path) -> str:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("1" * 5000 + ".png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
        length = tar.offset
    return verified(a_set(directory, file.getvalue()[:length])[0])


@attack
def image_of_400_megapixels(directory: Path) -> str:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)), (b"IDAT", b"\x78\xda" + zeros(1 << 30))]
    image = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*parts, (b"IEND", b"")]
    )
    sample = pack(Sample("000000000", image, "png", None, {}))
    return verified(a_set(directory, sample.data, image_offset=sample.image_offset, image_length=len(image))[0])


@attack
def sidecar_that_claims_rows(directory: Path) -> str:
    url, index = a_set(directory)
    data = npy((1 << 40,), repr(SIDECAR.descr))
    (url / "set-000000.npy").write_bytes(data)
    shard = index["shards"][0] | {"sidecar_sha256": hashlib.sha256(data).hexdigest()}
    return verified(url, index | {"shards": [shard]})


def _recorded(**changes: Any) -> Attack:
    def make(directory: Path) -> str:
        record = {"seeds": "0-9", "provenance": {}, "count": 1, "files": {}} | changes
        put(directory, "shard_000000.json", json.dumps(record).encode())
        findings = sample_set.verify(str(directory))
        assert all(line.isprintable() for line in findings)
        return f"found: {'; '.join(findings)}" if findings else "valid"

    return make


ATTACKS["record_of_many_seeds"] = _recorded(seeds="0-99999999")
ATTACKS["record_of_a_seed_of_5000_digits"] = _recorded(seeds="1" * 5000)
ATTACKS["record_names_a_device"] = _recorded(files={"/dev/zero": {"bytes": 0, "sha256": ""}})
ATTACKS["record_names_a_path_above"] = _recorded(files={"../x": {"bytes": 0, "sha256": ""}})
ATTACKS["record_of_files_of_numbers"] = _recorded(files={"x.png": 7})


def _peak_kb() -> int:
    """Peak memory of this program; `ru_maxrss` would begin with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    root = Path(sys.argv[1])
    ShardSet.indexed(str(a_set(root)[0]))  # late imports are no cost of an attack
    for name, make in ATTACKS.items():
        directory = root / name
        directory.mkdir()
        started = time.process_time()
        try:
            answer = make(directory)
        except (DataError, ConfigError) as error:
            answer = f"{type(error).__name__}: {error}"
        except Exception:
            answer = f"CRASH {traceback.format_exc()}"
        cost = {"cpu_s": time.process_time() - started, "peak_kb": _peak_kb()}
        print(json.dumps({"name": name, "answer": answer, **cost}), flush=True)


if __name__ == "__main__":
    main()
