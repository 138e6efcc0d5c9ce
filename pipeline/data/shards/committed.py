"""How much of a sample set is drawn, by all processes together: they share nothing but the records in its directory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TypeVar

from pipeline.data.shards import sample_set
from pipeline.data.shards.sample_set import SampleSet
from pipeline.data.shards.seeds import count_within
from pipeline.errors import DataError

_SHARE_OF_TIME = 0.05

_T = TypeVar("_T")


class CommittedSeeds:
    """Counts the seeds asked for that are committed, or drawn by this process.

    A look at the directory takes one listing of it, and one read for each shard that was not complete at the last look
    and has a record.

    Args:
        target: the set.
        asked: sorted ranges.
        known: number → committed seeds of each shard that has a record, from `SampleSet.check`.
        every_s: shortest time in seconds between two looks; longer if looks take long.
    """

    def __init__(
        self, target: SampleSet, asked: tuple[range, ...], known: Mapping[int, Iterable[range]], every_s: float = 10.0
    ) -> None:
        self._url, self._every_s, self._size = target.url, every_s, target.shard_samples
        self._asked = {i: tuple(self._in_shard(asked, i)) for i in target.numbers(asked)}
        self._counts: dict[int, int] = {}
        self._sum = self._drawn = 0
        self._drawing = -1
        for i, seeds in known.items():
            self._set(i, seeds)
        self._next_look = time.monotonic() + every_s

    @property
    def count(self) -> int:
        """Seeds asked for that are committed, and those that this process has drawn in its present shard."""
        return self._sum + max(0, self._drawn - self._counts.get(self._drawing, 0))

    def note(self, i: int, seeds: Iterable[int]) -> None:
        """Note that these are the committed seeds of shard i."""
        self._set(i, (range(seed, seed + 1) for seed in seeds))

    def counted(self, i: int, images: Iterable[tuple[int, _T]]) -> Iterator[tuple[int, _T]]:
        """The same (seed, image) of shard i; each one counts before it is committed."""
        self._drawing, self._drawn = i, 0
        for seed, image in images:
            self._drawn += any(seed in part for part in self._asked[i])
            yield seed, image

    def look(self) -> None:
        """Take in what other processes have committed, if enough time has passed since the last look."""
        started = time.monotonic()
        if started < self._next_look:
            return
        with suppress(DataError, OSError):  # it is only about what is shown
            for i in sample_set.recorded(self._url):
                if i in self._asked and self._counts.get(i, 0) < sum(map(len, self._asked[i])):
                    self._set(i, sample_set.recorded_seeds(self._url, i))
        now = time.monotonic()
        self._next_look = now + max(self._every_s, (now - started) / _SHARE_OF_TIME)

    def _in_shard(self, seeds: Iterable[range], i: int) -> Iterator[range]:
        first, last = i * self._size, (i + 1) * self._size
        parts = (range(max(part.start, first), min(part.stop, last)) for part in seeds)
        return (part for part in parts if part)

    def _set(self, i: int, seeds: Iterable[range]) -> None:
        if i in self._asked:
            count = sum(count_within(self._asked[i], part.start, part.stop) for part in seeds)
            self._sum += count - self._counts.get(i, 0)
            self._counts[i] = count
