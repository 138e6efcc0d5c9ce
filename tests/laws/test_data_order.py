"""The data goes on as if nothing had happened, whatever is signalled, killed or left open."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from pipeline.data.images.preprocess import encode
from pipeline.data.loading.batches import Batches
from pipeline.data.loading.order import Order
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.shard_set import Sample, ShardSet, pack, write_shard
from pipeline.errors import DataError
from tests.remote.website import Website

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

ROOT = Path(__file__).parents[2]
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url, records = str(tmp_path_factory.mktemp("set")), []
    for shard, samples in enumerate((7, 30, 13)):
        images = (encode(np.full((4, 4, 1), i, dtype=np.uint8), "png") for i in range(samples))
        content = [Sample(f"{i:09d}", x, "png", 100 * shard + i, {}) for i, x in enumerate(images)]
        records.append(write_shard(url, f"set-{shard:06d}", map(pack, content), dict))
    write_index(url, records, size=(4, 4), channels=1, classes=None, source={}, settings={}, counts={})
    return url


def open_batches(url: str, workers: int, step: int = 0, rank: int = 0, world_size: int = 1) -> Batches:
    shards = ShardSet.open(url)
    order = Order(seed=1, shard_samples=shards.shard_samples, global_batch=12, lanes=4, window=8)
    return Batches(shards, order, rank=rank, world_size=world_size, first_sample=12 * step, workers=workers, flip=True)


def labels(url: str, steps: int) -> list[list[int]]:
    return [batch.labels.tolist() for batch in islice(open_batches(url, workers=0), steps)]


def descendants() -> list[psutil.Process]:
    return list(psutil.Process().children(recursive=True))


def wait_until_gone(pids: list[int], seconds: float) -> None:
    """A zombie counts as gone: whoever has to collect it may take its time."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, (
            f"still alive after {seconds} s: {[psutil.Process(p).cmdline() for p in left]}"
        )
        time.sleep(0.05)


@contextmanager
def job(url: str, body: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own that runs `body`, with `batches` and the names of this module at hand."""
    program = f"from tests.laws.test_data_order import *\nurl = {url!r}\n{body}"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_stop_signals_do_nothing_to_loader_processes(url: str) -> None:
    expected = labels(url, 12)
    with open_batches(url, workers=2) as batches:
        got = [next(batches).labels.tolist()]
        assert len(multiprocessing.active_children()) == 2
        for process in descendants():  # the workers, and the helpers of multiprocessing that they hang on
            for number in STOP_SIGNALS:
                process.send_signal(number)
        got += [batch.labels.tolist() for batch in islice(batches, 11)]
    assert got == expected


def test_stop_signals_to_the_whole_process_group_do_nothing_from_the_first_moment(url: str) -> None:
    body = """
for number in STOP_SIGNALS:
    signal.signal(number, lambda *_: None)  # a handler, as a trainer has: ignoring would be inherited
print("ready", flush=True)
with open_batches(url, workers=2) as batches:
    for batch in islice(batches, 12):
        print(batch.labels.tolist(), flush=True)
print("closed", flush=True)
time.sleep(60)
"""
    with job(url, body) as process, ThreadPoolExecutor(1) as reader:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        lines = reader.submit(lambda: list(takewhile("closed\n".__ne__, process.stdout or ())))
        while not lines.done():
            for number in STOP_SIGNALS:
                os.killpg(process.pid, number)
            time.sleep(0.02)
        assert [line.strip() for line in lines.result()] == [str(step) for step in labels(url, 12)]


def test_a_killed_loader_process_is_one_line_and_no_hang(url: str) -> None:
    with open_batches(url, workers=2) as batches:
        next(batches)
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid or 0, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(DataError) as died:
            [*islice(batches, 100)]
        assert time.monotonic() - started < 20
        assert str(died.value) == (
            f"loader process {victim.pid} died (SIGKILL): most often memory or shared memory has run out; lower "
            "data.workers (0 needs no shared memory) or data.window, or raise the limit"
        )
        assert multiprocessing.active_children() == []


def test_loader_processes_die_with_a_killed_parent(url: str) -> None:
    body = """
batches = open_batches(url, workers=2)
next(batches)
print(*(process.pid for process in descendants()), flush=True)
time.sleep(60)
"""
    with job(url, body) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) >= 4  # two workers, the server that forked them, the resource tracker
        process.kill()
        wait_until_gone(pids, seconds=10)


def test_a_job_that_does_not_close_its_batches_ends_all_the_same(
    url: str, end: str = "raise RuntimeError", code: int = 1
) -> None:
    body = f"""
sys.stderr = open(os.devnull, "w")
batches = open_batches(url, workers=2)
next(batches)
print(*(process.pid for process in descendants()), flush=True)
{end}
"""
    with job(url, body) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert process.wait(timeout=60) == code
        wait_until_gone(pids, seconds=10)


def test_forgotten_batches_leave_no_process(url: str) -> None:
    batches = open_batches(url, workers=2)
    next(batches)
    pids = [process.pid or 0 for process in multiprocessing.active_children()]
    assert len(pids) == 2
    del batches
    wait_until_gone(pids, seconds=10)


def test_closing_does_not_wait_for_a_stuck_read(url: str) -> None:
    with Website(Path(url)) as site:
        shards = ShardSet.open(site.url)
        order = Order(seed=1, shard_samples=shards.shard_samples, global_batch=12, lanes=4, window=8)
        site.hold(".tar")
        batches = Batches(shards, order, rank=0, world_size=1, first_sample=0, workers=2, flip=False)
        while site.held < 2:
            time.sleep(0.1)
        started = time.monotonic()
        batches.close()
        assert 1 < time.monotonic() - started < 8
        assert multiprocessing.active_children() == []


def test_a_run_killed_again_and_again_sees_the_data_of_an_unbroken_one_in_order(url: str, tmp_path: Path) -> None:
    """Ranks 4 → 1 → 2 with kill -9 in between; what is done is what the trainer has written down."""
    log = tmp_path / "log"
    log.touch()
    for world_size, workers, until in ((4, 1, 5), (1, 3, 10), (2, 0, 15)):
        body = f"""
step = len(open({str(log)!r}).read().splitlines())
ranks = [open_batches(url, {workers}, step, rank, {world_size}) for rank in range({world_size})]
while True:
    line = [label for batches in ranks for label in next(batches).labels.tolist()]
    with open({str(log)!r}, "a") as log:
        log.write(str(line) + chr(10))
    print("done", flush=True)
"""
        with job(url, body) as process:
            assert process.stdout is not None
            while len(log.read_text().splitlines()) < until:
                assert process.stdout.readline() == "done\n"
            process.kill()
            process.wait()
    done = log.read_text().splitlines()
    assert done == [str(step) for step in labels(url, len(done))]
