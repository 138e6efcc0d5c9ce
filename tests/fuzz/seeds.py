"""Small valid files for each parser, with which the fuzzer begins."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.images.preprocess import encode
from pipeline.data.shards.shard_set import SIDECAR, Sample, pack

_PIXELS = np.zeros((8, 8, 3), np.uint8)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _tar(**how: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **how) as tar:  # type: ignore[arg-type]
        for name, data in (("c/000.png", encode(_PIXELS, "png")), ("c/000.cls", b"1"), ("é" * 60 + ".jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _zip(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("c/0.png", encode(_PIXELS, "png"))
        archive.writestr("ü.png", b"x" * 99)
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.arange(3))
    return file.getvalue()


def _images() -> list[bytes]:
    found = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "TGA", "PPM"):
        file = io.BytesIO()
        Image.fromarray(_PIXELS).save(file, kind)
        found.append(file.getvalue())
    return found


def _parquet() -> list[bytes]:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [b"abc", b"d"], "label": [0, 1]}), file)
    return [file.getvalue()]


def seeds(name: str) -> list[bytes]:
    """Valid files for a parser."""
    sha = hashlib.sha256(b"").hexdigest()
    shard = {"name": "a-000000.tar", "bytes": 10240, "sha256": sha, "samples": 2, "sidecar_sha256": sha}
    index = {
        "version": 1, "shards": [shard], "samples": 2, "size": [8, 8], "channels": 3, "classes": ["a", "b"],
        "source": {}, "settings": {"foreign": True}, "settings_sha256": sha, "counts": {}, "places": ["../x/"],
    }  # fmt: skip
    record = {"seeds": "0-9,11", "count": 11, "provenance": {}, "files": {"000000000.png": {"bytes": 1, "sha256": sha}}}
    files = {"state.json": {"bytes": 2, "sha256": sha}, "model.safetensors": {"bytes": 2, "sha256": sha}}
    batch = {"data": np.zeros((1, 3072), np.uint8), "labels": [1]}
    header = json.dumps({"__metadata__": {"identity": '{"sha256": ""}'}}).encode()
    return {
        "tar": [_tar(), _tar(format=tarfile.GNU_FORMAT)],
        "targz": [gzip.compress(_tar())],
        "zip": [_zip(zipfile.ZIP_STORED), _zip(zipfile.ZIP_DEFLATED), _zip(zipfile.ZIP_LZMA), _zip(zipfile.ZIP_BZIP2)],
        "npy": [_npy(np.zeros((2, 4, 4, 3), np.uint8))],
        "npz": [_npz()],
        "cifar": [pickle.dumps(batch, 4)],
        "index": [json.dumps(index).encode(), json.dumps(index | {"settings": {}}).encode()],
        "record": [json.dumps(shard).encode()],
        "samples": [json.dumps(record).encode()],
        "sidecar": [_npy(np.zeros(2, SIDECAR))],
        "sample": [pack(Sample("000000000", encode(_PIXELS, "png"), "png", 0, {})).data],
        "foreign": [_tar()],
        "manifest": [json.dumps({"version": 1, "step": 1, "files": files}).encode()],
        "result": [len(header).to_bytes(8, "little") + header],
        "image": _images() if name == "image" else [],
        "parquet": _parquet() if name == "parquet" else [],
        "member": [b"\1\0\x10" + b"abc", b"\2\0\x10" + b"BZh9"],
        "places": [b"../a/x.tar\n../a/", b"https://h/x.tar\nhttps://h/"],
        "json": [b'{"a": [1, 2.5, "x", null, true]}'],
    }[name]
