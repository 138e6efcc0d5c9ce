"""Name the rank for which the others wait, from two readings of the heartbeats of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

PHASES = ("starting", "report", "validation", "preview", "evaluation", "saving", "data", "gradient", "update", "ended")
"""In the order of a step. What follows an update counts as the next step's."""
_COLLECTIVE = ("gradient", "update")
"""Phases in which ranks wait for each other."""
_LISTED = 16
"""Ranks or hosts that a message names, at most."""


@dataclass(frozen=True)
class Beat:
    """A heartbeat of a rank."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    beats: int
    """Counter of the rank's heartbeats."""
    silent: bool = False
    """Whether the rank that writes for its node has seen no new heartbeat for a while."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def diagnose(before: Mapping[int, Beat], now: Mapping[int, Beat], own: Beat, size: int) -> str:
    """Name the rank that is silent, missing or behind; the network, if there is none.

    Args:
        before: rank → its heartbeat at the first reading.
        now: at the second one, after a time in which each node with a living rank has written.
        own: the present heartbeat of the rank that asks.
        size: number of ranks.
    """
    now = dict(sorted({**before, **now, own.rank: own}.items()))
    silent = [beat for rank, beat in now.items() if rank != own.rank and (beat.silent or beat == before.get(rank))]
    missing = [rank for rank in range(size) if rank not in now]
    if silent or missing:
        lines = [f"{beat}, silent, last seen in {beat.phase} at step {beat.step}" for beat in silent]
        return _joined([*lines, *(f"rank {rank} has not started" for rank in missing)])
    progress = {rank: (beat.step, PHASES.index(beat.phase)) for rank, beat in now.items()}
    behind = [now[rank] for rank in progress if progress[rank] == min(progress.values())]
    if len(behind) < len(now):
        return _joined([
            f"{beat} is behind, in {beat.phase} at step {beat.step}"
            + (", or the network to it is down" if beat.phase in _COLLECTIVE else "")
            for beat in behind
        ])  # fmt: skip
    hosts = list(dict.fromkeys(beat.host for beat in now.values()))
    if len(now) == 1:
        return (
            f"the run's only process is alive, in {own.phase} at step {own.step}: check whether other programs "
            f"use the processors or the device of {hosts[0]}"
        )
    return (
        f"ranks {_ranges(list(now))} are all alive and wait for each other in {own.phase} at step "
        f"{own.step}: check the network between {_joined(hosts, ', ')}"
    )


def _joined(items: Sequence[str], separator: str = "; ") -> str:
    more = [f"and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return separator.join([*items[:_LISTED], *more])


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as `0, 1, 4 to 999`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 3 else ", ".join(map(str, run)) for run in runs)
