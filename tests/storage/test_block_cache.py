"""The cache of a node: what it holds, who shares it, its limit, and what faults do to it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.storage import files
from pipeline.storage.block_cache import BlockCache
from tests.conftest import ROOT

FILE = "ab" * 32


class Store:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> bytes:
        self.asked += 1
        return bytes([self.asked]) * 1000


def size_of(place: Path) -> int:
    return sum(path.stat().st_size for path in place.glob("*/*/*"))


def test_a_block_is_read_from_the_store_once_by_all_processes_and_starts(tmp_path: Path) -> None:
    store, cache = Store(), BlockCache(str(tmp_path), 10**6, "set")
    block = cache.get(FILE, 0, store)
    assert cache.get(FILE, 0, store) == block and cache.get(FILE, 1, store) != block
    worker = pickle.loads(pickle.dumps(cache))
    assert worker.get(FILE, 0, store) == block
    del cache, worker
    assert BlockCache(str(tmp_path), 10**6, "set").get(FILE, 0, store) == block and store.asked == 2
    assert BlockCache(str(tmp_path), 10**6, "other").get(FILE, 0, store) != block


def test_the_limit_holds_and_what_is_there_stays(tmp_path: Path) -> None:
    store, cache = Store(), BlockCache(str(tmp_path), 5_500, "set")
    blocks = [cache.get(FILE, i, store) for i in range(9)]
    assert size_of(tmp_path) == 5 * 1004
    assert [cache.get(FILE, i, store) for i in range(5)] == blocks[:5] and store.asked == 9
    assert cache.get(FILE, 5, store) != blocks[5]  # read again


def test_a_full_cache_removes_a_set_that_nobody_uses_and_no_other(tmp_path: Path) -> None:
    store = Store()
    used, unused = (BlockCache(str(tmp_path), 5_500, name) for name in ("used", "unused"))
    for cache in (used, unused):
        cache.get(FILE, 0, store)
        cache.get(FILE, 1, store)
    del cache, unused
    mine = BlockCache(str(tmp_path), 5_500, "mine")
    for i in range(4):
        mine.get(FILE, i, store)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"used", "mine"}
    assert size_of(tmp_path) == 5 * 1004
    asked = store.asked
    used.get(FILE, 0, store)
    assert store.asked == asked


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" + data[1:]])
def test_a_damaged_block_is_read_from_the_store_again(tmp_path: Path, damage) -> None:
    store, cache = Store(), BlockCache(str(tmp_path), 2_500, "set")
    cache.get(FILE, 0, store)
    (path,) = tmp_path.glob("set/ab/*")
    path.write_bytes(damage(path.read_bytes()))
    again = cache.get(FILE, 0, store)
    assert again == bytes([2]) * 1000 and cache.get(FILE, 0, store) == again
    cache.get(FILE, 1, store)
    assert size_of(tmp_path) == 2 * 1004  # the damaged block no longer counts


def test_what_a_killed_process_left_is_removed_and_counted_anew(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pipeline.storage import files
from pipeline.storage.block_cache import BlockCache
cache = BlockCache({str(tmp_path)!r}, 10**5, "set")
publishing = files.publishing
def slow(*args, **options):
    return publishing(*args, **options)
cache.get({FILE!r}, 0, lambda: bytes(1000))
import pipeline.storage.block_cache as module
def stuck(path, data, durable):
    with files.publishing(path, durable=False) as file:
        file.write(data[:500])
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
module.files.write_bytes = stuck
cache.get({FILE!r}, 1, lambda: bytes(1000))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    store = Store()
    beside = BlockCache(str(tmp_path), 10**5, "set")  # the other process lives: nothing is removed
    assert len(list(tmp_path.glob("set/ab/.*"))) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert beside.get(FILE, 0, store) == bytes(1000) and store.asked == 0
    del beside
    cache = BlockCache(str(tmp_path), 2 * 1004, "set")
    assert not list(tmp_path.glob("set/ab/.*"))
    cache.get(FILE, 1, store)
    assert size_of(tmp_path) == 2 * 1004
    cache.get(FILE, 2, store)
    assert size_of(tmp_path) == 2 * 1004


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        BlockCache(str(tmp_path / "file"), 10**6, "set")


def test_a_full_disk_is_one_warning_and_the_store_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, cache = Store(), BlockCache(str(tmp_path), 10**6, "set")

    def full(*args: object, **options: object) -> None:
        raise DataError("no space left")

    monkeypatch.setattr(files, "write_bytes", full)
    blocks = [cache.get(FILE, i, store) for i in range(3)]
    assert [block[0] for block in blocks] == [1, 2, 3]
    assert capsys.readouterr().err.count("data.cache: no more blocks are added by this process: no space left") == 1


def test_processes_that_add_at_once_keep_the_limit(tmp_path: Path) -> None:
    code = f"""
import sys
from pipeline.storage.block_cache import BlockCache
cache = BlockCache({str(tmp_path)!r}, 100 * 1004, "set")
wrong = sum(cache.get({FILE!r}, i, lambda: bytes([i]) * 1000) != bytes([i]) * 1000 for i in range(200))
sys.exit(wrong)
"""
    started = time.monotonic()
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4, time.monotonic() - started
    # Two processes may count a block that both read, so fewer blocks may be there, never more.
    assert 30 * 1004 <= size_of(tmp_path) <= 100 * 1004


def test_threads_that_want_one_block_load_it_once(tmp_path: Path) -> None:
    cache, asked = BlockCache(str(tmp_path), 10**6, "set"), []

    def load() -> bytes:
        asked.append(1)
        time.sleep(0.2)
        return bytes(1000)

    with ThreadPoolExecutor(4) as threads:
        blocks = list(threads.map(lambda _: cache.get(FILE, 0, load), range(4)))
    assert blocks == [bytes(1000)] * 4 and len(asked) == 1
