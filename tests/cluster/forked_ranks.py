"""`python -m tests.cluster.forked_ranks RUN PLACE RANKS RANKS_OF_A_NODE`: many cheap ranks, forked from one process.

Each is a real process with a Heartbeat; the nodes are pretended by host names. Prints the process numbers. SIGUSR1 lets
a rank diagnose, and write the result to PLACE/diagnosis; SIGUSR2 lets it lose contact, and write what it is told to
PLACE/told-RANK. `PLACE/operations` gets a line for each operation on the run: rank, function, path. All ranks are
killed at the end of the input.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cluster import failure, heartbeat, node_directory
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.errors import RankLost
from pipeline.storage import files

BEAT_S, WRITE_S, WRITES_PER_S = 0.5, 0.5, 8.0
COUNTED = ("read_json", "write_bytes", "create", "listdir", "remove", "exists")
SIGNALS = {signal.SIGUSR1, signal.SIGUSR2}


def count_operations(run: str, rank: int, log: Path) -> None:
    """Note each operation on files of the run; one write to a file opened for appending is not torn."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(url: str, *arguments: Any, **options: Any) -> Any:
            if url.startswith(run):
                os.write(descriptor, f"{rank} {name} {url.removeprefix(run)}\n".encode())
            return function(url, *arguments, **options)

        return call

    for name in COUNTED:
        setattr(files, name, counted(name, getattr(files, name)))


def be_rank(run: str, place: Path, rank: int, size: int, of_node: int) -> None:
    """Beat until a signal says that contact is lost."""
    host = f"node{rank // of_node}"
    socket.gethostname = lambda: host
    count_operations(run, rank, place / "operations")
    with Heartbeat(run, rank, size, start="s", patience_s=1e6, on_stall=lambda: None) as beat:
        beat.begin_phase(5, "update")
        while signal.sigwait(SIGNALS) == signal.SIGUSR1:
            (place / "diagnosis.new").write_text(beat.diagnose())
            (place / "diagnosis.new").rename(place / "diagnosis")
        try:
            with failure.record_errors(run, beat, lambda error: "gloo" in str(error)):
                raise RuntimeError("gloo: connection closed")
        except RankLost as lost:
            (place / f"told-{rank}").write_text(str(lost))


def main(run: str, place: str, size: str, of_node: str) -> None:
    """Fork the ranks, and kill them at the end of the input."""
    heartbeat.BEAT_S, heartbeat.WRITE_S, heartbeat.WRITES_PER_S = BEAT_S, WRITE_S, WRITES_PER_S
    node_directory.MEMORY = f"{place}/memory"
    Path(place, "memory").mkdir(parents=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pids: list[int] = []
    for rank in range(int(size)):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                be_rank(run, Path(place), rank, int(size), int(of_node))
            finally:
                os._exit(0)
    print(json.dumps(pids), flush=True)
    sys.stdin.read()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
