"""One function for each parser: it accepts the bytes of a file, or raises DataError, ConfigError or Rejected."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pipeline import untrusted
from pipeline.data.images.preprocess import Rejected, preprocess_image
from pipeline.data.shards import sample_set
from pipeline.data.shards.index_tars import scan
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.sample_check import SampleChecker
from pipeline.data.shards.settings import IndexSettings
from pipeline.data.shards.shard_set import SIDECAR, ShardSet
from pipeline.data.sources.cifar import Cifar
from pipeline.data.sources.labels.numbering import unlabeled
from pipeline.data.sources.listing import Reader
from pipeline.data.sources.numpy_file import Npy, Npz
from pipeline.data.sources.parquet import Table
from pipeline.data.sources.sorted_inputs import sort
from pipeline.data.sources.tar import Tar
from pipeline.data.sources.zip import Zip
from pipeline.errors import ConfigError, DataError

TABLE_HEAD = {"version": 2, "size": [8, 8], "channels": 3, "classes": None, "source": "", "settings": {}, "counts": {},
              "settings_sha256": "", "places": []}  # fmt: skip
ANSWERS = (DataError, ConfigError, Rejected)
_MOST_READ = 8
PLACE = Path(tempfile.mkdtemp(prefix="ddpm-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def _source(kind: Callable[[str], Any], name: str) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        file = PLACE / name
        file.write_bytes(data)
        source = kind(str(file))
        entries = source.entries(True, lambda: None)
        entries.sort()
        inputs = sort([""], [entries], unlabeled([entries]), None).inputs
        reader = Reader([source])
        for item in inputs[:_MOST_READ]:
            with suppress(Rejected):
                reader.read(item)

    return target


def index(data: bytes) -> None:
    (PLACE / "set").mkdir(exist_ok=True)
    (PLACE / "set/index.json").write_bytes(data)
    shards = ShardSet.indexed(str(PLACE / "set"))
    for i in range(min(len(shards.shards), _MOST_READ)):
        if untrusted.is_allowed(shards.shards[i].name, ()):
            assert Path(shards.tar(i)).resolve().is_relative_to(PLACE.resolve()), shards.tar(i)


def table(data: bytes) -> None:
    """The first byte is the number of shards, the next eight the samples of the set; the rest is the table."""
    count, samples, content = data[0], int.from_bytes(data[1:9], "little"), data[9:]
    sha256 = hashlib.sha256(content).hexdigest()
    name, url = f"index-table-{sha256[:12]}.bin", PLACE / "table"
    url.mkdir(exist_ok=True)
    (url / name).write_bytes(content)
    shards = {"count": count, "table": name, "bytes": len(content), "sha256": sha256}
    (url / "index.json").write_text(json.dumps({**TABLE_HEAD, "shards": shards, "samples": samples}))
    try:
        for record in ShardSet.indexed(str(url)).shards:
            assert untrusted.is_allowed(record.name, ()) and record.samples * 1024 <= record.bytes
    finally:
        (url / name).unlink()


def record(data: bytes) -> None:
    ShardRecord.parse(untrusted.parse_json(data, "record"))


def samples(data: bytes) -> None:
    (PLACE / "samples").mkdir(exist_ok=True)
    (PLACE / "samples/shard_000000.json").write_bytes(data)
    assert sample_set.verify(str(PLACE / "samples")) is not None
    sample_set.provenance(str(PLACE / "samples"))


def sidecar(data: bytes) -> None:
    untrusted.array_rows(data, SIDECAR, "sidecar")


def sample(data: bytes) -> None:
    """The bytes of a sample in a shard, with a matching row of the sidecar."""
    shards = ShardSet("x", (), 0, (8, 8), 3, ("a", "b"), "", "", {}, "", {})
    row = np.array([(0, len(data), zlib.crc32(data), 512, max(len(data) - 1024, 0), 0)], SIDECAR)[0]
    SampleChecker(shards).check(data, row)


def foreign(data: bytes) -> None:
    (PLACE / "foreign.tar").write_bytes(data)
    scan(str(PLACE / "foreign.tar"), IndexSettings(size=(8, 8)), lambda: None)


def manifest(data: bytes) -> None:
    from pipeline.checkpoints.checkpoint import verify_checkpoints  # noqa: PLC0415  torch takes its time

    place = PLACE / "run/checkpoints/step_00000001"
    place.mkdir(parents=True, exist_ok=True)
    (place / "manifest.json").write_bytes(data)
    (place / "state.json").write_bytes(b"{}")
    verify_checkpoints(str(PLACE / "run"), iter)


def result(data: bytes) -> None:
    from pipeline.evaluation import result_file  # noqa: PLC0415

    (PLACE / "result.safetensors").write_bytes(data)
    result_file.parse(str(PLACE / "result.safetensors"))


def image(data: bytes) -> None:
    preprocess_image(data, size=(8, 8))


def member(data: bytes) -> None:
    """A zip member: its method, its stated size, its bytes."""
    if len(data) > 3:
        method = (0, 8, 12, 14)[data[0] % 4]
        size = int.from_bytes(data[1:3])
        try:
            found = untrusted.inflated(data[3:], method, size)
        except (ValueError, NotImplementedError):  # of which the caller makes Rejected
            return
        assert method == 0 or len(found) <= size + 1


def places(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    name, *recorded = text.split("\n")
    assert len(untrusted.locations_of([name, *recorded])) <= untrusted.MAX_LOCATIONS
    if untrusted.is_allowed(name, ()):
        assert ".." not in name.split("/") and not name.startswith("/") and "://" not in name
    untrusted.is_allowed(name, recorded)
    assert untrusted.printable(text).isprintable()


def json_text(data: bytes) -> None:
    json.dumps(untrusted.parse_json(data, "text"), allow_nan=False)


def torch_file(data: bytes) -> None:
    """A file of torch.save: an archive with a pickle."""
    from pipeline.model.torch_file import TorchFile  # noqa: PLC0415

    (PLACE / "a.pt").write_bytes(data)
    with TorchFile(str(PLACE / "a.pt")) as file:
        tensors = file.tensors(file.content) if isinstance(file.content, dict) else {}
    assert sum(tensor.numel() for tensor in tensors.values()) <= 4 * len(data)


def torch_pickle(data: bytes) -> None:
    """The pickle in such a file, which a checksum keeps from the other target; and what is made of its value."""
    from pipeline import import_model  # noqa: PLC0415

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in (("data.pkl", data), ("data/0", bytes(64)), ("byteorder", b"little")):
            file.writestr(f"a/{name}", content)
    torch_file(archive.getvalue())
    import_model._from_file(str(PLACE / "a.pt"), import_model.ImportSettings(size=(8, 8), head_channels=8))


def weights(data: bytes) -> None:
    """Names and shapes of another project's weights, as JSON: the network that they are of."""
    import torch  # noqa: PLC0415

    from pipeline import import_model  # noqa: PLC0415
    from pipeline.model import foreign_weights  # noqa: PLC0415
    from pipeline.sampling import pretrained  # noqa: PLC0415
    from tests import foreign  # noqa: PLC0415

    class Stored(nullcontext[None]):
        content = untrusted.parse_json(data, "weights")

        def __enter__(self) -> Any:
            return self

        def tensors(self, shapes: dict[str, Any]) -> dict[str, Any]:
            return {name: self._tensor(name, shape) for name, shape in shapes.items()}

        def _tensor(self, name: str, shape: Any) -> torch.Tensor:
            sides = [untrusted.count(side, "a side", most=1 << 12) for side in shape] if type(shape) is list else [0]
            if name == foreign_weights._TABLE and len(sides) == 2 and math.prod(sides) < 1 << 12:
                return foreign.table(*sides)  # whose values are checked
            return torch.zeros(()).expand(sides if math.prod(sides) <= 1 << 20 else [0])

    settings = import_model.ImportSettings(size=(8, 8), head_channels=8)
    with mock.patch.object(import_model, "TorchFile", lambda source: Stored()):
        try:
            made = import_model._from_file("weights", settings)
        except ConfigError as error:
            if "is for networks of OpenAI" not in str(error):
                raise
            made = import_model._from_file("weights", replace(settings, head_channels=None))
    pretrained.check_weights(made.model, "weights")


def diffusers(data: bytes) -> None:
    """The three JSON files of a diffusers directory, a line each."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save  # noqa: PLC0415

    from pipeline.diffusion.process import DiffusionProcess  # noqa: PLC0415
    from pipeline.sampling import pretrained  # noqa: PLC0415

    place = PLACE / "diffusers"
    place.mkdir(exist_ok=True)
    names = ("config.json", "scheduler_config.json", "model_index.json")
    for name, text in zip_longest(names, data.split(b"\n", 2)):
        (place / name).write_bytes(text) if text else (place / name).unlink(missing_ok=True)
    if not (place / "config.json").exists():
        return
    tensors = {f"down_blocks.0.resnets.{i}.conv1.weight": torch.zeros(1) for i in range(30)}
    (place / "diffusion_pytorch_model.safetensors").write_bytes(save(tensors))
    model = pretrained.read(str(place), ema=True)
    DiffusionProcess.of(model.config.diffusion)
    pretrained.check_weights(model, str(place))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "tar": _source(Tar, "a.tar"),
    "targz": _source(Tar, "a.tar.gz"),
    "zip": _source(Zip, "a.zip"),
    "npy": _source(Npy, "a.npy"),
    "npz": _source(Npz, "a.npz"),
    "cifar": _source(Cifar, "data_batch_1"),
    "parquet": _source(Table, "a.parquet"),
    "index": index,
    "table": table,
    "record": record,
    "samples": samples,
    "sidecar": sidecar,
    "sample": sample,
    "foreign": foreign,
    "manifest": manifest,
    "result": result,
    "image": image,
    "member": member,
    "places": places,
    "json": json_text,
    "torch": torch_file,
    "pickle": torch_pickle,
    "weights": weights,
    "diffusers": diffusers,
}


def run(name: str, data: bytes) -> None:
    """Give bytes to a parser.

    Raises:
        Exception: another error than those that a parser may raise.
    """
    try:
        TARGETS[name](data)
    except ANSWERS as answer:
        assert str(answer).isprintable() or isinstance(answer, Rejected), repr(answer)
