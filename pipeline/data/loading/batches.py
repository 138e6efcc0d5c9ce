"""Shard set + order → this rank's uint8 batches, through a torch DataLoader and a webdataset pipeline.

B, C, H, W: images, channels, height, width. The constructor takes the number of samples that the run has consumed; no
loader state is saved, so it does not matter what the workers have prefetched.

Stop signals do not reach the workers, because the rank needs batches until it has stopped. They end when the rank
closes them or is gone. They are never forked from the rank itself: no fsspec instance is used after a fork.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from webdataset import DataPipeline

from pipeline.data.images.preprocess import Rejected
from pipeline.data.loading.order import Item, Order, Place, announced, rank_lanes
from pipeline.data.loading.shard_reader import ShardReader, announced_ahead, damage_message
from pipeline.data.shards.index_tars import decoder
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError, PipelineError
from pipeline.keyed_random import Use, integers
from pipeline.processes.forkserver import exit_with_parent, start_worker_server
from pipeline.processes.pool import exit_cause
from pipeline.storage import files

_GRACE_S = 2.0
_PREFETCH_STEPS = 2  # steps that a worker is ahead of the rank
_DRAWN_STEPS = 32  # flips are drawn for so many steps at a time; no effect on their values


@dataclass(frozen=True)
class Batch:
    """Images with their labels and positions."""

    images: Tensor
    """uint8, (B, C, H, W)."""
    labels: Tensor
    """int64, (B,); -1 for none."""
    positions: Tensor
    """int64, (B,): positions in the endless order; noise is keyed by them."""


_Encoded = tuple[int, Place, bytes, int]
"""A sample as read: position, place, image file, label."""

_Decoded = tuple[int, int, NDArray[np.uint8]]
"""Position, label, image (H, W, C), which may be a view."""


class _Chunk(NamedTuple):
    """One worker's part of a step, without the images, which it has written into the step's slot."""

    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    retries: int  # of reading, by the process that made it, so far


class Batches:
    """An endless iterator over this rank's share of each step's global batch, lane after lane; a context manager.

    The batches are the same for any number of workers: each worker reads some of the rank's lanes, and the parts are
    joined in the order of the lanes. `next` raises DataError if a sample is missing, damaged or undecodable, or a
    worker has died; samples are never skipped.

    Args:
        shards: the data.
        order: the order of its samples, made from `shards.shard_samples`.
        rank: of this process.
        world_size: number of ranks; divides `order.lanes`.
        first_sample: samples consumed by all ranks before the first batch; a multiple of `order.lanes`.
        workers: loader processes; 0 reads in this process. No more are started than the rank has lanes.
        flip: flip half of the images left to right, keyed by (seed, position).
        pin: put the images into page-locked memory.

    Raises:
        ConfigError: the ranks cannot share the lanes.
        DataError: there is not enough shared memory for the workers.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        *,
        rank: int,
        world_size: int,
        first_sample: int,
        workers: int,
        flip: bool,
        pin: bool = False,
    ) -> None:
        lanes = rank_lanes(order.lanes, rank, world_size)
        start, rest = divmod(first_sample, order.lanes)
        if rest:
            raise ValueError(f"first_sample={first_sample} is not a multiple of {order.lanes} lanes")
        workers = min(workers, len(lanes))
        nth = start + np.arange(order.global_batch // order.lanes)
        self._positions = torch.from_numpy((np.array(lanes)[:, None] + order.lanes * nth).ravel())
        self._global_batch = order.global_batch
        self._retries = [0] * max(workers, 1)
        self._pin = pin
        # A slot is reused `_PREFETCH_STEPS + 1` steps later. torch asks a worker for that later step when the rank
        # fetches the next step, and by then the rank has copied this slot: images are never overwritten too early.
        slots = torch.empty(
            (_PREFETCH_STEPS + 1, len(self._positions), shards.channels, *shards.size), dtype=torch.uint8
        )
        if workers:
            try:
                slots.share_memory_()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise DataError(
                    f"the loader's batches take {-(-slots.nbytes >> 20)} MiB of shared memory, and there is less: set "
                    "data.workers=0, which needs none, or enlarge /dev/shm (in containers: --shm-size)"
                ) from error
        self._slots = cycle(slots)
        pipeline = DataPipeline(
            partial(_read_lanes, shards, order, lanes, start),
            partial(_decode, shards),
            partial(_flip, order, lanes, start) if flip else None,
            partial(_stack, slots, lanes),
            _errors_as_items,
        )
        self._iterator = _start(pipeline, workers)
        self._workers: list[BaseProcess] = getattr(self._iterator, "_workers", [])
        # Also if `close` is never called: at exit Python would wait for ever for processes that ignore SIGTERM.
        self._reap = weakref.finalize(self, _kill, self._workers)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        try:
            chunks = [self._next_chunk() for _ in self._retries]
        except PipelineError:
            self.close()
            raise
        positions = torch.from_numpy(np.concatenate([chunk.positions for chunk in chunks]))
        assert torch.equal(positions, self._positions), "the loader gave other samples than the order says"
        self._positions = positions + self._global_batch
        self._retries = [chunk.retries for chunk in chunks]
        slot = next(self._slots)
        images = torch.empty(slot.shape, dtype=torch.uint8, pin_memory=self._pin).copy_(slot)
        return Batch(images, torch.from_numpy(np.concatenate([chunk.labels for chunk in chunks])), positions)

    @property
    def io_retries(self) -> int:
        """How often this process and, up to their last batches, its workers have repeated a read."""
        return files.retries() + (sum(self._retries) if self._workers else 0)

    def _next_chunk(self) -> _Chunk:
        if self._iterator is None:
            raise ValueError("these batches are closed")
        try:
            chunk = next(self._iterator)
        except (RuntimeError, OSError, EOFError):
            dead = wait([worker.sentinel for worker in self._workers], timeout=1.0)
            for worker in self._workers:
                if worker.sentinel in dead:
                    raise DataError(_death_message(worker)) from None
            raise
        if isinstance(chunk, PipelineError):
            raise chunk
        return chunk

    def close(self) -> None:
        """End the workers; kill those that do not return from a read soon. A second call does nothing."""
        if self._iterator is not None:
            killer = threading.Timer(_GRACE_S, _kill, [self._workers])
            killer.start()
            self._iterator = None  # the only way to make torch end its workers
            killer.cancel()
            self._reap()  # kills the workers that are left if the traceback of an error still holds the iterator
            for worker in self._workers:
                worker.join(_GRACE_S)

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_all(shards: ShardSet, limit: int | None = None, share: tuple[int, int] = (0, 1)) -> Batch:
    """Read all samples in the order of the index, or `limit` spread evenly over it; for sets that fit into memory.

    Args:
        shards: the data.
        limit: samples to read, at most. Sets are sorted by source: the first samples would be of the first classes.
        share: (rank, ranks): the part of these samples to read.

    Returns:
        The samples, with positions from 0 over all parts.

    Raises:
        DataError: a sample is missing, damaged or undecodable.
    """
    count = shards.samples if limit is None else min(limit, shards.samples)
    rank, ranks = share
    chosen = range(count * rank // ranks, count * (rank + 1) // ranks)
    batch = read_range(shards, [i * shards.samples // count for i in chosen])
    return replace(batch, positions=torch.arange(chosen.start, chosen.stop))


def read_range(shards: ShardSet, numbers: Sequence[int]) -> Batch:
    """Read the samples with these numbers in the order of the index; their positions are the numbers.

    Raises:
        DataError: a sample is missing, damaged or undecodable.
    """
    with closing(ShardReader(shards)) as reader:
        encoded = ((i, place, *reader.read(place)) for i in numbers for place in [_place(shards, i)])
        images = torch.empty((len(numbers), shards.channels, *shards.size), dtype=torch.uint8)
        chunk = _stacked(images.numpy(), _decode(shards, encoded))
    return Batch(images, torch.from_numpy(chunk.labels), torch.from_numpy(chunk.positions))


def _place(shards: ShardSet, number: int) -> Place:
    """The place of the sample with this number in the index."""
    ends = shards.shards.ends
    shard = int(np.searchsorted(ends, number, side="right"))
    return Place(shard, number - int(ends[shard - 1] if shard else 0))


def _own_lanes(lanes: range) -> range:
    """The lanes of the rank that this loader process reads."""
    info = get_worker_info()
    if info is None:
        return lanes
    return lanes[len(lanes) * info.id // info.num_workers : len(lanes) * (info.id + 1) // info.num_workers]


def _read_lanes(shards: ShardSet, order: Order, lanes: range, start: int) -> Iterator[_Encoded]:
    """Stage 1: lane after lane, G/V samples of each, step by step."""
    streams = []
    for lane in _own_lanes(lanes):
        reader = ShardReader(shards)
        items = announced(order.lane_stream(lane, start), reader.announce, announced_ahead(lane))
        streams.append(_read_lane(reader, chain([next(items)], items)))  # all lanes open their first shards together
    while True:
        for stream in streams:
            yield from islice(stream, order.global_batch // order.lanes)


def _read_lane(reader: ShardReader, items: Iterable[Item]) -> Iterator[_Encoded]:
    held: dict[Place, tuple[bytes, int]] = {}
    with closing(reader):
        for position, place, reads in items:
            for ahead in reads:
                held[ahead] = reader.read(ahead)
            yield position, place, *held.pop(place)


def _decode(shards: ShardSet, samples: Iterable[_Encoded]) -> Iterator[_Decoded]:
    """Stage 2."""
    shape, decode = (*shards.size, shards.channels), decoder(shards)
    for position, place, data, label in samples:
        try:
            image = decode(data)
        except Rejected as error:
            raise DataError(damage_message(shards, place, "is no image")) from error
        if image.shape != shape:
            raise DataError(damage_message(shards, place, f"is {image.shape}, the index says {shape}"))
        yield position, label, image


def _flip(order: Order, lanes: range, start: int, samples: Iterable[_Decoded]) -> Iterator[_Decoded]:
    """Stage 3: each image left to right with probability 1/2, by (seed, position)."""
    of_step = order.global_batch // order.lanes
    nth = start + np.arange(_DRAWN_STEPS * of_step).reshape(-1, 1, of_step)
    positions = (np.array(_own_lanes(lanes))[:, None] + order.lanes * nth).ravel()
    while True:
        flipped = integers(order.seed, torch.from_numpy(positions), Use.FLIP, 2).tolist()
        for is_flipped, (position, label, image) in zip(flipped, samples):
            yield position, label, image[:, ::-1] if is_flipped else image
        positions += _DRAWN_STEPS * order.global_batch


def _stack(slots: Tensor, lanes: range, samples: Iterable[_Decoded]) -> Iterator[_Chunk]:
    """Stage 4: this process's samples of a step, side by side in its rows of the step's slot, (B, C, H, W)."""
    own, of_lane = _own_lanes(lanes), slots.shape[1] // len(lanes)
    rows = slice(of_lane * (own.start - lanes.start), of_lane * (own.stop - lanes.start))
    samples = iter(samples)
    for slot in cycle(slots.numpy()):
        yield _stacked(slot[rows], samples)


def _stacked(images: NDArray[np.uint8], samples: Iterable[_Decoded]) -> _Chunk:
    """Fill `images`, (B, C, H, W), with the next samples."""
    labels, positions = np.empty((2, len(images)), dtype=np.int64)
    for i, (position, label, image) in enumerate(islice(samples, len(images))):
        images[i], labels[i], positions[i] = image.transpose(2, 0, 1), label, position
    return _Chunk(labels, positions, files.retries())


def _errors_as_items(chunks: Iterable[_Chunk]) -> Iterator[_Chunk | PipelineError]:
    """Last stage: yield an exception as an item, as torch would put its one-line message into a traceback."""
    try:
        yield from chunks
    except PipelineError as error:
        yield error


def _start(pipeline: DataPipeline, workers: int) -> Iterator[_Chunk | PipelineError] | None:
    """Start the pipeline in so many processes, which prefetch from now on."""
    if workers:
        start_worker_server()
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
    loader = DataLoader(
        pipeline, batch_size=None, collate_fn=_as_is, num_workers=workers,
        prefetch_factor=_PREFETCH_STEPS if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_worker_started,
        generator=torch.Generator(),  # else torch draws a seed for the workers from the global generator
    )  # fmt: skip
    return iter(loader)


def _as_is(item: Any) -> Any:
    return item


def _worker_started(_worker: int) -> None:
    exit_with_parent()


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _death_message(worker: BaseProcess) -> str:
    worker.join()
    return (
        f"loader process {worker.pid} died ({exit_cause(worker.exitcode or 0)}): most often memory or shared memory "
        "has run out; lower data.workers (0 needs no shared memory) or data.window, or raise the limit"
    )
