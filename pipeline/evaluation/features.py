"""Load a feature network from a file: uint8 images → features, in which distances between sets are measured.

Three kinds, distinguished by the content of the file, not by its name:

- NumPy `.npz` with the state_dict of a CIFAR ResNet (He et al. 2016, arXiv:1512.03385, section 4.2), names and option-A
  shortcuts as in github.com/akamaster/pytorch_resnet_cifar10. The features are the pooled ones before the classifier.
  Images may have any size and are not resized; the network was trained at 32 px.
- TorchScript, such as NVIDIA's `inception-2015-12-05.pt`, called with float RGB images of values 0 to 255, and with
  `return_features=True` if it has that argument; without it such a network returns probabilities of its classes (with
  `no_output_bias=True` if it has that argument, as for the Inception Score), in a second pass. The network itself may
  resize; NVIDIA's does, to 299 px, as the TensorFlow original does.
- `torch.export`, as `torch.export.save` writes it (`.pt2`), with a dynamic batch dimension, called as TorchScript is.
  It returns the features, or the features and the logits of its classes.

`inception` names NVIDIA's file, the standard one: it is taken from the cache of this user, or fetched once.

`torch.jit.load` creates TorchScript's own types and tensors only; a pickle of other Python objects is refused. But the
program in the file is executed: use only files from sources that you trust.

The distance is called FID only with the Inception network of Heusel et al. 2017. Features are float32 without TF32. On
a CPU they are bit-identical for the same batches, machine, number of threads and torch version; otherwise the last
digits may differ, which changes a distance by a share of about 1e-8.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from pipeline.data.loading.batches import Batch
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.result_file import Arrays
from pipeline.evaluation.shard_results import ShardResults
from pipeline.storage import files
from pipeline.untrusted import error_text

INCEPTION = "inception"
"""The name that stands for the standard file."""
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_INCEPTION_FILE = "inception-2015-12-05.pt"
_INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{_INCEPTION_FILE}"
_KINDS = (
    "give an .npz with a CIFAR ResNet's weights, TorchScript such as NVIDIA's inception-2015-12-05.pt, "
    "or a .pt2 of torch.export"
)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalization of RGB in 0..1 in the training of akamaster's networks."""
_COUNTER = "num_batches_tracked"
_BATCH = 256
_TINY = torch.finfo(torch.float32).tiny


class Features(NamedTuple):
    """Features of B images, on the CPU."""

    features: Tensor
    """float32, (B, D)."""
    logits: Tensor | None
    """float32, (B, classes), logarithms of the probabilities of its classes up to a constant; None if it has none."""


@dataclass(frozen=True)
class Extractor:
    """A network that computes features of images; created by `load`."""

    url: str
    sha256: str
    """Of the feature file."""
    preprocessing: str
    """How images are prepared for the network. Features with different preprocessing are not comparable."""
    device: torch.device
    _network: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    def __call__(self, images: Tensor) -> Features:
        """Features of a batch.

        Args:
            images: uint8, (B, C, H, W), C 3 or 1; grey is repeated to three channels.

        Raises:
            ConfigError: the network does not accept such images, or does not return (B, D).
        """
        try:
            # TF32 keeps ten bits of the mantissa, which a distance shows.
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                features, logits = self._network(images.to(self.device).expand(-1, 3, -1, -1).float())
        except (RuntimeError, AssertionError) as error:
            size = "x".join(map(str, images.shape[2:]))
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix("RuntimeError: ")
            raise ConfigError(f"{self.url} takes no batch of {len(images)} RGB images of {size}: {reason}") from error
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1] or features[0].squeeze().ndim > 1:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(f"{self.url} gives {got} for {len(images)} images, not one row of features for each")
        return Features(
            features.reshape(len(images), -1).float().cpu(),
            None if logits is None else logits.float().cpu(),
        )


def load(name: str, device: torch.device, size: tuple[int, int]) -> Extractor:
    """Load the network of a feature file and test it on two images.

    Args:
        name: path or URL of the file, or `inception`.
        device: where the network runs.
        size: (height, width) of the images.

    Raises:
        ConfigError: the file cannot be had, is of an unknown kind, or its network does not accept such images.
        DataError: the file is damaged.
    """
    return parse(*read(name), device, size)


def read(name: str) -> tuple[str, bytes]:
    """Path or URL and content of a feature file; arguments and errors are those of `load`."""
    return _inception() if name == INCEPTION else (name, _read(name))


def parse(url: str, data: bytes, device: torch.device, size: tuple[int, int]) -> Extractor:
    """The network of a feature file from its content, for processes that share one reading; as `load` otherwise."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.namelist()
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{url} is damaged, or no feature file ({error}): {_KINDS}") from error
    if damaged:
        raise DataError(f"{url} is damaged, in {damaged}: download it again")
    network: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    if any(name.endswith(".npy") for name in members):
        network, preprocessing = _cifar_resnet(url, data).to(device), "rgb, 0 to 1, ImageNet's mean and deviation"
    elif any(name.endswith("/archive_format") for name in members):
        network, preprocessing = _exported(url, data, device), "rgb, 0 to 255"
    elif any(name.endswith("/constants.pkl") for name in members):
        network, preprocessing = _torchscript(url, data, device)
    else:
        raise ConfigError(f"{url} has an unknown format: {_KINDS}")
    extractor = Extractor(url, hashlib.sha256(data).hexdigest(), preprocessing, device, network)
    extractor(torch.zeros((2, 3, *size), dtype=torch.uint8))
    return extractor


def _read(url: str) -> bytes:
    try:
        return files.read_bytes(url)
    except OSError as error:
        raise ConfigError(f"{url} cannot be read ({error.strerror or error}): {_KINDS}") from error


def is_to_be_fetched(name: str) -> bool:
    """Whether `load` would fetch this file and write it to the cache of this user."""
    return name == INCEPTION and not files.exists(_inception_path())


def _inception_path() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return files.join(cache, "ddpm-pipeline", _INCEPTION_FILE)


def _inception() -> tuple[str, bytes]:
    """The standard Inception file: from this user's cache, else from its URL, and then kept in the cache."""
    path = _inception_path()
    is_cached = files.exists(path)
    try:
        data = files.read_bytes(path if is_cached else _INCEPTION_URL)
    except (OSError, DataError, ConfigError) as error:
        raise ConfigError(
            f"--features inception: cannot download {_INCEPTION_URL} ({_cause(error)}). Download it elsewhere and copy "
            f"it to {path} (sha256 {INCEPTION_SHA256})"
        ) from error
    if (sha256 := hashlib.sha256(data).hexdigest()) != INCEPTION_SHA256:
        where = path if is_cached else _INCEPTION_URL
        raise DataError(f"{where} has the sha256 {sha256}, not {INCEPTION_SHA256}: remove it and download it again")
    if not is_cached:
        files.write_bytes(path, data)
    return path, data


def _cause(error: BaseException) -> str:
    """Why the standard file cannot be fetched: fsspec tells the URL again, and the reason in the error before."""
    while _INCEPTION_URL in str(error) and error.__cause__:
        error = error.__cause__
    absent = "no such file" if isinstance(error, FileNotFoundError) else None
    return getattr(error, "strerror", None) or absent or error_text(error)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self._stride, self._new = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        # Option A: every second pixel, and zeros for the new channels, half of them before the old ones.
        return relu(y + pad(x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, self._new, self._new)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (_Block(outputs, outputs, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(_Block(inputs, outputs, stride), *rest)


class _CifarResnet(nn.Module):
    """A CIFAR ResNet; the attributes are named as in the file."""

    def __init__(self, width: int, blocks: list[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = rgb.new_tensor([_MEAN, _STD]).view(2, 3, 1, 1)
        x = relu(self.bn1(self.conv1((rgb / 255 - mean) / std)))
        features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features, self.linear(features)


def _cifar_resnet(url: str, data: bytes) -> nn.Module:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            weights = {name: torch.from_numpy(file[name]) for name in file.files if not name.endswith(_COUNTER)}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{url} contains something other than tensors ({error}): {_KINDS}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    blocks = [len([name for name in shapes if re.fullmatch(rf"layer{i}\.\d+\.conv1\.weight", name)]) for i in (1, 2, 3)]
    width, classes = ((*shapes.get(name, ()), 1)[0] for name in ("conv1.weight", "linear.weight"))
    network = _CifarResnet(width, blocks, classes)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if not name.endswith(_COUNTER)}
    for name in sorted(wanted | shapes):
        if wanted.get(name) != shapes.get(name):
            there, here = shapes.get(name, "missing"), wanted.get(name, "not in it")
            raise ConfigError(f"{url} is no CIFAR ResNet for RGB images ({name}: {there}; wanted: {here}): {_KINDS}")
    network.load_state_dict(weights, strict=False)
    return network.eval()


def _torchscript(
    url: str, data: bytes, device: torch.device
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor | None]], str]:
    try:
        network = torch.jit.load(io.BytesIO(data), map_location=device).eval()  # type: ignore[no-untyped-call]
        arguments = {argument.name for argument in network.forward.schema.arguments}
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{url} is not TorchScript that this torch can load ({reason}): {_KINDS}") from error
    if "return_features" not in arguments:
        return lambda rgb: (network(rgb), None), "rgb, 0 to 255"
    options = {"no_output_bias": True} if "no_output_bias" in arguments else {}

    def both(rgb: Tensor) -> tuple[Tensor, Tensor | None]:
        probabilities: Tensor = network(rgb, **options)
        return network(rgb, return_features=True), probabilities.clamp_min(_TINY).log()

    return both, "rgb, 0 to 255, return_features"


def _exported(url: str, data: bytes, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    try:
        network = torch.export.load(io.BytesIO(data)).module().to(device)
    except Exception as error:  # the loader raises errors of many kinds for a damaged program
        raise ConfigError(
            f"{url} is no program of torch.export that this torch can load ({error_text(error)})"
        ) from error

    def call(rgb: Tensor) -> tuple[Tensor, Tensor | None]:
        output = network(rgb)
        return (output, None) if isinstance(output, Tensor) else output

    return call


def of_shards(shards: ShardSet, extractor: Extractor, cache: str) -> ShardResults:
    """The features of a set: arrays `features`, (N, D), and `logits`, (N, classes), if the network has classes.

    Args:
        shards: the set.
        extractor: the network.
        cache: directory or URL under which they are kept.
    """

    def compute(batch: Batch) -> Arrays:
        found = extractor(batch.images)._asdict()
        return {name: value.numpy() for name, value in found.items() if value is not None}

    directory = files.join(cache, f"features-{extractor.sha256[:12]}")
    network = {"features_sha256": extractor.sha256, "preprocessing": extractor.preprocessing}
    return ShardResults(shards, directory, network, compute, _BATCH)
