"""How fast do training batches come, against plain webdataset, a torch Dataset over loose files, and bare decoding?

    python benchmarks/loader_throughput.py [--shards DIR ...] [--rounds N]

Everybody gives uint8 batches of 128 of the same PNG files, half of them flipped, with the same number of worker
processes, all processes of a loader pinned to as many cores as it has workers (one if it has none). They go in turn,
round after round; figures are medians. Bare decoding is a loop over files held in memory, on one core: by Pillow as
anybody would, and by `images.decode`, which is faster. Without --shards two sets, of 32 and 64 px, are made of
scikit-learn's two photographs: 10,000 images, each tar under ten names, so that what is measured is the middle of an
epoch.

Then each tar has a hundred names, a million samples: how long until the first batch after a resume in the middle of an
epoch, and how much memory reading it takes.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from PIL import __version__ as pillow
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.images.preprocess import decode, encode
from pipeline.data.loading.batches import Batches
from pipeline.data.loading.order import Order
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.shard_set import Sample, ShardSet, key, pack, write_shard

BATCH, LANES, WINDOW = 128, 64, 256
WARM, MEASURED = 12, 40
CORES = sorted(os.sched_getaffinity(0))


def make_set(place: Path, size: int, shards: int) -> None:
    """Pieces of photographs, a thousand to a shard."""
    from sklearn.datasets import load_sample_images  # noqa: PLC0415  every worker would import it

    rng = np.random.default_rng(size)
    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]
    records = []
    for shard in range(shards):
        samples = []
        for position in range(1000 * shard, 1000 * (shard + 1)):
            scene, side = scenes[position % 2], int(rng.integers(size, 400))
            left, top = (int(rng.integers(0, room - side)) for room in scene.size)
            piece = scene.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
            meta = {"source": f"{position}.jpg", "original_size": [side, side], "transforms": ["reduced"]}
            samples.append(Sample(key(position), encode(np.asarray(piece), "png"), "png", position % 10, meta))
        records.append(write_shard(str(place), f"set-{shard:06d}", map(pack, samples), dict))
    _index(place, records, size)


def enlarge(few: Path, many: Path, times: int) -> None:
    """A set with each tar of another under so many names, which costs no room."""
    many.mkdir()
    shards, records = ShardSet.open(str(few)), []
    for record in shards.shards * times:
        name = f"set-{len(records):06d}"
        for ending in ("tar", "npy"):
            os.link(few / f"{record.stem}.{ending}", many / f"{name}.{ending}")
        records.append(replace(record, name=f"{name}.tar"))
    _index(many, records, shards.size[0])


def _index(place: Path, records: list, size: int) -> None:
    write_index(str(place), records, size=(size, size), channels=3, classes=list("0123456789"), source="benchmark",
                settings={"shard_samples": 1000}, counts={})  # fmt: skip


def ours(shards: ShardSet, workers: int, first_sample: int = 0) -> Batches:
    order = Order(seed=1, shard_samples=shards.shard_samples, global_batch=BATCH, lanes=LANES, window=WINDOW)
    return Batches(shards, order, rank=0, world_size=1, first_sample=first_sample, workers=workers, flip=True)


def _ours(shards: ShardSet, loose: Path, workers: int) -> Iterator[Tensor]:
    with ours(shards, workers) as batches:
        for batch in batches:
            yield batch.images


def _flipped(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray((image[:, ::-1] if random.random() < 0.5 else image).transpose(2, 0, 1))


def _webdataset(shards: ShardSet, loose: Path, workers: int, shuffled: bool = True) -> Iterator[Tensor]:
    tars = [shards.tar(i) for i in range(len(shards.shards))]
    data = webdataset.WebDataset(tars, shardshuffle=len(tars) if shuffled else False)
    data = data.shuffle(1000 if shuffled else 0).decode("rgb8").to_tuple("png", "cls")
    data = data.map_tuple(_flipped).batched(BATCH, partial=False).repeat()
    yield from (torch.as_tensor(images) for images, _ in DataLoader(data, batch_size=None, num_workers=workers))


class _Files(Dataset):
    def __init__(self, directory: Path) -> None:
        self._paths = sorted(directory.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        return _flipped(np.asarray(Image.open(self._paths[i]).convert("RGB")))


def _files(shards: ShardSet, loose: Path, workers: int) -> Iterator[Tensor]:
    while True:
        yield from DataLoader(_Files(loose), batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)


PEERS: dict[str, Callable[[ShardSet, Path, int], Iterator[Tensor]]] = {
    "ours": _ours,
    "webdataset": _webdataset,
    "the same, unshuffled": partial(_webdataset, shuffled=False),
    "loose files": _files,
}  # fmt: skip


def rate(batches: Iterator[Tensor], cores: int) -> float:
    """Images a second, all processes of this tree on so many cores."""
    next(batches)
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        process.cpu_affinity(CORES[:cores])
    for _ in islice(batches, WARM):
        pass
    started = time.perf_counter()
    images = sum(len(batch) for batch in islice(batches, MEASURED))
    seconds = time.perf_counter() - started
    batches.close()
    return images / seconds


def _by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def bare(decoder: Callable[[bytes], np.ndarray], files: list[bytes]) -> float:
    os.sched_setaffinity(0, CORES[:1])
    started = time.perf_counter()
    for data in files:
        decoder(data)
    seconds = time.perf_counter() - started
    os.sched_setaffinity(0, CORES)
    return len(files) / seconds


BARE = {"Pillow": _by_pillow, "us": partial(decode, channels=3)}


def _images(shards: ShardSet) -> Iterator[tuple[str, bytes]]:
    for i in range(len(shards.shards)):
        with tarfile.open(shards.tar(i)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file and member.name.endswith(".png"):
                    yield member.name, file.read()


def compare(place: Path, rounds: int) -> None:
    shards = ShardSet.open(str(place))
    with tempfile.TemporaryDirectory(prefix="loose-") as loose:
        files = []
        for name, data in islice(_images(shards), 10_000):
            Path(loose, name).write_bytes(data)
            files.append(data)
        size = "x".join(map(str, shards.size))
        print(f"\nPNG files of {size} px, {sum(map(len, files)) // len(files)} bytes each")
        print(f"{'':49}of bare decoding by")
        print(f"{'workers':>7} {'cores':>5}  {'':22}{'images/s':>9}{'x webdataset':>14}{'Pillow':>10}{'us':>7}")
        for workers in (0, 1, 2)[: 2 + (len(CORES) > 1)]:
            rates: dict[str, list[float]] = {name: [] for name in (*BARE, *PEERS)}
            cores = max(workers, 1)
            for _ in range(rounds):
                for name, peer in PEERS.items():
                    rates[name].append(rate(peer(shards, Path(loose), workers), cores))
                for name, decoder in BARE.items():
                    rates[name].append(bare(decoder, files[:3000]))
            for name in PEERS:
                against = statistics.median(a / b for a, b in zip(rates[name], rates["webdataset"]))
                by_pillow, by_us = (
                    statistics.median(a / b / cores for a, b in zip(rates[name], rates[bar])) for bar in BARE
                )
                speed = f"{statistics.median(rates[name]):>9.0f}{against:>14.2f}{by_pillow:>10.0%}{by_us:>7.0%}"
                print(f"{workers:>7} {cores:>5}  {name:22}{speed}")


def resume(sizes: dict[str, Path], rounds: int) -> None:
    os.sched_setaffinity(0, CORES)
    print("\nfrom opening the set to the first batch, resumed in the middle of an epoch: median and worst, s")
    print("(workers come from a server that runs already: a job starts it first of all)")
    for workers in (0, 2):
        seconds: dict[str, list[float]] = {title: [] for title in sizes}
        for number in range(rounds):
            for title, place in sizes.items():
                started = time.perf_counter()
                shards = ShardSet.open(str(place))
                with ours(shards, workers, BATCH * (shards.samples // BATCH // 2 + number)) as batches:
                    next(batches)
                    seconds[title].append(time.perf_counter() - started)
        for title, values in seconds.items():
            print(f"  {workers} workers, {title:18}{statistics.median(values):8.2f}{max(values):8.2f}")


def memory(sizes: dict[str, Path]) -> None:
    print("memory of this process after 100, 200, … batches, MiB")
    for title, place in sizes.items():
        with ours(ShardSet.open(str(place)), 0) as batches:
            held = []
            for _ in range(6):
                for _ in islice(batches, 100):
                    pass
                held.append(str(psutil.Process().memory_info().rss >> 20))
        print(f"  {title:18}", *held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, nargs="*", metavar="DIR", help="shard sets of RGB PNGs to use instead")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loader-") as directory:
        few, places = Path(directory, "32px"), options.shards
        make_set(few, 32, 10)
        if not places:
            make_set(Path(directory, "64px"), 64, 10)
            places = [Path(directory, "many 32px"), Path(directory, "many 64px")]
            for source, place in zip((few, Path(directory, "64px")), places):
                enlarge(source, place, 10)
        for place in places:
            compare(place, options.rounds)
        sizes = {"10,000 samples": few, "1,000,000 samples": Path(directory, "million")}
        enlarge(*sizes.values(), 100)
        resume(sizes, options.rounds)
        memory(sizes)
    print(f"\nwebdataset {webdataset.__version__}, torch {torch.__version__}, Pillow {pillow}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
