"""The pool: every item once and in order, errors arrive, deaths cost one item, and no process outlives the job."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.processes import pool
from pipeline.processes.pool import CheckStop


def state() -> list[int]:
    return []


def never() -> bool:
    return False


def on_death(item: object, exit_code: int) -> tuple[object, int]:
    return item, exit_code


def square(seen: list[int], items: Sequence[int], check_stop: CheckStop) -> Iterator[tuple[int, int, int]]:
    for item in items:
        seen.append(item)
        time.sleep(0.01 * (item % 3))  # so that chunks end in another order than they began
        yield item * item, len(seen), os.getpid()


def fail(seen: list[int], items: Sequence[int], check_stop: CheckStop) -> Iterator[int]:
    for item in items:
        if item == 3:
            raise DataError("no space left")
        if item == 4:
            raise ZeroDivisionError
        yield item


def die(seen: list[int], items: Sequence[int], check_stop: CheckStop) -> Iterator[int]:
    """Some items are deadly, one of them only the first time."""
    for item in items:
        if item == 5:
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == 7:
            while True:
                pass
        if item == 9 and os.environ.get("ACCIDENT") and not os.path.exists(os.environ["ACCIDENT"]):
            Path(os.environ["ACCIDENT"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield item


def unusable() -> None:
    raise ConfigError("the source is gone")


def hang(seen: list[int], items: Sequence[str], check_stop: CheckStop) -> Iterator[None]:
    """Works for ever, item by item; tells when it starts, and when it is let go."""
    Path(f"{items[0]}.{os.getpid()}.running").touch()
    try:
        for _ in items:
            for _ in range(1_000_000):  # hours, but for `go_on`
                time.sleep(0.01)
                check_stop()
            yield None
    finally:
        Path(f"{items[0]}.{os.getpid()}.cleaned").touch()


def dump_core(seen: list[int], items: Sequence[int], check_stop: CheckStop) -> Iterator[tuple[int, int]]:
    yield from (resource.getrlimit(resource.RLIMIT_CORE) for _ in items)


def chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 40])
def test_each_item_is_done_once_and_in_order_by_no_more_processes_than_asked_for(workers: int, size: int) -> None:
    given = chunks(40, size)
    results = list(pool.run(square, given, setup=state, workers=workers, stop=never, on_worker_death=on_death))
    assert [[result for result, _, _ in chunk] for chunk in results] == [[n * n for n in chunk] for chunk in given]
    pids = {pid for chunk in results for _, _, pid in chunk}
    assert len(pids) <= workers
    # What setup made is kept from chunk to chunk.
    assert sum(max(n for chunk in results for _, n, by in chunk if by == pid) for pid in pids) == 40
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_only_a_few_chunks_are_taken_before_they_are_wanted() -> None:
    taken = []

    def coming() -> Iterator[list[int]]:
        for chunk in chunks(1000, 1):
            taken.append(chunk)
            yield chunk

    with closing(pool.run(square, coming(), setup=state, workers=2, stop=never, on_worker_death=on_death)) as results:
        for number, _ in zip(range(20), results):
            time.sleep(0.01)
            assert len(taken) <= number + 1 + 2 * 4


def test_no_items_are_no_results() -> None:
    assert list(pool.run(square, [], setup=state, workers=2, stop=never, on_worker_death=on_death)) == []


def test_errors_arrive_as_they_were_raised_and_bugs_with_their_traceback() -> None:
    with pytest.raises(DataError, match=r"^no space left$"):
        list(pool.run(fail, [[1, 3]], setup=state, workers=1, stop=never, on_worker_death=on_death))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(pool.run(fail, [[1], [4]], setup=state, workers=1, stop=never, on_worker_death=on_death))
    with pytest.raises(ConfigError, match=r"^the source is gone$"):
        list(pool.run(fail, [[1]], setup=unusable, workers=1, stop=never, on_worker_death=on_death))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 40])
def test_a_deadly_item_costs_that_item_and_an_accident_costs_nothing(
    workers: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accident = tmp_path / "accident"
    monkeypatch.setenv("ACCIDENT", str(accident))
    code = (
        "from pipeline.processes import pool; from tests.processes.test_pool import *; "
        f"print(list(pool.run(die, chunks(12, {size}), setup=state, workers={workers}, stop=never, "
        "on_worker_death=on_death, cpu_limit_s=1)))"
    )  # in a process of its own, whose fork server has this environment
    results = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    expected = [
        [(n, {5: -signal.SIGSEGV, 7: -signal.SIGXCPU}[n]) if n in (5, 7) else n for n in chunk]
        for chunk in chunks(12, size)
    ]
    assert eval(results) == [[(r[0], int(r[1])) if isinstance(r, tuple) else r for r in chunk] for chunk in expected]
    assert accident.exists()


def test_what_is_said_at_the_grave_may_end_the_job() -> None:
    def refuse(item: int, exit_code: int) -> int:
        raise DataError(f"{item} {exit_code}")

    with pytest.raises(DataError, match=r"^5 -11$"):
        list(pool.run(die, [[4, 5, 6]], setup=state, workers=1, stop=never, on_worker_death=refuse))


def large(accident: Path, items: Sequence[int], check_stop: CheckStop) -> Iterator[bytes]:
    """Results that fill the pipe; the first process dies while it sends them."""
    if not accident.exists():
        accident.touch()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for item in items:
        yield bytes([item]) * 1_000_000


def test_a_death_while_sending_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took = pool._Worker.take

    def late(worker: pool._Worker) -> Any:
        if not (tmp_path / "late").exists():
            (tmp_path / "late").touch()
            time.sleep(1)  # part of the message is in the pipe, and its writer dies
        return took(worker)

    monkeypatch.setattr(pool._Worker, "take", late)
    run = pool.run(
        large,
        [[1, 2], [3]],
        setup=partial(Path, tmp_path / "accident"),
        workers=1,
        stop=never,
        on_worker_death=on_death,
    )
    assert [[one[:1] for one in chunk] for chunk in run] == [[b"\1", b"\2"], [b"\3"]]


def test_workers_leave_no_core_files() -> None:
    assert list(pool.run(dump_core, [[0]], setup=state, workers=1, stop=never, on_worker_death=on_death)) == [[(0, 0)]]


def test_closing_stops_workers_within_an_item_and_lets_them_clean_up(tmp_path: Path) -> None:
    task = [str(tmp_path / "task")] * 100_000
    with closing(
        pool.run(
            hang, [task] * 3, setup=state, workers=2, on_worker_death=on_death,
            stop=lambda: len(list(tmp_path.iterdir())) == 2
        )
    ) as results:  # fmt: skip
        assert list(results) == []
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 4 and all(name.endswith(".cleaned") for name in names[::2])


def test_no_worker_outlives_a_job_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from pipeline.processes import pool; from tests.processes.test_pool import hang, never, state, on_death; "
        f"list(pool.run(hang, [['{tmp_path}/task'] * 100_000] * 2, setup=state, workers=2, stop=never, "
        "on_worker_death=on_death))"
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
