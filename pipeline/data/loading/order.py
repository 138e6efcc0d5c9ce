"""position → (shard, row): which sample comes when, as a function of (seed, shard sizes, G, V, B) alone.

N samples, global batch G, V lanes (V | G), window B. Position q = 0, 1, 2, … never ends: step s takes [sG, (s+1)G), the
epoch of q is q div N and its lane q mod V, so a lane's n-th sample has q = lane + V·n. Batches cross epoch ends, and
no sample is padded, dropped or repeated. In an epoch the shards are permuted and laid end to end; each lane has one
contiguous slice, and gives its samples i in the order of i + B·u_i, u uniform. So a reader goes through the slice once,
forwards, and always holds fewer than B samples. Only `rank_lanes` depends on ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import ConfigError, DataError
from pipeline.keyed_random import Use, seed_from, uniforms

_DRAWN_TOGETHER = 1024  # shuffle keys of a lane are drawn so many at a time; no effect on the order
_DRAWN_AT_ONCE = 1 << 16


class Place(NamedTuple):
    """Where a sample lies: row `row` of shard number `shard`."""

    shard: int
    row: int


class Item(NamedTuple):
    """The next sample of a lane."""

    position: int
    """Of the sample in the endless order."""
    place: Place
    reads: list[Place]
    """Places to read, in this order, before `place` can be given; empty if `place` was read already."""


@dataclass(frozen=True)
class Order:
    """The order of one run's data; every number in it is frozen with the run.

    Raises:
        ConfigError: `lanes` does not divide `global_batch`, or `window` is not positive.
        DataError: there is no sample.
    """

    seed: int
    shard_samples: Sequence[int]
    global_batch: int
    lanes: int
    window: int

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.global_batch % self.lanes:
            raise ConfigError(
                f"data.lanes={self.lanes} does not divide train.global_batch={self.global_batch}: "
                f"set data.lanes to a divisor, such as {default_lanes(self.global_batch)}"
            )
        if self.window < 1:
            raise ConfigError(f"data.window={self.window} must be at least 1: 1 keeps the order of the shards")
        if self.samples == 0:
            raise DataError("the shard set holds no sample: shard a source with at least one readable image")

    @cached_property
    def samples(self) -> int:
        """N, the samples in an epoch."""
        return int(np.asarray(self.shard_samples, dtype=np.int64).sum())

    def lane_stream(self, lane: int, start: int) -> Iterator[Item]:
        """Yield a lane's samples from its `start`-th on, without end.

        To start costs O(window) for any `start`. A reader that follows `Item.reads` holds fewer than `window` samples
        and reads each once an epoch. After a resume it reads only the held samples again: fewer than `window`.

        Args:
            lane: 0 ≤ lane < V.
            start: samples of this lane already given, in all epochs: samples consumed div V.
        """
        while True:
            epoch = (lane + self.lanes * start) // self.samples
            before = self._given(epoch * self.samples)
            lengths = self._given((epoch + 1) * self.samples) - before
            key, done = seed_from(self.seed, epoch, lane), start - int(before[lane])
            first, layout = int(lengths[:lane].sum()), _layout(self.seed, epoch, self.shard_samples)
            unread = np.empty(0, dtype=np.int64)
            for new, gives in shuffled(key, int(lengths[lane]), self.window, done):
                unread = np.append(unread, new)
                places, read = layout.places(first + unread), 0
                needs = np.maximum.accumulate(np.searchsorted(unread, gives, side="right"))
                for place, needed in zip(layout.places(first + gives), needs.tolist()):
                    yield Item(lane + self.lanes * start, place, places[read:needed])
                    start, read = start + 1, needed
                unread = unread[read:]

    def _given(self, position: int) -> NDArray[np.int64]:
        """How many positions below this one each lane has, (V,)."""
        return (position + self.lanes - 1 - np.arange(self.lanes)) // self.lanes


@dataclass(frozen=True)
class _Layout:
    """Shards laid end to end: their numbers, and the numbers of samples at their ends, (S,) each."""

    shards: NDArray[np.int32]
    ends: NDArray[np.int64]

    def places(self, index: NDArray[np.int64]) -> list[Place]:
        """The places of the samples with these indices in the layout."""
        slot = np.searchsorted(self.ends, index, side="right")  # passes over empty shards
        starts = np.where(slot > 0, self.ends[slot - 1], 0)
        return list(map(Place, self.shards[slot].tolist(), (index - starts).tolist()))


@lru_cache(maxsize=2)  # the lanes of a process begin an epoch together
def _layout(seed: int, epoch: int, shard_samples: Sequence[int]) -> _Layout:
    """The permuted shards of an epoch."""
    keys = _uniforms(seed_from(seed, epoch), Use.SHARD_ORDER, 0, len(shard_samples))
    shards = _argsort(keys).astype(np.int32)
    return _Layout(shards, np.cumsum(np.asarray(shard_samples)[shards], dtype=np.int64))


def shuffled(key: int, length: int, window: int, start: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield 0, 1 … `length` - 1 in the order of i + window·u_i, from place `start` on, in pieces of bounded size.

    The key of i lies in [i, i + window). So the indices with keys below x are among the i < x, and those i < x with
    larger keys are above x - window. Memory and the cost to start anywhere are therefore O(window), for any `length`.

    Args:
        key: u is drawn from it.
        length: number of indices.
        window: every index moves by fewer places.
        start: number of indices already given, 0 ≤ start < length.

    Yields:
        New indices to read, ascending; and the indices to give next, all of which were read by then.
    """
    width = max(window, _DRAWN_TOGETHER)
    top = start // width * width
    index, keys = _draw(key, max(top - width, 0), top, window)
    index, keys = index[keys >= top], keys[keys >= top]
    skip = start - (top - len(index))  # of the places from here on, those that are already given
    unread = index
    while top < length or len(index):
        drawn, drawn_keys = _draw(key, top, min(top + width, length), window)
        index, keys, unread = np.append(index, drawn), np.append(keys, drawn_keys), np.append(unread, drawn)
        top += width
        now = keys < top
        gives = index[now][_argsort(keys[now])]
        index, keys = index[~now], keys[~now]
        if skip:
            unread = np.setdiff1d(unread, gives[:skip])
        if skip < len(gives):
            yield unread, gives[skip:]
            unread = unread[:0]
        skip = max(skip - len(gives), 0)


def _draw(key: int, start: int, end: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Indices [start, end) and their shuffle keys; none if `end` is not above `start`."""
    index = np.arange(start, max(end, start), dtype=np.int64)
    return index, index + window * _uniforms(key, Use.LANE_ORDER, start, len(index))


def _uniforms(key: int, use: Use, start: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) from `start` on, drawn in pieces: a draw holds ten integers a number."""
    drawn = np.empty(count)
    for first in range(0, count, _DRAWN_AT_ONCE):
        last = min(first + _DRAWN_AT_ONCE, count)
        drawn[first:last] = uniforms(key, torch.arange(start + first, start + last), use).numpy()
    return drawn


def _argsort(keys: NDArray[np.float64]) -> NDArray[np.int64]:
    """A stable sort, so that every version of numpy orders equal keys in the same way."""
    return np.argsort(keys, kind="stable")


def announced(items: Iterator[Item], announce: Callable[[Place], None], depth: int) -> Iterator[Item]:
    """The items of a lane; the first place of each shard is announced up to `depth` items before it is read.

    At the start nothing is announced but the first place; two items are taken for each one given until `depth` is
    reached, so that what is needed later does not compete with the first batch.
    """
    ahead, shard, taken = deque[Item](), -1, 1
    while True:
        for item in islice(items, taken):
            for place in item.reads:
                if place.shard != shard:
                    announce(place)
                    shard = place.shard
            ahead.append(item)
        yield ahead.popleft()
        taken = 2 if len(ahead) < depth else 1


def default_lanes(global_batch: int) -> int:
    """The largest divisor of the global batch up to 64."""
    return max(lanes for lanes in range(1, 65) if global_batch % lanes == 0)


def allowed_worlds(lanes: int) -> list[int]:
    """The numbers of ranks that can share these lanes, ascending: the divisors of `lanes`."""
    return [ranks for ranks in range(1, lanes + 1) if lanes % ranks == 0]


def check_world(lanes: int, world_size: int) -> None:
    """Check that the ranks can share the lanes equally.

    Raises:
        ConfigError: they cannot; the message lists the possible numbers of ranks.
    """
    if world_size < 1 or lanes % world_size:
        raise ConfigError(
            f"{world_size} ranks cannot share data.lanes={lanes}: run with "
            f"{', '.join(map(str, allowed_worlds(lanes)))} ranks, or start a new run with data.lanes (a divisor of "
            f"train.global_batch) a multiple of {world_size}"
        )


def rank_lanes(lanes: int, rank: int, world_size: int) -> range:
    """The lanes of one rank: [rV/W, (r+1)V/W).

    Raises:
        ConfigError: as from `check_world`.
    """
    check_world(lanes, world_size)
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
