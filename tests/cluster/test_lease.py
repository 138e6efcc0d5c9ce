"""One job at a time on a run: real processes that race, die, freeze and come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoints.checkpoint import newest_checkpoint
from pipeline.cluster import lease as leases
from pipeline.cluster.lease import Lease, current_holder
from pipeline.errors import DataError, RunHeld
from pipeline.storage import files
from tests.checkpoints.test_async_save import save, saver
from tests.checkpoints.test_checkpoint import kept
from tests.conftest import ROOT
from tests.disk import small_disk

BEAT_S = 0.1

HOLDER = """
import sys, time
from pipeline.cluster import lease
lease.BEAT_S = float(sys.argv[2])
with lease.Lease(sys.argv[1], print) as held:
    print("held", held.generation, flush=True)
    sys.stdin.readline()
"""


def no_line_expected(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", BEAT_S)
    monkeypatch.setattr(leases, "_STILL_S", 20 * BEAT_S)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start another job that holds a run until it is sent a line."""
    jobs: list[subprocess.Popen[str]] = []

    def begin(run: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, run, str(BEAT_S)]
        job = subprocess.Popen(command, env={**os.environ, **environment}, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        jobs.append(job)
        assert job.stdout
        while not (line := job.stdout.readline()).startswith("held"):
            assert line, "it ended"
        return job

    yield begin
    for job in jobs:
        job.kill()
        job.communicate()


def record(run: str) -> dict[str, Any]:
    name = max(name for name in files.listdir(files.join(run, "control")) if name.startswith("lease-"))
    return dict(files.read_json(files.join(run, "control", name)))


def on_another_machine(run: str, **changes: Any) -> None:
    """Let the newest lease say that it is another machine's."""
    control = Path(run, "control")
    path = max(control.glob("lease-*.json"))
    changed = json.loads(path.read_text()) | {"machine": "another", "host": "n3"} | changes
    files.write_json(str(path), changed)


def test_a_free_run_is_taken_and_given_back(run: str) -> None:
    for generation in (1, 2, 3):
        with Lease(run, no_line_expected) as held:
            assert (held.generation, held.lost) == (generation, False)
            held.check()
            assert str(current_holder(run)) == f"process {os.getpid()} on {record(run)['host']}"
        assert current_holder(run) is None
        assert os.listdir(f"{run}/control") == [f"lease-{generation:06d}.json"]


def test_a_lease_works_on_an_object_store() -> None:
    run = f"memory://{uuid.uuid4().hex}/run"
    for generation in (1, 2):
        with Lease(run, no_line_expected) as held:
            assert held.generation == generation
            held.check()
            time.sleep(3 * BEAT_S)
            assert record(run)["count"] > 0
            with pytest.raises(RunHeld, match="is held by"):
                Lease(run, lambda line: None).__enter__()


def test_a_holder_that_lives_refuses_the_second_and_is_named(run: str, start: Start) -> None:
    other = start(run, SLURM_JOB_ID="4711")
    lines: list[str] = []
    with pytest.raises(RunHeld) as caught:
        Lease(run, lines.append).__enter__()
    who = f"job 4711 process {other.pid} on {record(run)['host']}"
    assert str(caught.value) == f"{run} is held by {who}: stop that job, or choose another run.dir"
    assert caught.value.exit_code == 2
    assert lines == [f"{run} is held by {who}; watching for 2 s whether it is alive"]
    assert str(current_holder(run)) == who and os.listdir(f"{run}/control") == ["lease-000001.json"]


def test_a_run_that_is_released_while_another_job_watches_is_free_at_once(run: str, start: Start) -> None:
    other = start(run)
    other.send_signal(signal.SIGSTOP)  # its count stands still
    assert other.stdin

    def give_back() -> None:
        path = f"{run}/control/lease-000001.json"
        files.write_json(path, files.read_json(path) | {"released": True})

    threading.Timer(3 * BEAT_S, give_back).start()
    lines: list[str] = []
    with Lease(run, lines.append) as held:
        assert held.generation == 2
    assert len(lines) == 1 and "watching" in lines[0]


def test_a_dead_process_of_this_machine_is_taken_over_at_once(run: str, start: Start) -> None:
    other = start(run)
    other.kill()
    other.wait()
    lines: list[str] = []
    with Lease(run, lines.append) as held:
        assert held.generation == 2
    assert lines == [
        f"taking {run} over from process {other.pid} on {leases.socket.gethostname()}: its process is gone"
    ]


def test_a_process_number_that_another_process_has_by_now_is_no_sign_of_life(run: str, start: Start) -> None:
    other = start(run)
    other.kill()
    other.wait()
    path = f"{run}/control/lease-000001.json"
    files.write_json(path, files.read_json(path) | {"pid": os.getppid()})
    lines: list[str] = []
    with Lease(run, lines.append):
        assert lines[0].endswith("its process is gone")


def test_a_process_number_of_another_machine_says_nothing(run: str, start: Start) -> None:
    other = start(run)
    other.kill()
    other.wait()
    on_another_machine(run)
    lines: list[str] = []
    with Lease(run, lines.append):
        assert lines[0].endswith("watching for 2 s whether it is alive")
        assert lines[1:] == [f"taking {run} over from process {other.pid} on n3: it has not moved for 2 s"]


def test_the_same_batch_job_started_again_takes_over_at_once(
    run: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(run, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="1")
    on_another_machine(run)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    lines: list[str] = []
    with Lease(run, lines.append) as held:
        assert held.generation == 2
    assert len(lines) == 1 and lines[0].endswith("this is the same job, started again")


@pytest.mark.parametrize(("job", "restarts"), [("4711", "1"), ("4711", "none"), ("4712", "2"), (None, "2")])
def test_another_job_or_the_same_start_does_not(
    run: str, start: Start, job: str | None, restarts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(run, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="1")
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    with pytest.raises(RunHeld, match="is held by job 4711"):
        Lease(run, lambda line: None).__enter__()


def test_a_frozen_job_of_another_machine_is_taken_over_and_as_a_zombie_commits_nothing(
    run: str, start: Start, tmp_path: Path
) -> None:
    """With a saver whose write was under way when its process was frozen."""
    code = ZOMBIE.format(beat=BEAT_S, run=run)
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=ROOT) as zombie:  # fmt: skip
        assert zombie.stdin and zombie.stdout
        assert zombie.stdout.readline() == "saving 20\n"
        zombie.send_signal(signal.SIGSTOP)
        on_another_machine(run)
        lines: list[str] = []
        with (
            Lease(run, lines.append) as held,
            saver(run, [], generation=held.generation, check_lease=held.check) as mine,
        ):
            assert held.generation == 2
            assert lines[-1] == f"taking {run} over from process {zombie.pid} on n3: it has not moved for 2 s"
            assert save(mine, 15) and mine.problem is None
            before = kept(run)
            zombie.send_signal(signal.SIGCONT)
            out, _ = zombie.communicate("go on\n", timeout=60)
            assert out.splitlines()[0] == (
                f"{run} was taken over by process {os.getpid()} on {record(run)['host']}: this job stops writing to it"
            )
            assert out.splitlines()[1:] == ["lost True", "refused"]
            held.check()
            assert before == kept(run) == [10, 15]
            assert save(mine, 20)
        found, rejected = newest_checkpoint(run)
        assert found and found.step == 20 and rejected == []
        assert files.read_json(f"{found.path}/manifest.json")["generation"] == 2


ZOMBIE = """
import sys, time
from pipeline.errors import RunHeld
from pipeline.cluster import lease
from tests.checkpoints.test_async_save import save, saver
lease.BEAT_S = {beat}
with lease.Lease({run!r}, print) as held:
    def check_lease():
        if not stopped:
            stopped.append(1)
            print("saving 20", flush=True)
            sys.stdin.readline()
        held.check()
    stopped = [1]
    with saver({run!r}, [], check_lease=check_lease) as it:
        save(it, 10)
        stopped.clear()
        save(it, 20)
        print(it.problem)
    print("lost", held.lost)
    try:
        held.check()
    except RunHeld:
        print("refused")
"""


def test_a_holder_that_is_overtaken_notices_and_does_not_change_the_new_lease(run: str) -> None:
    with Lease(run, no_line_expected) as old:
        files.write_json(f"{run}/control/lease-000002.json", {"pid": 1, "host": "n4", "job": "9", "restarts": 0})
        until = time.monotonic() + 30
        while not old.lost and time.monotonic() < until:
            time.sleep(BEAT_S / 5)
        assert old.lost
        with pytest.raises(RunHeld, match="was taken over by job 9 process 1 on n4"):
            old.check()
        before = Path(run, "control/lease-000002.json").read_bytes()
    assert Path(run, "control/lease-000002.json").read_bytes() == before
    assert str(current_holder(run)) == "job 9 process 1 on n4"


def test_a_late_taker_of_a_number_that_was_passed_asks_again(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saw the run free, and two others have held it and gone, or stayed, before it acts on that."""
    with Lease(run, no_line_expected):
        pass
    create, taken = files.create, []

    def late(url: str, data: bytes) -> bool:
        if not taken:
            taken.append(url)
            with Lease(run, no_line_expected):
                pass
            other.append(Lease(run, no_line_expected))
            other[0].__enter__()
        return create(url, data)

    other: list[Lease] = []
    monkeypatch.setattr(files, "create", late)
    with pytest.raises(RunHeld, match="is held by"):
        Lease(run, lambda line: None).__enter__()
    other[0].check()
    assert other[0].generation == 3
    other[0].__exit__(None, None, None)
    with Lease(run, no_line_expected) as held:
        assert held.generation == 4


def test_of_many_that_race_exactly_one_has_each_generation(run: str) -> None:
    """Processes that take the run as often as they can; who holds it looks whether somebody else believes so too."""
    rounds, racers = 25, 4
    code = RACER.format(beat=BEAT_S, run=run, rounds=rounds)
    racing = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(racers)]
    wins = [line for racer in racing for line in racer.communicate(timeout=120)[0].splitlines()]
    assert all(racer.returncode == 0 for racer in racing)
    generations = sorted(int(line) for line in wins)
    assert len(generations) >= rounds
    assert len(set(generations)) == len(generations)


RACER = """
import os, random, time
from pipeline.errors import RunHeld
from pipeline.cluster import lease
lease.BEAT_S, lease._STILL_S = {beat}, 60
wins, until = 0, time.monotonic() + 60
while wins < {rounds} and time.monotonic() < until:
    try:
        with lease.Lease({run!r}, lambda line: None) as held:
            os.close(os.open({run!r} + "/inside", os.O_CREAT | os.O_EXCL))
            held.check()
            os.unlink({run!r} + "/inside")
            print(held.generation)
            wins += 1
    except RunHeld:
        pass
"""


@pytest.mark.parametrize("content", [b"", b'{"host": "n', b"\0\0"])
def test_a_lease_that_was_cut_short_is_free(run: str, content: bytes) -> None:
    files.write_bytes(f"{run}/control/lease-000007.json", content)
    assert current_holder(run) is None
    with Lease(run, no_line_expected) as held:
        assert held.generation == 8


def test_a_moment_without_the_mount_does_not_lose_the_run(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(url: str) -> list[str]:
        raise OSError("stale file handle")

    with Lease(run, no_line_expected) as held:
        with monkeypatch.context() as patch:
            patch.setattr(files, "listdir", gone)
            time.sleep(3 * BEAT_S)
        count = record(run)["count"]
        until = time.monotonic() + 30
        while record(run)["count"] == count and time.monotonic() < until:
            time.sleep(BEAT_S / 5)
        assert record(run)["count"] > count and not held.lost


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        disk.remount("ro")
        with pytest.raises(DataError, match="the file system is read-only: choose another place") as caught:
            Lease(str(disk.path / "run"), no_line_expected).__enter__()
        assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"a part of this path is a file|a file of this name is in the way"):
        Lease(str(tmp_path / "file" / "run"), no_line_expected).__enter__()
