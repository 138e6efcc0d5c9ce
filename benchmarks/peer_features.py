"""Beside the peers: do features and figures agree with torch-fidelity, pytorch-fid and clean-fid, for equal weights?

    python benchmarks/peer_features.py CIFAR10.zip [--images 300]

It needs an environment of its own, as all three need torchvision: this project's packages, and what was compared:

    pip install torch==2.14.1 torchvision==0.29.1 torch-fidelity==0.4.0 pytorch-fid==0.3.0 clean-fid==0.1.35

The weights are random, drawn once and given to every network, so no file of weights is needed. The peers prepare images
in three ways. A TorchScript file for `--features` contains its own preprocessing, so there is a file for each way:

- tensorflow: bilinear as in TensorFlow 1, (x - 128)/128. NVIDIA's file; torch-fidelity; clean-fid `legacy_tensorflow`.
- torch: bilinear between the centres of pixels, x/127.5 - 1. pytorch-fid; clean-fid `legacy_pytorch`.
- pillow: Pillow's bicubic, not rounded, (x - 128)/128. clean-fid `clean`.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytorch_fid.inception
import torch
from cleanfid import features as clean_features
from cleanfid import fid as clean_fid
from cleanfid import inception_pytorch as clean_inception
from numpy.typing import NDArray
from PIL import Image
from pytorch_fid import fid_score
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch_fidelity import feature_extractor_inceptionv3 as fidelity_inception
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from pipeline.data.shards.settings import ShardSettings
from pipeline.data.shards.shard_set import ShardSet
from pipeline.evaluation import features
from pipeline.evaluation.inception_score import inception_score
from pipeline.evaluation.kernel_distance import kernel_distance
from pipeline.evaluation.moments import Moments, frechet_distance
from pipeline.evaluation.precision_recall import precision_recall
from pipeline.shard import shard

CPU, BATCH, FILE = torch.device("cpu"), 16, "inception-2015-12-05.pt"
Rows = NDArray[np.float32]


class _TensorFlow(nn.Module):
    def forward(self, rgb: Tensor) -> Tensor:
        return (self.along(self.along(rgb, 2), 3) - 128) / 128

    def along(self, x: Tensor, dim: int) -> Tensor:
        place = torch.arange(299, dtype=torch.float32) * (x.shape[dim] / 299)
        low = place.long()
        first = x.index_select(dim, low)
        second = x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1))
        share = (place - low).view([299, 1] if dim == 2 else [299])
        return first + (second - first) * share


class _Torch(nn.Module):
    def forward(self, rgb: Tensor) -> Tensor:
        return interpolate(rgb, size=[299, 299], mode="bilinear", align_corners=False) / 127.5 - 1


class _Pillow(nn.Module):
    def forward(self, rgb: Tensor) -> Tensor:
        # With antialias torch has Pillow's kernel (a = -0.5), else a = -0.75.
        big = interpolate(rgb, size=[299, 299], mode="bicubic", align_corners=False, antialias=True)
        return (big.clamp(0, 255) - 128) / 128


class _Nvidia(nn.Module):
    """The calling convention of NVIDIA's inception-2015-12-05.pt."""

    def __init__(self, prepare: nn.Module, layers: nn.Module, output: nn.Linear) -> None:
        super().__init__()
        self.prepare, self.layers, self.output = prepare, layers, output

    def forward(self, rgb: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        found = self.layers(self.prepare(rgb))
        if return_features:
            return found
        logits = found @ self.output.weight.t()
        return torch.softmax(logits if no_output_bias else logits + self.output.bias, dim=1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip")
    parser.add_argument("--images", type=int, default=300, help="in each of the two sets")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(256, 256)) / 16
    a, b = (np.abs(generator.normal(size=(600, 256)) @ mix + i / 20).astype(np.float32) for i in (0, 1))
    print("synthetic features")
    _distances(a, b)
    _distances(a[:100], b[:100])
    _figures(a, b)
    with tempfile.TemporaryDirectory() as place:
        _compare(Path(place), _images(options.zip, 2 * options.images).reshape(2, options.images, 32, 32, 3))


def _compare(place: Path, sets: NDArray[np.uint8]) -> None:
    weights = _random_weights(_as_tensor(sets[0, :8]))
    for module in (pytorch_fid.inception, clean_inception, fidelity_inception):
        mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: weights).start()
    theirs = pytorch_fid.inception.InceptionV3()
    output = pytorch_fid.inception.fid_inception_v3().fc
    layers = torch.jit.script(nn.Sequential(*theirs.blocks, nn.Flatten()).eval())
    ways = {"tensorflow": _TensorFlow(), "torch": _Torch(), "pillow": _Pillow()}
    for way, prepare in ways.items():
        (place / way).mkdir()
        torch.jit.script(_Nvidia(prepare, layers, output)).save(place / way / FILE)
    for name, images in zip("ab", sets):
        _write(place / name, images)
    fidelity = fidelity_inception.FeatureExtractorInceptionV3("fidelity", ["2048", "logits_unbiased"])
    inside, outside = (
        clean_features.InceptionV3W(str(place / "tensorflow"), False, inside) for inside in (True, False)
    )
    peers: dict[tuple[str, str], Callable[[int], tuple[Rows, ...]]] = {
        ("tensorflow", "torch-fidelity"): lambda i: _fidelity(fidelity, sets[i]),
        ("tensorflow", "clean-fid legacy_tensorflow"): lambda i: _clean(place / "ab"[i], inside, "legacy_tensorflow"),
        ("torch", "pytorch-fid"): lambda i: (
            fid_score.get_activations(sorted((place / "ab"[i]).iterdir()), theirs, BATCH, num_workers=0),),
        ("torch", "clean-fid legacy_pytorch"): lambda i: _clean(place / "ab"[i], clean_features.feature_extractor(
            "pytorch_inception", CPU, use_dataparallel=False), "legacy_pytorch"),
        ("pillow", "clean-fid clean"): lambda i: _clean(place / "ab"[i], outside, "clean"),
    }  # fmt: skip
    found = {way: _ours(place, way) for way in ways}
    rows = {way: [side["features"] for side in sides] for way, sides in found.items()}
    print(
        "\nstandard deviation of features over the images:", {way: f"{_spread(of[0]):.3f}" for way, of in rows.items()}
    )
    print("between preprocessing:", {way: f"{_apart(rows['tensorflow'], of):.1e}" for way, of in rows.items()})
    for (way, name), extract in peers.items():
        try:
            got = [extract(i) for i in (0, 1)]
        except Exception as error:  # a peer may not run with this version of torchvision
            print(f"{way:11} {name:28} {type(error).__name__}: {error}")
            continue
        print(f"{way:11} {name:28} largest difference {_apart(rows[way], [parts[0] for parts in got]):.1e}")
        if len(got[0]) > 1:
            score = isc_features_to_metric(torch.from_numpy(got[0][1]), splits=1)["inception_score_mean"]
            print(f"  inception score {score:.9g}, ours {inception_score(found[way][0]['logits']).value:.9g}")
    for columns in (len(sets[0]) // 2, 4 * len(sets[0])):
        _distances(*(side[:, :columns] for side in rows["tensorflow"]))
    _figures(*rows["tensorflow"])


def _apart(some: Sequence[Rows], others: Sequence[Rows]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others))


def _spread(rows: Rows) -> float:
    return float(np.sqrt(rows.var(axis=0).mean()))


def _distances(a: Rows, b: Rows) -> None:
    # The trace of the root is the sum of the singular values of the images' products, also of singular covariances.
    means = [side.mean(axis=0, dtype=np.float64) for side in (a, b)]
    centred = [(side - mean) / np.sqrt(len(side) - 1) for side, mean in zip((a, b), means)]
    truth = ((means[0] - means[1]) ** 2).sum() + sum((side**2).sum() for side in centred)
    truth -= 2 * np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    print(f"Fréchet distance of {len(a)} + {len(b)} images, {a.shape[1]} features: {truth:.9g}; relative errors:")
    for name, distance in {
        "ours": lambda a, b: frechet_distance(Moments.of(a), Moments.of(b)),
        "torch-fidelity": lambda a, b: fid_statistics_to_metric(
            *(fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), False)["frechet_inception_distance"],
        "pytorch-fid": lambda a, b: fid_score.calculate_frechet_distance(*_statistics(a), *_statistics(b)),
        "clean-fid": clean_fid.fid_from_feats,
    }.items():  # fmt: skip
        errors = [distance(a.astype(kind), b.astype(kind)) / truth - 1 for kind in (np.float32, np.float64)]
        print(f"  {name:14} {errors[0]:+.1e}, of float64 features {errors[1]:+.1e}")


def _statistics(rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.mean(rows.astype(np.float64), axis=0), np.cov(rows.astype(np.float64), rowvar=False)  # as pytorch-fid


def _figures(a: Rows, b: Rows) -> None:
    doubles = [side.astype(np.float64) for side in (a, b)]
    ours, size = kernel_distance(a, b).value, {"kid_subsets": 1, "kid_subset_size": len(a), "verbose": False}
    print(f"kernel distance: ours {ours:.9g}")
    for name, kernel in {
        "torch-fidelity": lambda *sides: kid_features_to_metric(*map(torch.from_numpy, sides), **size)[
            "kernel_inception_distance_mean"],
        "clean-fid": lambda *sides: clean_fid.kernel_distance(*sides, 1, len(a)),
    }.items():  # fmt: skip
        print(f"  {name:14} {kernel(a, b):.9g}, of float64 features {kernel(*doubles):.9g}")
    found = precision_recall(a, b)
    theirs = calculate_precision_recall_full(*map(torch.from_numpy, doubles), 3)
    print(
        f"precision, recall: ours {found['precision'].value:.6f}, {found['recall'].value:.6f}; torch-fidelity {theirs}"
    )


def _random_weights(images: Tensor) -> dict[str, Tensor]:
    """Weights that all matter and keep features of order 1: the statistics of BatchNorm are those of some images."""
    with mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url"), \
         mock.patch.object(nn.Module, "load_state_dict"):  # fmt: skip
        network = pytorch_fid.inception.fid_inception_v3()
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 1.0
    nn.init.normal_(network.fc.weight, std=0.2)
    network.train()(_TensorFlow()(images.float()))
    return network.state_dict()


def _ours(place: Path, way: str) -> list[dict[str, Rows]]:
    """The arrays of the files that `ddpm evaluate` keeps."""
    sides = [ShardSet.open(str(place / f"{name}-shards")) for name in "ab"]
    extractor = features.load(str(place / way / FILE), CPU, sides[0].size)
    results = [features.of_shards(shards, extractor, str(place / "cache")) for shards in sides]
    for result in results:
        for i in result.missing():
            result.compute(i, lambda count: None)
    return [result.read() for result in results]


def _fidelity(network: nn.Module, images: NDArray[np.uint8]) -> tuple[Rows, ...]:
    parts = [network(part) for part in _as_tensor(images).split(BATCH)]
    return tuple(torch.cat(part).numpy() for part in zip(*parts))


def _clean(folder: Path, network: Callable[[Tensor], Tensor], mode: str) -> tuple[Rows]:
    how = {"num_workers": 0, "batch_size": BATCH, "device": CPU, "mode": mode, "verbose": False}
    return (clean_fid.get_folder_features(str(folder), network, **how),)


def _images(path: str, count: int) -> NDArray[np.uint8]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".webp", ".png")))
        names = names[:: len(names) // count][:count]  # of all classes
        return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names])


def _as_tensor(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _write(folder: Path, images: NDArray[np.uint8]) -> None:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05}.png")
    shard([str(folder)], f"{folder}-shards", ShardSettings(size=(32, 32), labels="none"), quiet=True)


if __name__ == "__main__":
    main()
