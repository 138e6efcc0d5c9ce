"""Seeds as text and as sorted ranges: a short text can stand for millions of seeds. Pure."""

from __future__ import annotations

import re

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
    merged: list[range] = []
    for part in sorted(ranges, key=lambda part: part.start):
        if merged and part.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, part.stop))
        else:
            merged.append(part)
    if merged[-1].stop > 1 << 62:
        raise ConfigError(f"--seeds {text}: seeds go up to 2^62")
    if sum(map(len, merged)) > _MAX_SEEDS:
        raise ConfigError(f"--seeds {text}: more than {_MAX_SEEDS:,} at once: ask for fewer")
    return tuple(merged)


def seeds_text(seeds: list[int]) -> str:
    """The inverse of `parse_seeds`, for ascending seeds."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)


def within(seeds: tuple[range, ...], first: int, last: int) -> list[int]:
    """The seeds in [first, last)."""
    return [seed for part in seeds for seed in range(max(part.start, first), min(part.stop, last))]
