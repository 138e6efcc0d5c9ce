"""The step and phase of each rank, in `RUN/control/ranks/00007.json`, to name a rank that hangs or is gone.

A thread of each rank writes this file every few seconds, also while the training thread hangs. When training stalls,
any rank can read the files and name the rank that is behind or silent.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from pipeline.checkpoints.run_dir import RunDir
from pipeline.errors import DataError, PipelineError
from pipeline.processes.periodic import Periodic
from pipeline.storage import files

BEAT_S = 3.0
"""Seconds between two heartbeats of a rank."""
PHASES = ("starting", "report", "validation", "preview", "evaluation", "saving", "data", "gradient", "update", "ended")
"""In the order of a step. What follows an update counts as the next step's."""
_COLLECTIVE = ("gradient", "update")
"""Phases in which ranks wait for each other."""


@dataclass(frozen=True)
class Beat:
    """The content of a rank's heartbeat file."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    beats: int
    """Counter of the rank's heartbeats."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Heartbeat:
    """Writes the heartbeat file of this rank while entered, and reports a phase that takes too long.

    Args:
        run_dir: the run.
        rank: of this process.
        size: number of ranks.
        patience_s: seconds in one phase after which `on_stall` is called, once a phase.
        on_stall: gets the diagnosis.
    """

    def __init__(
        self, run_dir: str, rank: int, size: int, *, patience_s: float, on_stall: Callable[[str], None]
    ) -> None:
        self._run, self.rank, self._size = RunDir(run_dir), rank, size
        self._patience_s, self._on_stall, self._has_reported = patience_s, on_stall, False
        self.step, self.phase, self._phase_began, self._beats = 0, "starting", time.monotonic(), 0

    def __enter__(self) -> Heartbeat:
        self._beat()
        self._every = Periodic(min(BEAT_S, self._patience_s / 3), self._watch, "heartbeat")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._every.stop()
        if kind is None:
            self.begin_phase(self.step, "ended")
            self._beat()

    def begin_phase(self, step: int, phase: str) -> None:
        """Set the step and the phase of this rank. Writes nothing: the thread does."""
        self.step, self.phase, self._phase_began, self._has_reported = step, phase, time.monotonic(), False

    def diagnose(self) -> str:
        """Name the rank for which the other ranks wait, from their heartbeat files. Takes two heartbeats."""
        before = self._read_all()
        for _ in range(2):
            time.sleep(BEAT_S)
            self._beat()  # another rank may diagnose at the same time
        now = self._read_all()
        silent = [beat for rank, beat in now.items() if beat == before.get(rank) and rank != self.rank]
        missing = [f"rank {rank}" for rank in range(self._size) if rank not in now]
        if silent or missing:
            lines = [f"{beat}, silent, last seen in {beat.phase} at step {beat.step}" for beat in silent]
            return "; ".join([*lines, *(f"{name} has not started" for name in missing)])
        progress = {rank: (beat.step, PHASES.index(beat.phase)) for rank, beat in now.items()}
        behind = [now[rank] for rank in progress if progress[rank] == min(progress.values())]
        if len(behind) < len(now):
            return "; ".join(
                f"{beat} is behind, in {beat.phase} at step {beat.step}"
                + (", or the network to it is down" if beat.phase in _COLLECTIVE else "")
                for beat in behind
            )
        hosts = ", ".join(dict.fromkeys(beat.host for beat in now.values()))
        if len(now) == 1:
            return (
                f"the run's only process is alive, in {self.phase} at step {self.step}: check whether other programs "
                f"use the processors or the device of {hosts}"
            )
        return (
            f"ranks {', '.join(map(str, now))} are all alive and wait for each other in {self.phase} at step "
            f"{self.step}: check the network between {hosts}"
        )

    def _watch(self) -> None:
        self._beat()
        if time.monotonic() - self._phase_began > self._patience_s and not self._has_reported:
            self._has_reported, stalled_at = True, (self.step, self.phase)
            diagnosis = self.diagnose()
            if stalled_at == (self.step, self.phase):
                self._on_stall(diagnosis)

    def _beat(self) -> None:
        self._beats += 1
        beat = Beat(self.rank, socket.gethostname(), os.getpid(), self.step, self.phase, self._beats)
        with suppress(PipelineError, OSError):  # saving reports a full disk or a missing mount
            files.write_bytes(self._run.heartbeat(self.rank), json.dumps(asdict(beat)).encode(), durable=False)

    def _read_all(self) -> dict[int, Beat]:
        beats = {}
        for rank in range(self._size):
            with suppress(FileNotFoundError, DataError, OSError, TypeError):
                beats[rank] = Beat(**files.read_json(self._run.heartbeat(rank)))
        return beats
