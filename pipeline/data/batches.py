"""Shard set + order → this rank's uint8 batches, through a torch DataLoader and a webdataset pipeline.

B, C, H, W: images, channels, height, width. Where the run stands goes into the constructor, as the number of samples
consumed; there is no loader state to save, so what the workers have read ahead cannot matter.

Workers outlive every stop signal, because the rank needs its batches until it has stopped, and end when it closes them
or is gone. They are never forked from the rank itself: no fsspec instance is used after a fork.
"""

from __future__ import annotations

import signal
import threading
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from webdataset import DataPipeline

from pipeline import storage
from pipeline.data.foreign import decoder
from pipeline.data.images import Rejected
from pipeline.data.order import Order, Place, rank_lanes
from pipeline.data.shardset import ShardSet
from pipeline.data.workers import exit_with_parent, start_worker_server
from pipeline.errors import DataError, PipelineError
from pipeline.noise import Use, integers

_GRACE_S = 2.0
_AHEAD = 2  # steps that a worker is ahead of the rank
_DRAWN_STEPS = 32  # flips are drawn for so many steps at a time; no effect on what they are


@dataclass(frozen=True)
class Batch:
    """Images with their labels and positions."""

    images: Tensor
    """uint8, (B, C, H, W)."""
    labels: Tensor
    """int64, (B,); -1 for none."""
    positions: Tensor
    """int64, (B,): places in the endless order, which noise is keyed by."""


_Encoded = tuple[int, Place, bytes, int]
"""A sample as read: position, place, image file, label."""

_Decoded = tuple[int, int, NDArray[np.uint8]]
"""Position, label, image (H, W, C), which may be a view."""


class _Chunk(NamedTuple):
    """One worker's part of a step, without the images: those it has put into the step's slot."""

    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    retries: int  # of reading, by the process that made it, so far


class Batches:
    """This rank's share of each step's global batch, lane after lane, without end: iterator and context manager.

    The batches are the same for any number of workers: each worker reads some of the rank's lanes, and the parts are
    joined in the order of the lanes. `next` raises DataError where a sample is missing, damaged or undecodable, or a
    worker died; samples are never skipped.

    Args:
        shards: the data.
        order: its order, made of `shards.shard_samples`.
        rank: of this process.
        world_size: number of ranks; divides `order.lanes`.
        first_sample: samples consumed by all ranks before the first batch; a multiple of `order.lanes`.
        workers: loader processes; 0 reads in this process. No more are started than the rank has lanes.
        flip: flip half of the images left to right, keyed by (seed, position).
        pin: give the images in page-locked memory.

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
        # A step's slot is used again `_AHEAD + 1` steps later. torch asks a worker for that step when the rank fetches
        # the next one, and by then it has copied this one: a step's images are never overwritten before they are taken.
        slots = torch.empty((_AHEAD + 1, len(self._positions), shards.channels, *shards.size), dtype=torch.uint8)
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
        # Without `close` too: at exit Python would wait for ever for processes that ignore SIGTERM.
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
        """How often reading had to be repeated, by this process and, as far as their batches tell, its workers."""
        return storage.retries() + (sum(self._retries) if self._workers else 0)

    def _next_chunk(self) -> _Chunk:
        if self._iterator is None:
            raise ValueError("these batches are closed")
        try:
            chunk = next(self._iterator)
        except (RuntimeError, OSError, EOFError):
            dead = wait([worker.sentinel for worker in self._workers], timeout=1.0)
            for worker in self._workers:
                if worker.sentinel in dead:
                    raise DataError(_obituary(worker)) from None
            raise
        if isinstance(chunk, PipelineError):
            raise chunk
        return chunk

    def close(self) -> None:
        """End the workers, the hard way if they do not come back from a read soon. A second call does nothing."""
        if self._iterator is not None:
            killer = threading.Timer(_GRACE_S, _kill, [self._workers])
            killer.start()
            self._iterator = None  # torch ends its workers when their iterator goes, and has no other way
            killer.cancel()
            self._reap()  # those that are left after an error, whose traceback holds the iterator
            for worker in self._workers:
                worker.join(_GRACE_S)

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_all(shards: ShardSet, limit: int | None = None, share: tuple[int, int] = (0, 1)) -> Batch:
    """All samples in the order of the index, or `limit` spread evenly over it; for sets that fit into memory.

    Args:
        shards: the data.
        limit: at most so many. Sets are sorted by source, so the first ones would be of the first classes.
        share: (rank, ranks): which part of them to read.

    Returns:
        Positions count from 0 over all parts.

    Raises:
        DataError: a sample is missing, damaged or undecodable.
    """
    count = shards.samples if limit is None else min(limit, shards.samples)
    rank, ranks = share
    chosen = range(count * rank // ranks, count * (rank + 1) // ranks)
    ends = np.cumsum(shards.shard_samples)
    with closing(_Reader(shards)) as reader:
        places = ((i, _place(ends, i * shards.samples // count)) for i in chosen)
        encoded = ((i, place, *reader.read(place)) for i, place in places)
        images = torch.empty((len(chosen), shards.channels, *shards.size), dtype=torch.uint8)
        chunk = _stacked(images.numpy(), _decode(shards, encoded))
    return Batch(images, torch.from_numpy(chunk.labels), torch.from_numpy(chunk.positions))


def _place(ends: NDArray[np.int64], number: int) -> Place:
    """Where the sample with this number in the index lies, given the numbers at which the shards end."""
    shard = int(np.searchsorted(ends, number, side="right"))
    return Place(shard, number - int(ends[shard - 1] if shard else 0))


class _Reader:
    """Cuts samples out of the shards; forwards, so that each shard is opened once and streamed."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._shard = -1
        self._rows: NDArray[np.void]
        self._file: BinaryIO | None = None
        self._at = 0

    def read(self, place: Place) -> tuple[bytes, int]:
        """Image file and label of a sample.

        Raises:
            DataError: missing, cut short or damaged.
        """
        shard, row = place
        if shard != self._shard:
            self.close()
            self._rows = self._shards.sidecar(shard)
            self._shard = shard
        offset, length, crc32, image_offset, image_length, label = self._rows[row].item()
        try:
            if self._file is None:
                self._file = storage.open_read(self._shards.tar(shard), offset, self._shards.shards[shard].bytes)
            elif offset != self._at:
                self._file.seek(offset)
            data = self._file.read(length)
        except OSError as error:
            raise DataError(_damage(self._shards, place, f"cannot be read ({error})")) from error
        self._at = offset + length
        if len(data) < length:
            raise DataError(_damage(self._shards, place, "is missing: the file is cut short"))
        if zlib.crc32(data) != crc32:
            raise DataError(_damage(self._shards, place, "does not have the crc32 of the sidecar"))
        return data[image_offset : image_offset + image_length], label

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _damage(shards: ShardSet, place: Place, what: str) -> str:
    return f"{shards.tar(place.shard)}: the sample in row {place.row} {what}; `ddpm verify {shards.url}` names all such"


def _own_lanes(lanes: range) -> range:
    """The part of a rank's lanes that this loader process reads."""
    info = get_worker_info()
    if info is None:
        return lanes
    return lanes[len(lanes) * info.id // info.num_workers : len(lanes) * (info.id + 1) // info.num_workers]


def _read_lanes(shards: ShardSet, order: Order, lanes: range, start: int) -> Iterator[_Encoded]:
    """Stage 1: lane after lane, G/V samples of each, step by step."""
    streams = [_read_lane(shards, order, lane, start) for lane in _own_lanes(lanes)]
    while True:
        for stream in streams:
            yield from islice(stream, order.global_batch // order.lanes)


def _read_lane(shards: ShardSet, order: Order, lane: int, start: int) -> Iterator[_Encoded]:
    held: dict[Place, tuple[bytes, int]] = {}
    with closing(_Reader(shards)) as reader:
        for position, place, reads in order.lane_stream(lane, start):
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
            raise DataError(_damage(shards, place, "is no picture")) from error
        if image.shape != shape:
            raise DataError(_damage(shards, place, f"is {image.shape}, the index says {shape}"))
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
    return _Chunk(labels, positions, storage.retries())


def _errors_as_items(chunks: Iterable[_Chunk]) -> Iterator[_Chunk | PipelineError]:
    """Last stage: torch would wrap a worker's exception into its traceback, and the one line would be lost."""
    try:
        yield from chunks
    except PipelineError as error:
        yield error


def _start(pipeline: DataPipeline, workers: int) -> Iterator[_Chunk | PipelineError] | None:
    """Set the pipeline going in so many processes, which read ahead from now on."""
    if workers:
        start_worker_server()
    loader = DataLoader(
        pipeline,
        batch_size=None,
        collate_fn=_as_is,
        generator=torch.Generator(),  # else torch draws a seed for the workers, which need none, from the global one
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_worker_started,
    )
    return iter(loader)


def _as_is(item: Any) -> Any:
    return item


def _worker_started(_worker: int) -> None:
    exit_with_parent()


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _obituary(worker: BaseProcess) -> str:
    worker.join()
    code = worker.exitcode or 0
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return (
        f"loader process {worker.pid} died ({cause}): most often memory or shared memory has run out; "
        "lower data.workers (0 needs no shared memory) or data.window, or raise the limit"
    )
