"""The pool: everything is done once, errors arrive, and no process outlives the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from pipeline.data import pool
from pipeline.errors import DataError

GoOn = Callable[[], None]


def state() -> list[int]:
    return []


def never() -> bool:
    return False


def square(seen: list[int], task: int, go_on: GoOn) -> tuple[int, int, int]:
    seen.append(task)
    return task * task, len(seen), os.getpid()


def fail(seen: list[int], task: int, go_on: GoOn) -> int:
    if task == 3:
        raise DataError("no space left")
    if task == 4:
        raise ZeroDivisionError
    return task


def die(seen: list[int], task: int, go_on: GoOn) -> int:
    if task == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return task


def hang(seen: list[int], task: str, go_on: GoOn) -> None:
    """Works for ever, item by item; tells when it starts, and when it is let go."""
    Path(f"{task}.{os.getpid()}.running").touch()
    try:
        while True:
            go_on()
            time.sleep(0.01)
    finally:
        Path(f"{task}.{os.getpid()}.cleaned").touch()


def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_task_is_done_once_by_no_more_processes_than_asked_for(workers: int) -> None:
    results = list(pool.run(square, range(12), setup=state, workers=workers, stop=never))
    assert sorted(result for result, _, _ in results) == [n * n for n in range(12)]
    assert len({pid for _, _, pid in results}) <= workers
    assert max(count for _, count, _ in results) >= 12 // workers  # what setup made is kept from task to task
    assert not psutil.pid_exists(results[0][2])


def test_no_tasks_are_no_results() -> None:
    assert list(pool.run(square, [], setup=state, workers=2, stop=never)) == []


def test_errors_arrive_as_they_were_raised_and_bugs_with_their_traceback() -> None:
    with pytest.raises(DataError, match=r"^no space left$"):
        list(pool.run(fail, [1, 3], setup=state, workers=1, stop=never))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(pool.run(fail, [1, 4], setup=state, workers=1, stop=never))


def test_a_worker_that_dies_is_told_with_its_task() -> None:
    with pytest.raises(DataError, match=r"^2: its worker process died \(out of memory, or a decoder crashed\)"):
        list(pool.run(die, range(5), setup=state, workers=2, stop=never))


def test_closing_stops_workers_within_an_item_and_lets_them_clean_up(tmp_path: Path) -> None:
    task = str(tmp_path / "task")
    with closing(
        pool.run(hang, [task] * 3, setup=state, workers=2, stop=lambda: len(list(tmp_path.iterdir())) == 2)
    ) as r:
        assert list(r) == []
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 4 and all(name.endswith(".cleaned") for name in names[::2])


def test_no_worker_outlives_a_job_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from pipeline.data import pool; from tests.test_pool import hang, never, state; "
        f"list(pool.run(hang, ['{tmp_path}/task'] * 2, setup=state, workers=2, stop=never))"
    )
    job = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: len(list(tmp_path.glob("*.running"))) == 2)
    pids = [int(path.name.split(".")[1]) for path in tmp_path.glob("*.running")]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # as sent to a whole job step
        os.kill(pids[0], number)
    time.sleep(0.1)
    assert all(psutil.pid_exists(pid) for pid in pids)
    job.kill()
    job.wait()
    until(lambda: len(list(tmp_path.glob("*.cleaned"))) == 2)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
