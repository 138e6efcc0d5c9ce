"""Who hangs: real processes that are behind, frozen, dead, or never came."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import diagnosis as diagnoses
from pipeline.cluster import heartbeat as heartbeats
from pipeline.cluster import node_directory
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.storage import files
from tests.conftest import ROOT

RANK = """
import sys
from pipeline.cluster import heartbeat, node_directory
memory, run, rank, size, step, phase = sys.argv[1:]
node_directory.MEMORY, heartbeat.BEAT_S, heartbeat.WRITE_S = memory, 0.1, 0.1
with heartbeat.Heartbeat(run, int(rank), int(size), start="s", patience_s=1e6, on_stall=print) as beat:
    beat.begin_phase(int(step), phase)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of the node that this process and those of `start` are on; and shorter times: a diagnosis takes a second."""
    monkeypatch.setattr(heartbeats, "BEAT_S", 0.2)
    monkeypatch.setattr(heartbeats, "WRITE_S", 0.2)
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(node_directory, "MEMORY", str(tmp_path / "memory"))
    return tmp_path / "memory"


def of_rank(
    run: str, rank: int, size: int, *, patience_s: float = 1e6, on_stall: Callable[[], None] | None = None
) -> Heartbeat:
    def unexpected() -> None:
        raise AssertionError("no stall was expected")

    return Heartbeat(run, rank, size, start="s", patience_s=patience_s, on_stall=on_stall or unexpected)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def seen(run: str, rank: int) -> tuple[int, str]:
    """Step and phase of a rank in the files of the run."""
    found = -1, -1, ""
    for name in files.listdir(f"{run}/control/nodes"):
        for beat in [] if name.startswith(".") else files.read_json(f"{run}/control/nodes/{name}")["ranks"]:
            if beat["rank"] == rank:
                found = max(found, (beat["beats"], beat["step"], beat["phase"]))
    return found[1:]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(run: str, memory: Path) -> Iterator[Start]:
    """Start a rank that is at a step and phase, and has shown so."""
    ranks: list[subprocess.Popen[str]] = []

    def begin(rank: int, size: int, step: int, phase: str, node: Path = memory) -> subprocess.Popen[str]:
        node.mkdir(exist_ok=True)
        command = [sys.executable, "-c", RANK, *map(str, (node, run, rank, size, step, phase))]
        ranks.append(subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        wait_until(lambda: seen(run, rank) == (step, phase))
        return ranks[-1]

    yield begin
    for rank in ranks:
        rank.kill()
        rank.communicate()


def diagnosis(run: str, size: int, step: int = 5, phase: str = "update") -> str:
    with of_rank(run, 0, size) as mine:
        mine.begin_phase(step, phase)
        return mine.diagnose()


def who(rank: int, process: subprocess.Popen[str]) -> str:
    return f"rank {rank} (process {process.pid} on {socket.gethostname()})"


def test_the_rank_that_the_others_wait_for_is_named_with_its_phase(run: str, start: Start) -> None:
    start(1, 3, 5, "update")
    behind = start(2, 3, 5, "data")
    assert diagnosis(run, 3) == f"{who(2, behind)} is behind, in data at step 5"


def test_a_step_behind_is_behind_whatever_the_phase(run: str, start: Start) -> None:
    slow = [start(rank, 3, 4, "saving") for rank in (1, 2)]
    expected = "; ".join(f"{who(rank, process)} is behind, in saving at step 4" for rank, process in enumerate(slow, 1))
    assert diagnosis(run, 3, phase="data") == expected


def test_a_rank_that_still_saves_is_behind_those_that_compute_the_next_step(run: str, start: Start) -> None:
    slow = start(1, 3, 5, "saving")
    start(2, 3, 5, "gradient")
    assert diagnosis(run, 3, phase="gradient") == f"{who(1, slow)} is behind, in saving at step 5"


def test_a_rank_may_name_itself(run: str, start: Start) -> None:
    start(1, 2, 5, "update")
    assert diagnosis(run, 2, phase="gradient").startswith(f"rank 0 (process {os.getpid()} on ")


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_frozen_or_dead_rank_is_silent(run: str, start: Start, how: signal.Signals) -> None:
    start(1, 3, 5, "update")
    gone = start(2, 3, 5, "gradient")
    gone.send_signal(how)
    assert diagnosis(run, 3) == f"{who(2, gone)}, silent, last seen in gradient at step 5"


def test_a_rank_that_has_not_started_is_missing(run: str, start: Start) -> None:
    start(1, 4, 0, "starting")
    assert diagnosis(run, 4, 0, "starting") == "rank 2 has not started; rank 3 has not started"


def test_ranks_that_all_wait_have_a_network_between_them(run: str, start: Start) -> None:
    for rank in (1, 2):
        start(rank, 3, 5, "update")
    assert diagnosis(run, 3) == (
        "ranks 0, 1, 2 are all alive and wait for each other in update at step 5: "
        f"check the network between {socket.gethostname()}"
    )


def test_a_rank_alone_is_not_told_of_a_network(run: str) -> None:
    assert diagnosis(run, 1) == (
        "the run's only process is alive, in update at step 5: check whether other programs use the processors or the "
        f"device of {socket.gethostname()}"
    )


def test_of_ranks_that_stall_together_one_reports_and_takes_none_of_them_for_silent(run: str, start: Start) -> None:
    """All of them lose patience together, each in the thread that also beats."""
    told: list[str] = []
    beats: dict[int, Heartbeat] = {}

    def report(rank: int) -> None:
        told.append(f"{rank}: {beats[rank].diagnose()}")

    frozen = start(2, 4, 5, "gradient")
    frozen.send_signal(signal.SIGSTOP)
    with ExitStack() as stack:
        for rank in (0, 1, 3):
            beats[rank] = of_rank(run, rank, 4, patience_s=1.5, on_stall=partial(report, rank))
            stack.enter_context(beats[rank]).begin_phase(5, "update")
        wait_until(lambda: bool(told))
        time.sleep(1)
    assert told == [f"0: {who(2, frozen)}, silent, last seen in gradient at step 5"]


def test_a_stall_is_reported_once_a_phase_and_not_too_early(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "BEAT_S", 0.05)
    told: list[str] = []
    with of_rank(run, 0, 1, patience_s=1.0, on_stall=lambda: told.append(mine.diagnose())) as mine:
        for step in range(6):
            mine.begin_phase(step, "data")
            time.sleep(0.3)  # longer than a diagnosis takes
        assert told == []
        for phase in ("gradient", "saving"):
            mine.begin_phase(6, phase)
            wait_until(lambda: bool(told))
            time.sleep(1.2)
            assert len(told) == 1 and f"in {phase} at step 6" in told.pop()


def test_a_rank_that_ends_well_records_it_and_one_that_fails_does_not(run: str) -> None:
    with of_rank(run, 0, 2) as mine:
        mine.begin_phase(7, "report")
    assert seen(run, 0) == (7, "ended")
    with pytest.raises(KeyError), of_rank(run, 1, 2) as other:
        other.begin_phase(7, "update")
        wait_until(lambda: seen(run, 1) == (7, "update"))
        raise KeyError
    assert seen(run, 1) == (7, "update")


def test_heartbeats_work_on_an_object_store_and_may_fail_to_be_written(tmp_path: Path) -> None:
    place = f"memory://{uuid.uuid4().hex}/run"
    with of_rank(place, 0, 2) as mine:
        assert mine.diagnose() == "rank 1 has not started"
    (tmp_path / "file").touch()
    with of_rank(f"{tmp_path}/file/run", 0, 1) as mine:
        mine.begin_phase(1, "data")


def test_a_rank_whose_storage_is_slow_is_not_dead_for_its_node(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with of_rank(run, 0, 2) as slow, of_rank(run, 1, 2) as other:
        wait_until(lambda: seen(run, 1) != (-1, ""))
        write, released = files.write_bytes, threading.Event()

        def hanging(url: str, *arguments: Any, **options: Any) -> None:
            if url.startswith(run):
                released.wait(60)
            write(url, *arguments, **options)

        monkeypatch.setattr(files, "write_bytes", hanging)
        time.sleep(10 * heartbeats.BEAT_S)
        assert not other._writes_for_node() and slow._writes_for_node()
        released.set()


def test_every_phase_of_the_trainer_has_a_place_in_the_order() -> None:
    named = re.findall(r'phase\("(\w+)"\)', (ROOT / "pipeline" / "train.py").read_text())
    assert set(named) == set(diagnoses.PHASES) - {"starting", "ended"}
