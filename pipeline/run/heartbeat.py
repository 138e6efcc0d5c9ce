"""Where each rank is, in `RUN/control/ranks/00007.json`, so that a rank that hangs or is gone can be named.

A rank writes its step and phase every few seconds from a thread, which goes on while its work is stuck. When the ranks
make no progress, whoever looks finds the one that is behind the others, or silent.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType

from pipeline import storage
from pipeline.errors import DataError, PipelineError
from pipeline.run.background import Every

BEAT_S = 3.0
PHASES = ("starting", "report", "validation", "preview", "saving", "data", "gradient", "agreement", "update", "ended")
"""In the order in which they come at a step: what follows an update counts as the next step's."""
_TOGETHER = ("gradient", "agreement")
"""Phases in which ranks wait for each other."""


@dataclass(frozen=True)
class Beat:
    """What a rank last wrote."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    beats: int
    """Counted up by the rank."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Heartbeat:
    """Writes this rank's beat while entered, and complains when a phase takes long.

    Args:
        run_dir: the run.
        rank: of this process.
        size: number of ranks.
        patience_s: a phase that takes so long is told to `on_stall`, once.
        on_stall: gets the diagnosis.
    """

    def __init__(
        self, run_dir: str, rank: int, size: int, *, patience_s: float, on_stall: Callable[[str], None]
    ) -> None:
        self._folder, self.rank, self._size = storage.join(run_dir, "control", "ranks"), rank, size
        self._patience_s, self._on_stall, self._told = patience_s, on_stall, False
        self.step, self.phase, self._since, self._beats = 0, "starting", time.monotonic(), 0

    def __enter__(self) -> Heartbeat:
        self._beat()
        self._every = Every(min(BEAT_S, self._patience_s / 3), self._watch, "heartbeat")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._every.stop()
        if kind is None:
            self.at(self.step, "ended")
            self._beat()

    def at(self, step: int, phase: str) -> None:
        """This rank begins a phase; costs nothing."""
        self.step, self.phase, self._since, self._told = step, phase, time.monotonic(), False

    def diagnosis(self) -> str:
        """Which rank the others wait for, as far as their files tell. Takes two beats."""
        before = self._read()
        for _ in range(2):
            time.sleep(BEAT_S)
            self._beat()  # another rank may be asking the same
        after = self._read()
        silent = [beat for rank, beat in after.items() if beat == before.get(rank) and rank != self.rank]
        missing = [f"rank {rank}" for rank in range(self._size) if rank not in after]
        place = {rank: (beat.step, PHASES.index(beat.phase)) for rank, beat in after.items()}
        behind = [after[rank] for rank in place if place[rank] == min(place.values())]
        if silent or missing:
            who = [f"{beat}, silent, last seen in {beat.phase} at step {beat.step}" for beat in silent]
            return "; ".join([*who, *(f"{name} never showed itself" for name in missing)])
        if len(behind) < len(after):
            return "; ".join(
                f"{beat} is behind, in {beat.phase} at step {beat.step}"
                + (", or the network to it is down" if beat.phase in _TOGETHER else "")
                for beat in behind
            )
        hosts = ", ".join(dict.fromkeys(beat.host for beat in after.values()))
        return (
            f"ranks {', '.join(map(str, after))} are all alive and wait for each other in {self.phase} at step "
            f"{self.step}: look at the network between {hosts}"
        )

    def _watch(self) -> None:
        self._beat()
        if time.monotonic() - self._since > self._patience_s and not self._told:
            self._told, place = True, (self.step, self.phase)
            diagnosis = self.diagnosis()
            if place == (self.step, self.phase):
                self._on_stall(diagnosis)

    def _beat(self) -> None:
        self._beats += 1
        beat = Beat(self.rank, socket.gethostname(), os.getpid(), self.step, self.phase, self._beats)
        place = storage.join(self._folder, f"{self.rank:05d}.json")
        with suppress(PipelineError, OSError):  # a full disk or an absent mount is told by who has to write
            storage.write_bytes(place, json.dumps(asdict(beat)).encode(), durable=False)

    def _read(self) -> dict[int, Beat]:
        beats = {}
        for rank in range(self._size):
            with suppress(FileNotFoundError, DataError, OSError, TypeError):
                beats[rank] = Beat(**storage.read_json(storage.join(self._folder, f"{rank:05d}.json")))
        return beats
