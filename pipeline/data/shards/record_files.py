"""The records of many shards of one set: names and sizes from one listing of the set, then 32 records at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.data.shards.record import ShardRecord
from pipeline.errors import DataError
from pipeline.storage import files

_THREADS = 32
_T = TypeVar("_T")
_R = TypeVar("_R")


def are_listed(stem: str, sizes: Mapping[str, int]) -> bool:
    """Whether a listing, name → bytes, has the three files of a shard."""
    return all(f"{stem}.{ending}" in sizes for ending in ("tar", "npy", "json"))


def read(url: str, stems: Iterable[str], sizes: Mapping[str, int]) -> dict[str, ShardRecord]:
    """The records of committed shards, stem → record; a shard is left out if its files are not all there and whole.

    Args:
        url: the set.
        stems: NAME-000000 of the shards.
        sizes: the listing of the set, name → bytes.

    Raises:
        DataError: the store cannot be reached.
    """

    def one(stem: str) -> ShardRecord | None:
        name = f"{stem}.json"
        try:
            record = ShardRecord.parse(files.read_json(files.join(url, name), sizes[name]), name)
        except (FileNotFoundError, DataError):
            return None
        return record if record.bytes == sizes[f"{stem}.tar"] else None

    there = [stem for stem in stems if are_listed(stem, sizes)]
    return {stem: record for stem, record in zip(there, together(one, there)) if record}


def together(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """The results of a function that waits for a store, in order, 32 at a time."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, items))
