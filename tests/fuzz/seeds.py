"""Small valid files for each parser, with which the fuzzer begins."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.images.preprocess import encode
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.shard_set import SIDECAR, Sample, pack
from pipeline.data.shards.shard_table import pack_table

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


def _torch(value: Any, *, new: bool = True) -> bytes:
    import torch  # noqa: PLC0415  it takes its time

    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def _torch_files(name: str) -> list[bytes]:
    if name not in ("torch", "pickle"):
        return []
    import torch  # noqa: PLC0415

    tensors = {"a": torch.ones(2, 3), "b": torch.nn.Parameter(torch.ones(4)[1:]), "c": torch.ones(2).bfloat16()}
    saved = [_torch(tensors), _torch({"net_model": tensors, "ema_model": tensors, "x_T": torch.ones(1, 1, 2, 2)})]
    if name == "torch":
        return [*saved, _torch(tensors, new=False)]
    return [zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl") for data in saved]


def _shapes(name: str) -> list[bytes]:
    if name != "weights":
        return []
    from tests import foreign  # noqa: PLC0415

    networks = (
        foreign.openai(blocks=1, classes=2, learn_sigma=True),
        foreign.openai(mults=(1, 1), blocks=1, updown=True),
        foreign.w86763777(blocks=1, timesteps=2),
    )
    return [json.dumps({key: list(tensor.shape) for key, tensor in network.items()}).encode() for network in networks]


def _table(count: int, shard: dict[str, Any]) -> bytes:
    records = (ShardRecord.parse({**shard, "name": f"a-{i:06d}.tar"}) for i in range(count))
    return pack_table(records)[0]


_UNET = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
    "block_out_channels": [32, 64], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8, "num_class_embeds": 3,
}  # fmt: skip
_SCHEDULER = {
    "_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "num_train_timesteps": 1000, "trained_betas": None, "variance_type": "fixed_small", "clip_sample": True,
}  # fmt: skip
_PIPELINE = {
    "_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"],
    "id2label": {"0": "a", "1": "b", "2": "c"},
}  # fmt: skip


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
        "table": [bytes([3]) + (6).to_bytes(8, "little") + _table(3, shard)],
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
        "torch": _torch_files(name),
        "pickle": _torch_files(name),
        "weights": _shapes(name),
        "diffusers": [b"\n".join(json.dumps(part).encode() for part in (_UNET, _SCHEDULER, _PIPELINE))],
        "json": [b'{"a": [1, 2.5, "x", null, true]}'],
    }[name]
