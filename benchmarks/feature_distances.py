"""What does a feature file see? Accuracy on CIFAR-10, and distances between sets that are alike and sets that are not.

    python benchmarks/feature_distances.py FILE.npz [--data ../shared/data]

Peers in the same run: scipy's matrix square root for the distance, numpy's covariance of all features at once.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import sqrtm

from pipeline.evaluation import features
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.moments import Moments, frechet_distance

COUNT, BATCH = 10_000, 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = features.load(options.file, device, (32, 32))
    generator = np.random.default_rng(0)

    test, classes = _cifar(options.data / "cifar10" / "test.zip")
    train = np.concatenate([_cifar(options.data / "cifar10" / f"train-{i}.zip")[0] for i in range(3)])
    train = train[np.sort(generator.choice(len(train), COUNT, replace=False))]
    noise = generator.integers(0, 256, test[:2000].shape, dtype=np.uint8)

    started = time.perf_counter()
    seen, logits = _features(extractor, test)
    print(
        f"{options.file} ({extractor.preprocessing}), {device}, {torch.get_num_threads()} threads, batches of {BATCH}"
    )
    print(f"  {len(test) / (time.perf_counter() - started):.0f} images/s, {seen.shape[1]} features")
    if logits is not None:
        print(f"  accuracy on CIFAR-10 test ({len(test)}): {(logits.argmax(axis=1) == classes).mean():.2%}")
    halves = generator.permutation(len(seen)).reshape(2, -1)
    cats = _features(extractor, _cats(options.data / "cats" / "cats_100px.tar"))[0]
    others = {f"train ({COUNT} drawn)": _features(extractor, train)[0], "cats at 32 px": cats,
              "noise": _features(extractor, noise)[0]}  # fmt: skip
    pairs = {"test: two halves": (seen[halves[0]], seen[halves[1]])}
    pairs |= {f"test (all) to {name}": (seen, other) for name, other in others.items()}
    print(f"\n{'squared Fréchet distance':36} {'ours':>12} {'with sqrtm':>12}")
    for name, (a, b) in pairs.items():
        print(f"{name:36} {frechet_distance(_moments(a), _moments(b)):12.6f} {_with_sqrtm(a, b):12.6f}")
    error = np.abs(_moments(seen).covariance - np.cov(seen.astype(np.float64), rowvar=False)).max()
    print(f"\ncovariance of {len(seen)} merged in batches, largest difference from numpy's at once: {error:.1e}")


def _features(
    extractor: Extractor, images: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    batches = [extractor(torch.from_numpy(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    logits = [batch.logits for batch in batches if batch.logits is not None]
    return torch.cat([batch.features for batch in batches]).numpy(), torch.cat(logits).numpy() if logits else None


def _moments(rows: NDArray[np.float32]) -> Moments:
    first, *rest = (Moments.of(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH))
    return sum(rest, first)


def _with_sqrtm(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    a_cov, b_cov = (np.cov(rows.astype(np.float64), rowvar=False) for rows in (a, b))
    apart = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    return float(apart @ apart + np.trace(a_cov + b_cov - 2 * sqrtm(a_cov @ b_cov).real))


def _cifar(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
        images = np.stack([_pixels(archive.read(name)) for name in names])
    return images, np.unique([name.split("/")[1] for name in names], return_inverse=True)[1]


def _cats(path: Path) -> NDArray[np.uint8]:
    with tarfile.open(path) as archive:
        files = [file for member in archive if (file := archive.extractfile(member))]
        return np.stack([_pixels(file.read()) for file in files])


def _pixels(data: bytes) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    resized = image if image.size == (32, 32) else image.resize((32, 32), Image.Resampling.LANCZOS)
    return np.asarray(resized).transpose(2, 0, 1)


if __name__ == "__main__":
    main()
