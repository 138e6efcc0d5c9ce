"""What `scale.py` measures, each time in a process of its own: one action on a set, its seconds and its MiB.

    python benchmarks/scale_probe.py ACTION [ARGUMENT ...]

Prints one line of JSON. The MiB are the most that the process had above what it had after its imports.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
from scale_peers import measured

from pipeline import cli
from pipeline.data.loading.batches import Batches
from pipeline.data.loading.order import Item, Order, rank_lanes
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.sample_set import SampleSet
from pipeline.data.shards.shard_set import Sample, ShardRecord, ShardSet, key, pack, write_shard
from pipeline.processes.forkserver import start_worker_server

GLOBAL_BATCH, LANES, WINDOW, RANKS = 512, 64, 256, 8
SAMPLES, SIDE = 1000, 8
STEPS_AHEAD = 5
"""Steps whose shards must exist for the first batch: workers read ahead."""


def order_of(shards: ShardSet) -> Order:
    """The order of a run on 8 GPUs."""
    return Order(1, shards.shard_samples, GLOBAL_BATCH, LANES, WINDOW)


def first_items(order: Order, lanes: range, steps: int = 1) -> Iterator[Item]:
    """The items of some lanes in the first steps."""
    for lane in lanes:
        yield from islice(order.lane_stream(lane, 0), steps * order.global_batch // order.lanes)


def batches(shards: ShardSet, rank: int, workers: int) -> Batches:
    """The loader of one of 8 ranks."""
    return Batches(shards, order_of(shards), rank=rank, world_size=RANKS, first_sample=0, workers=workers, flip=True)


def make(place: str, count: str) -> None:
    """A set of equal shards of 1,000 images; only those that the first steps read have files: links to one tar."""
    directory, pixels = Path(place), np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 1), dtype=np.uint8)
    directory.mkdir(parents=True)
    first = directory / "first"
    record = write_shard(str(first), "set-000000", map(pack, _samples(range(SAMPLES), pixels)), dict)

    def records() -> Iterator[ShardRecord]:
        for i in range(int(count)):
            yield ShardRecord(f"set-{i:06d}.tar", record.bytes, record.sha256, SAMPLES, record.sidecar_sha256, {})

    write_index(place, records(), size=(SIDE, SIDE), channels=1, classes=None, source="made for a measurement",
                settings={"shard_samples": SAMPLES}, counts={})  # fmt: skip
    shards = ShardSet.open(place)
    items = first_items(order_of(shards), range(LANES), STEPS_AHEAD)
    for shard in sorted({read.shard for item in items for read in item.reads}):
        for ending in ("tar", "npy"):
            os.link(first / f"set-000000.{ending}", directory / f"set-{shard:06d}.{ending}")


def _samples(numbers: range, pixels: np.ndarray) -> Iterator[Sample]:
    from pipeline.data.images.preprocess import encode  # noqa: PLC0415  only some actions need it

    image = encode(pixels, "png")
    for i in numbers:
        yield Sample(key(i), image, "png", None, {"source": f"{i}.png"})


def opened(place: str) -> dict[str, Any]:
    return measured(lambda: ShardSet.open(place))


def ordered(place: str) -> dict[str, Any]:
    """The first batch of the order, of a set that is open."""
    shards = ShardSet.open(place)
    return measured(lambda: list(first_items(order_of(shards), rank_lanes(LANES, 0, RANKS))))


def first_batch(place: str, workers: str) -> dict[str, Any]:
    """From nothing to the first batch, in MiB of this process alone. The workers' server runs, as in a job."""
    if int(workers):
        start_worker_server()
        ready = multiprocessing.get_context("forkserver").Process(target=os.getpid)
        ready.start()
        ready.join()

    def action() -> Batches:
        loader = batches(ShardSet.open(place), 0, int(workers))
        stack.enter_context(loader)
        next(loader)
        return loader

    with contextlib.ExitStack() as stack:
        return measured(action)


def pickled(place: str) -> dict[str, Any]:
    """What each worker gets when it starts."""
    shards = ShardSet.open(place)
    return {"bytes": len(ForkingPickler.dumps((shards, order_of(shards))))}


def command(*words: str) -> dict[str, Any]:
    """`ddpm …` without its imports of the start; its output is dropped."""

    def action() -> None:
        try:
            cli.main(list(words))
        except SystemExit as ended:
            if ended.code:
                raise SystemExit(f"ddpm {' '.join(words)}: exit code {ended.code}") from None

    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        return measured(action)


def sample_set(place: str, count: str) -> dict[str, Any]:
    """What `ddpm sample` does beside drawing: a shard a seed, each written and committed, and the index."""
    target = SampleSet(place, "tar", 1, {"checkpoint_sha256": "0" * 64}, {})
    image, seeds = np.zeros((SIDE, SIDE, 3), np.uint8), (range(int(count)),)

    def action() -> None:
        target.check()
        for i in target.numbers(seeds):
            target.committed(i)
            target.write(i, [(i, image)], {})
        target.finish(seeds, size=(SIDE, SIDE), channels=3, classes=None)

    return measured(action)


@contextmanager
def rank(place: str, number: str, workers: str) -> Iterator[dict[str, Any]]:
    """A rank after its first batch; its processes stay until the caller has measured them."""
    started = time.perf_counter()
    with batches(ShardSet.open(place), int(number), int(workers)) as loader:
        next(loader)
        yield {"seconds": time.perf_counter() - started}


ACTIONS = {
    "make": make, "open": opened, "order": ordered, "batch": first_batch, "pickled": pickled, "command": command,
    "sample_set": sample_set,
}  # fmt: skip


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name == "rank":
        with rank(*arguments) as result:
            print(json.dumps(result), flush=True)
            sys.stdin.read()
    else:
        print(json.dumps(ACTIONS[name](*arguments)))
