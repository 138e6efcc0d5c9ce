"""The directory in which `diffusers` saves a UNet2DModel, alone or in a pipeline with its scheduler.

    model_index.json             of a pipeline: its parts, and possibly names of classes
    unet/config.json             or config.json: the architecture
    unet/diffusion_pytorch_model[.VARIANT].safetensors, or
    unet/diffusion_pytorch_model.safetensors.index[.VARIANT].json, which names the files that hold the weights
    scheduler/scheduler_config.json, or scheduler_config.json beside config.json

No file is trusted: the index may only name files inside the directory, and nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline import messages, untrusted
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files

_STEM = "diffusion_pytorch_model"
_WHOLE = re.compile(rf"(?!.*-\d{{5}}-of-\d{{5}}){_STEM}(?:\.(?P<variant>[\w-]+))?\.safetensors")
_PART = re.compile(rf"{_STEM}(?:\.[\w-]+)?-\d{{5}}-of-\d{{5}}\.safetensors")
_INDEX = re.compile(rf"{_STEM}\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json")
_OTHER_FORMATS = (".bin", ".msgpack", ".ckpt", ".pt", ".pth", ".onnx")
_INFINITY = re.compile(rb":\s*-?Infinity\b")
_MAX_PARTS = 1000
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write(directory: str, unet: dict[str, Any], scheduler: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write a pipeline that `DDPMPipeline.from_pretrained` loads.

    Args:
        directory: written into; last of all model_index.json.
        unet: content of unet/config.json.
        scheduler: content of scheduler/scheduler_config.json.
        weights: under the names of diffusers.
    """
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": scheduler["_diffusers_version"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
    }
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"})
    files.write_bytes(files.join(directory, "unet", f"{_STEM}.safetensors"), data)
    files.write_json(files.join(directory, "unet", "config.json"), unet)
    files.write_json(files.join(directory, "scheduler", "scheduler_config.json"), scheduler)
    files.write_json(files.join(directory, "model_index.json"), index)


class StoredModel(NamedTuple):
    """The content of a diffusers directory."""

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    """{} if there is no scheduler."""
    weights: dict[str, Tensor]
    """float32, under the names of diffusers."""
    data: list[bytes]
    """The bytes of the weight files; with the two configurations they identify the model."""
    weights_file: str
    """Name of the weights in messages."""
    class_names: Any
    """`id2label` as stored; None if it is missing."""


def find(source: str) -> str | None:
    """The directory with the UNet's files; None if the source is no diffusers directory.

    Raises:
        ConfigError: the source is a pipeline with more than a UNet2DModel and its scheduler.
    """
    index = _read(files.join(source, "model_index.json")) if _has(source, "model_index.json") else None
    directory = next((f for f in (files.join(source, "unet"), source) if _has(f, "config.json")), None)
    if index is None:
        return directory
    kind = untrusted.printable(str(index.get("_class_name", "pipeline")))
    parts = {
        str(name): untrusted.printable(str(value[1]))
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    others = [
        f"{untrusted.printable(name)} ({part})" for name, part in parts.items() if name not in ("unet", "scheduler")
    ]
    if others:
        raise ConfigError(
            f"{source} is a {kind} with {', '.join(others[:5])}: only a UNet2DModel that draws pixels, with "
            "nothing but its scheduler, can be read here"
        )
    if directory is None:
        raise ConfigError(f"{source} is a {kind} without unet/config.json: copy the whole directory")
    return directory


def read(source: str, directory: str) -> StoredModel:
    """Read configurations and weights.

    Args:
        source: the directory given by the user.
        directory: the directory of the UNet's files, from `find`.

    Raises:
        DataError: weights are missing or have an unsupported format, or a file is damaged.
    """
    unet = _read(files.join(directory, "config.json"))
    scheduler = next(
        (
            _read(files.join(f, "scheduler_config.json"))
            for f in (files.join(source, "scheduler"), directory, source)
            if _has(f, "scheduler_config.json")
        ),
        {},
    )
    if not scheduler:
        messages.info(f"{source} has no scheduler_config.json: it is used with the diffusion of Ho et al. 2020")
    names = unet.get("id2label")
    if names is None and _has(source, "model_index.json"):
        names = _read(files.join(source, "model_index.json")).get("id2label")
    weights_file, parts = _weight_files(directory)
    weights: dict[str, Tensor] = {}
    data = []
    for name, wanted in parts:
        data.append(files.read_bytes(files.join(directory, name)))
        tensors = _tensors(files.join(directory, name), data[-1])
        if wanted is not None and tensors.keys() != wanted:
            raise DataError(
                f"{files.join(directory, name)} does not hold the weights that {weights_file} says: copy both again"
            )
        weights |= tensors
    return StoredModel(unet, scheduler, weights, data, files.join(directory, weights_file), names)


def _weight_files(directory: str) -> tuple[str, list[tuple[str, set[str] | None]]]:
    """The name of the weights, and their files, each with the weights it must hold (None: any)."""
    listing = sorted(files.listdir(directory))
    variants = {match["variant"]: match[0] for match in _matches(_INDEX, listing)}
    variants |= {match["variant"]: match[0] for match in _matches(_WHOLE, listing)}
    if not variants:
        _refuse_other_formats(directory, listing)
    variant = None if None in variants else next(iter(variants))
    if variant is not None and len(variants) > 1:
        raise DataError(
            f"{directory} holds the variants {', '.join(map(str, variants))}, but none without one: keep one"
        )
    if variant is not None:
        messages.info(f"{directory}: reading the weights of the variant {variant}")
    name = variants[variant]
    parts: list[tuple[str, set[str] | None]] = [(name, None)]
    if name.endswith(".json"):
        parts = _parts(directory, name)
        if missing := [file for file, _ in parts if file not in listing]:
            raise DataError(f"{files.join(directory, missing[0])} is missing: copy the whole directory again")
    return name, parts


def _parts(directory: str, name: str) -> list[tuple[str, set[str] | None]]:
    """The files that an index of sharded weights names; they must be in the same directory."""
    weight_map = _read(files.join(directory, name)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise DataError(f"{files.join(directory, name)} has no weight_map of names of files: copy it again")
    wanted: dict[str, set[str]] = {}
    for weight, file in weight_map.items():
        wanted.setdefault(file, set()).add(weight)
    for file in wanted:
        if not (_PART.fullmatch(file) or _WHOLE.fullmatch(file)):
            raise DataError(
                f"{files.join(directory, name)} names the file {untrusted.printable(file[:100])}, which has another "
                f"form than {_STEM}-00001-of-00002.safetensors"
            )
    if len(wanted) > _MAX_PARTS:
        raise DataError(f"{files.join(directory, name)} names {len(wanted)} files, more than {_MAX_PARTS}")
    return sorted((file, weights) for file, weights in wanted.items())


def _refuse_other_formats(directory: str, listing: list[str]) -> None:
    other = next((name for name in listing if name.startswith(_STEM) and name.endswith(_OTHER_FORMATS)), None)
    if other:
        raise DataError(
            f"{directory} has its weights in {untrusted.printable(other)}, which may run code when it is read: "
            f"convert it with diffusers, UNet2DModel.from_pretrained({directory!r})"
            f".save_pretrained({directory!r}, safe_serialization=True)"
        )
    raise DataError(f"{directory} has no {_STEM}.safetensors: copy it too, or save it with safe_serialization=True")


def _tensors(file: str, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that torch lacks
        raise DataError(f"{file} is damaged or cut short ({error}): copy it again") from None
    if other := next((name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES), None):
        kind = str(tensors[other].dtype).removeprefix("torch.")
        raise DataError(
            f"{file} holds quantized weights ({untrusted.printable(other)}: {kind}): use weights in float16 or wider"
        )
    return {name: tensor.float() for name, tensor in tensors.items()}


def _matches(pattern: re.Pattern[str], names: Iterable[str]) -> Iterable[re.Match[str]]:
    return (match for name in names if (match := pattern.fullmatch(name)))


def _has(directory: str, name: str) -> bool:
    return files.exists(files.join(directory, name))


def _read(file: str) -> dict[str, Any]:
    """Read a JSON object. Schedulers write -Infinity, which is not JSON, for a bound that does not exist."""
    value = untrusted.parse_json(_INFINITY.sub(b": null", files.read_bytes(file)), file)
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is not the configuration of a diffusers model: save it again")
    return value
