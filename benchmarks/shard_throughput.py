"""How fast are photographs reduced to small images, against libvips `thumbnail` and a plain Pillow loop?

    python benchmarks/shard_throughput.py [--photos DIR] [--rounds N] [--size 64] [--skip-job]

JPEG photos of about 1000 px are cropped to the center, reduced and written as PNG: every program converts one photo
after the other, in turn, on one pinned core. A ratio is the median over the rounds, so a busy machine slows both sides.
Without --photos, random crops of scikit-learn's two sample photographs are enlarged, get sensor noise, and are saved
with quality 90, 4:2:0. The `ddpm shard` job runs on N and on 3 N photos; the difference is the time of 2 N, without
the start-up.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyvips
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from pipeline.data.images.preprocess import encode, preprocess_image

JOB_PHOTOS = 1000
CORES = sorted(os.sched_getaffinity(0))


def make_photos(count: int, progressive: bool) -> list[bytes]:
    """Photos of 1000 x 750 and 750 x 1000."""
    rng = np.random.default_rng(0)
    photos = []
    for number in range(count):
        scene = Image.fromarray(load_sample_images().images[number % 2])
        h = int(rng.integers(300, scene.height))
        w = h * 4 // 3
        left, top = rng.integers(0, scene.width - w), rng.integers(0, scene.height - h)
        size = (1000, 750) if number % 4 < 2 else (750, 1000)
        scene = scene.crop((left, top, left + w, top + h)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 3, (scene.height, scene.width, 3))
        noisy = Image.fromarray(np.clip(np.asarray(scene) + grain, 0, 255).astype(np.uint8))
        file = io.BytesIO()
        noisy.save(file, "JPEG", quality=90, subsampling="4:2:0", progressive=progressive)
        photos.append(file.getvalue())
    return photos


def ddpm(size: int, data: bytes) -> bytes:
    return encode(preprocess_image(data, size=(size, size)).array, "png")


def libvips(size: int, data: bytes) -> bytes:
    return pyvips.Image.thumbnail_buffer(data, size, height=size, crop="centre").pngsave_buffer()


def plain_pillow(size: int, data: bytes) -> bytes:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def psnr(convert: Callable[[bytes], bytes], reference: Callable[[bytes], bytes], photos: list[bytes]) -> list[float]:
    """PSNR of each photo in dB; the reference decodes at full size and applies one Lanczos filter."""
    values = []
    for photo in photos:
        a, b = (_pixels(program(photo)).astype(float) for program in (convert, reference))
        values.append(10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9)))
    return values


def _pixels(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def compare(title: str, photos: list[bytes], size: int, rounds: int) -> None:
    """Print a table of the three programs."""
    programs = {program.__name__: partial(program, size) for program in (ddpm, libvips, plain_pillow)}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        spent_s = dict.fromkeys(programs, 0.0)
        for photo in photos:  # in turn, as the load of the machine changes within a round
            for name, convert in programs.items():
                started = time.perf_counter()
                convert(photo)
                spent_s[name] += time.perf_counter() - started
        for name, seconds in spent_s.items():
            times[name].append(seconds / len(photos))
    print(f"\n{title}: {len(photos)} photos, {sum(map(len, photos)) / len(photos) / 1000:.0f} kB each, to {size} px")
    print(f"{'':14}{'ms each':>9}{'images/s':>10}{'x libvips':>11}{'dB, mean':>10}{'dB, min':>9}{'bytes':>8}")
    for name, convert in programs.items():
        spent = statistics.median(times[name])
        ratio = statistics.median(libvips_s / own_s for libvips_s, own_s in zip(times["libvips"], times[name]))
        decibels = psnr(convert, programs["plain_pillow"], photos)
        quality = f"{np.mean(decibels):>10.1f}{min(decibels):>9.1f}" if name != "plain_pillow" else f"{'-':>10}{'-':>9}"
        average = sum(len(convert(photo)) for photo in photos) / len(photos)
        print(f"{name:14}{spent * 1e3:>9.3f}{1 / spent:>10.0f}{ratio:>11.2f}{quality}{average:>8.0f}")


def job(photos: list[bytes], size: int, rounds: int) -> None:
    """Print the time of the entire job with one worker on one core and with two on two, beside libvips on files."""
    with tempfile.TemporaryDirectory(prefix="throughput-") as directory:
        few, many = Path(directory, "few"), Path(directory, "many")
        for place, count in ((few, JOB_PHOTOS), (many, 3 * JOB_PHOTOS)):
            place.mkdir()
            for number in range(count):
                (place / f"{number:06d}.jpg").write_bytes(photos[number % len(photos)])
        runs: dict[str, Callable[[], float]] = {
            "libvips, file to file, on one core": lambda: _files_by_libvips(few, Path(directory), size),
            "ddpm shard, 1 worker on one core": lambda: _job(few, many, f"{directory}/out", size, 1),
            "ddpm shard, 2 workers on two cores": lambda: _job(few, many, f"{directory}/out", size, 2),
        }
        times = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(run())
    print(f"\nthe entire job, {JOB_PHOTOS} and {3 * JOB_PHOTOS} photos, start-up subtracted")
    peer, one = list(times.values())[:2]
    for name, spent in times.items():
        against = [statistics.median(a / b for a, b in zip(other, spent)) for other in (peer, one)]
        each = statistics.median(spent)
        print(f"{name:36}{each * 1e3:>7.3f} ms, {1 / each:>5.0f} images/s, {against[0]:.2f} x libvips, "
              f"{against[1]:.2f} x one worker")  # fmt: skip


def _files_by_libvips(source: Path, out: Path, size: int) -> float:
    os.sched_setaffinity(0, CORES[:1])
    started = time.perf_counter()
    files = sorted(source.iterdir())
    for path in files:
        small = pyvips.Image.thumbnail(str(path), size, height=size, crop="centre")
        small.pngsave(str(out / f"{path.stem}.png"))
    os.sched_setaffinity(0, CORES)
    return (time.perf_counter() - started) / len(files)


def _job(few: Path, many: Path, out: str, size: int, workers: int) -> float:
    seconds = []
    for source in (few, many):
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", "shard", str(source), "--out", out]
        command += ["--size", str(size), "--workers", str(workers), "--labels", "none", "--overwrite", "--quiet"]
        cores = ",".join(map(str, CORES[:workers]))
        started = time.perf_counter()
        subprocess.run(["taskset", "-c", cores, *command], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) / (2 * JOB_PHOTOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="JPEG files to use instead")
    parser.add_argument("--size", type=int, default=64, help="side of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip-job", action="store_true", help="only the comparison on one core")
    options = parser.parse_args()
    if options.photos:
        files = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        sets = {str(options.photos): [path.read_bytes() for path in files[:200]]}
    else:
        sets = {"baseline": make_photos(24, progressive=False), "progressive": make_photos(24, progressive=True)}
    os.sched_setaffinity(0, CORES[-1:])
    pyvips.concurrency_set(1)
    pyvips.cache_set_max(0)
    for title, photos in sets.items():
        compare(title, photos, options.size, options.rounds)
    os.sched_setaffinity(0, CORES)
    if not options.skip_job:
        job(next(iter(sets.values())), options.size, max(3, options.rounds // 3))
    print(f"\nlibvips {pyvips.version(0)}.{pyvips.version(1)}.{pyvips.version(2)}, Pillow {Image.__version__}")


if __name__ == "__main__":
    main()
