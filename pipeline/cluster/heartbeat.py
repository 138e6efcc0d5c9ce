"""The step and phase of each rank, to name a rank that hangs or is gone.

A thread of each rank writes a record every second to a directory in the memory of its node, also while the training
thread hangs. The first living rank of a node copies the records of the node to `RUN/control/nodes/00008.json`, named
after the node's first rank. When training stalls, any rank can read these files and name the rank that is behind or
silent.

All nodes together write at most `WRITES_PER_S` files a second: a node with n of the N ranks waits at least
N / (n WRITES_PER_S) seconds between two writes, whatever ranks the other nodes have. So up to 120 nodes of equal size
write every 3 seconds, and 1,000 nodes every 25.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace

from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster.diagnosis import Beat, diagnose
from pipeline.cluster.node_directory import NodeDirectory
from pipeline.errors import DataError, PipelineError
from pipeline.processes.periodic import Periodic
from pipeline.storage import files

BEAT_S = 1.0
"""Seconds between two heartbeats of a rank."""
WRITE_S = 3.0
"""Seconds between two writes of a node to the run, at least."""
WRITES_PER_S = 40.0
"""Files that all nodes write to the run in a second, at most."""
_DEAD_BEATS = 4
"""A rank that has missed so many heartbeats is dead or frozen for the others of its node."""
_READERS = 16
_GOLDEN_RATIO = 0.618034
"""Its multiples spread evenly between whole numbers."""


class Heartbeat:
    """Shows what this rank does while entered, and reports a phase that takes too long.

    Of all ranks only the one that writes for its node reports, and a node of higher ranks later than the first one.

    Args:
        run_dir: the run.
        rank: of this process.
        size: number of ranks.
        start: identifies this start of the run, the same on all ranks.
        patience_s: seconds in one phase after which `on_stall` is called, once a phase.
        on_stall: called in a thread of the heartbeat.
    """

    def __init__(
        self, run_dir: str, rank: int, size: int, *, start: str, patience_s: float, on_stall: Callable[[], None]
    ) -> None:
        self._run, self.rank, self._size, self._start = RunDir(run_dir), rank, size, start
        self._patience_s, self._on_stall, self._has_reported = patience_s, on_stall, False
        self.step, self.phase, self._phase_began, self._beats = 0, "starting", time.monotonic(), 0
        self.node = NodeDirectory(start)
        self._ranks = [rank]
        """The ranks of this node, ascending."""
        self._changes: dict[int, tuple[tuple[int, int], float]] = {}
        """Rank of this node → version of its record, and when this rank saw it first."""
        self._written_at, self._has_written = time.monotonic(), False

    def __enter__(self) -> Heartbeat:
        self.node.enter()
        self._written_at = time.monotonic()
        self._beat()
        period_s = min(BEAT_S, self._patience_s / 3)
        # In another thread than the beats: the storage of the run may be slow, which is no sign of a dead rank.
        self._writing = Periodic(period_s, self._watch, "heartbeats of the node")
        self._beating = Periodic(period_s, self._beat, "heartbeat")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._writing.stop()
        self._beating.stop()
        if kind is None:
            self.begin_phase(self.step, "ended")
            self._beat()
            if all(beat.phase == "ended" for beat in self._of_node()):
                self._write()
        self.node.leave()

    def begin_phase(self, step: int, phase: str) -> None:
        """Set the step and the phase of this rank. Writes nothing: the thread does."""
        self.step, self.phase, self._phase_began, self._has_reported = step, phase, time.monotonic(), False

    @property
    def write_s(self) -> float:
        """Seconds between two writes of this node to the run."""
        return _write_s(self._size, len(self._ranks))

    @property
    def head_start_s(self) -> float:
        """Seconds that this node gives nodes of lower ranks to diagnose: 0 for the first node.

        The second node waits for twice the time of a diagnosis, so that it acts if the first one is dead; each doubling
        of a node's number adds as much, so that few nodes act in any case.
        """
        node = self._ranks[0] // len(self._ranks)
        return node.bit_length() * 2 * _watch_s(self.write_s)

    @property
    def patience_with_others_s(self) -> float:
        """Seconds that this node waits for a diagnosis that another rank has begun, before it diagnoses itself."""
        return self.head_start_s + 2 * _watch_s(self.write_s)

    def diagnose(self) -> str:
        """Name the rank for which the other ranks wait, from the files of all nodes, read twice.

        Takes the longest time between two writes of a node, and some seconds in which another rank of a node begins to
        write if the one that did is dead; 10 seconds for up to 120 nodes.
        """
        before = self._read_nodes()
        longest_s = max([self.write_s, *(_write_s(self._size, len(beats)) for beats in before)])
        until = time.monotonic() + _watch_s(longest_s)
        while time.monotonic() < until:
            time.sleep(BEAT_S)
            self._write_if_due()  # this may be the thread that writes
        return diagnose(_newest(before), _newest(self._read_nodes()), self._own(), self._size)

    def _watch(self) -> None:
        self._write_if_due()
        is_stalled = time.monotonic() - self._phase_began > self._patience_s + self.head_start_s
        if is_stalled and not self._has_reported and self._writes_for_node():
            self._has_reported = True
            self._on_stall()

    def _own(self) -> Beat:
        return Beat(self.rank, socket.gethostname(), os.getpid(), self.step, self.phase, self._beats)

    def _beat(self) -> None:
        self._beats += 1
        is_written = self.node.write_record(self.rank, json.dumps(asdict(self._own())).encode())
        # Where the memory is full, or nothing may be written, each rank is a node of its own.
        versions, now = self.node.versions() if is_written else {}, time.monotonic()
        for rank, version in versions.items():
            if rank not in self._changes or self._changes[rank][0] != version:
                self._changes[rank] = version, now
        self._ranks = sorted({self.rank, *versions})

    def _write_if_due(self) -> None:
        wait_s = self.write_s
        if not self._has_written:  # the ranks of a node need a moment to write their records; and not all nodes at once
            wait_s = BEAT_S + self.write_s * (self.rank * _GOLDEN_RATIO % 1)
        if time.monotonic() - self._written_at >= wait_s and self._writes_for_node():
            self._write()

    def _writes_for_node(self) -> bool:
        """Whether all ranks of this node before this one are dead or frozen."""
        return all(self._is_silent(rank) for rank in self._ranks if rank < self.rank)

    def _is_silent(self, rank: int) -> bool:
        return time.monotonic() - self._changes[rank][1] > _DEAD_BEATS * BEAT_S

    def _write(self) -> None:
        self._written_at, self._has_written = time.monotonic(), True
        content = {"start": self._start, "ranks": [asdict(beat) for beat in self._of_node()]}
        with suppress(PipelineError, OSError):  # saving reports a full disk or a missing mount
            files.write_bytes(self._run.node_heartbeats(self._ranks[0]), json.dumps(content).encode(), durable=False)

    def _of_node(self) -> list[Beat]:
        """The last heartbeat of each rank of this node."""
        beats = [self._own()]
        for rank, data in self.node.records().items():
            with suppress(ValueError, TypeError):
                if rank in self._ranks and rank != self.rank:
                    beats.append(replace(Beat(**json.loads(data)), silent=self._is_silent(rank)))
        return sorted(beats, key=lambda beat: beat.rank)

    def _read_nodes(self) -> list[list[Beat]]:
        """The heartbeats that each node has written to the run."""
        with suppress(PipelineError, OSError), ThreadPoolExecutor(_READERS) as pool:
            names = [name for name in files.listdir(self._run.nodes) if not name.startswith(".")]
            return [beats for beats in pool.map(self._read_node, names) if beats]
        return []

    def _read_node(self, name: str) -> list[Beat]:
        with suppress(FileNotFoundError, DataError, OSError, TypeError, ValueError, KeyError):
            content = files.read_json(files.join(self._run.nodes, name))
            if content["start"] == self._start:  # a job that has lost the run may still write
                return [Beat(**beat) for beat in content["ranks"]]
        return []


def _write_s(size: int, ranks: int) -> float:
    """Seconds between two writes of a node with so many of the ranks."""
    return max(WRITE_S, size / (ranks * WRITES_PER_S))


def _watch_s(write_s: float) -> float:
    """Seconds after which a node has written who is dead, also if that is the rank that used to write for it.

    A rank is dead for the others after `_DEAD_BEATS` beats, of which the first and the last may be seen a beat late.
    """
    return write_s + (_DEAD_BEATS + 3) * BEAT_S


def _newest(nodes: Iterable[Iterable[Beat]]) -> dict[int, Beat]:
    """Rank → its newest heartbeat. A rank is in two files if lower ranks of its node have started later."""
    newest: dict[int, Beat] = {}
    for beat in (beat for beats in nodes for beat in beats):
        if beat.rank not in newest or newest[beat.rank].beats < beat.beats:
            newest[beat.rank] = beat
    return newest
