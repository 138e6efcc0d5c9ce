"""Seeds as text and as sorted ranges: a short text can stand for millions of seeds. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pipeline.errors import ConfigError

_SEED = re.compile("[0-9]{1,19}")
_MAX_SEEDS = 100_000_000


def parse_seeds(text: str) -> tuple[range, ...]:
    """Parse `A-B` (inclusive), `A`, or a comma list of both into sorted ranges that do not overlap.

    Raises:
        ConfigError: the text is something else, or too many seeds.
    """
    ranges = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not _SEED.fullmatch(first) or (dash and not (_SEED.fullmatch(last) and int(last) >= int(first))):
            raise ConfigError(f"--seeds {text}: write A-B (inclusive), A, or a comma list such as 0-99,500")
        ranges.append(range(int(first), int(last or first) + 1))
    seeds = merged(ranges)
    if seeds[-1].stop > 1 << 62:
        raise ConfigError(f"--seeds {text}: seeds go up to 2^62")
    if sum(map(len, seeds)) > _MAX_SEEDS:
        raise ConfigError(f"--seeds {text}: more than {_MAX_SEEDS:,} in one command: give fewer")
    return seeds


def seeds_text(seeds: list[int]) -> str:
    """The inverse of `parse_seeds`, for ascending seeds."""
    return ranges_text(merged(range(seed, seed + 1) for seed in seeds))


def ranges_text(seeds: Iterable[range]) -> str:
    """Sorted ranges as `parse_seeds` reads them."""
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in seeds)


def merged(ranges: Iterable[range]) -> tuple[range, ...]:
    """The union of ranges that are not empty, as sorted ranges that do not overlap or touch."""
    union: list[range] = []
    for part in sorted(ranges, key=lambda part: part.start):
        if union and part.start <= union[-1].stop:
            union[-1] = range(union[-1].start, max(union[-1].stop, part.stop))
        else:
            union.append(part)
    return tuple(union)


def without(seeds: Iterable[range], taken: Sequence[range]) -> tuple[range, ...]:
    """The seeds that are not among `taken`; both are sorted ranges that do not overlap."""
    left, i = [], 0
    for part in seeds:
        start = part.start
        while i < len(taken) and taken[i].start < part.stop:
            left.append(range(start, taken[i].start))
            start = max(start, taken[i].stop)
            if taken[i].stop > part.stop:
                break  # it may also hold seeds of the next range
            i += 1
        left.append(range(start, part.stop))
    return tuple(part for part in left if part)


def within(seeds: tuple[range, ...], first: int, last: int) -> list[int]:
    """The seeds in [first, last)."""
    return [seed for part in seeds for seed in range(max(part.start, first), min(part.stop, last))]


def count_within(seeds: Iterable[range], first: int, last: int) -> int:
    """The number of seeds in [first, last)."""
    return sum(len(range(max(part.start, first), min(part.stop, last))) for part in seeds)
