"""What the ranks of a node share: records that show who is alive, turns, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pipeline.cluster import node_directory
from pipeline.cluster.node_directory import NodeDirectory
from tests.conftest import ROOT

HOLDER = """
import sys
from pipeline.cluster import node_directory
node_directory.MEMORY = sys.argv[1]
with node_directory.NodeDirectory("s").turn("diagnosis", 60):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(node_directory, "MEMORY", str(tmp_path / "memory"))
    return tmp_path / "memory"


def test_ranks_of_a_node_see_each_other_and_those_of_other_nodes_and_starts_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, other_start = NodeDirectory("s"), NodeDirectory("s"), NodeDirectory("t")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    other_host = NodeDirectory("s")
    for rank, node in enumerate((first, second, other_start, other_host)):
        node.write_record(rank, b"%d" % rank)
    assert first.records() == second.records() == {0: b"0", 1: b"1"}
    assert (other_start.records(), other_host.records()) == ({2: b"2"}, {3: b"3"})


def test_the_version_of_a_record_changes_each_time_it_is_written() -> None:
    node, seen = NodeDirectory("s"), set()
    for _ in range(20):
        node.write_record(3, b"the same")
        seen.add(node.versions()[3])
        time.sleep(0.01)  # the time of a file system advances in ticks
    assert len(seen) == 20


def test_the_last_rank_to_leave_removes_the_directory(memory: Path) -> None:
    nodes = [NodeDirectory("s") for _ in range(3)]
    for node in nodes:
        node.enter()
    for node in nodes:
        assert len(list(memory.iterdir())) == 1
        node.leave()
    assert not list(memory.iterdir())


def test_what_killed_ranks_left_is_removed_by_a_later_start_and_what_is_in_use_is_not(memory: Path) -> None:
    killed, used, young = NodeDirectory("killed"), NodeDirectory("used"), NodeDirectory("young")
    for node in (killed, young):
        node.write_record(0, b"")
    used.enter()
    for node in (killed, used):
        os.utime(node._path, (time.time() - 3600,) * 2)
    NodeDirectory("new").enter()
    assert {path.name.split("-")[2] for path in memory.iterdir()} == {"used", "young", "new"}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_turn_ends_with_its_process(memory: Path, end: signal.Signals) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(memory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert holder.stdout and holder.stdout.readline() == b"mine\n"
    entered = threading.Event()

    def wait() -> None:
        with NodeDirectory("s").turn("diagnosis", 60):
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    with NodeDirectory("s").turn("record", 0):  # another matter
        assert not entered.wait(0.5)
    holder.send_signal(end)
    assert entered.wait(30)
    thread.join()
    holder.communicate()


def test_a_frozen_process_does_not_keep_the_others_from_their_turn(memory: Path) -> None:
    with NodeDirectory("s").turn("diagnosis", 0):
        begun = time.monotonic()
        with NodeDirectory("s").turn("diagnosis", 0.5):
            assert 0.5 <= time.monotonic() - begun < 20


@pytest.mark.parametrize("place", ["missing", "a file"])
def test_without_memory_the_directory_for_temporary_files_serves(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(node_directory, "MEMORY", str(tmp_path / "missing"))
    (tmp_path / "a file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(memory if place == "missing" else tmp_path / "a file"))
    node = NodeDirectory("s")
    node.enter()
    node.write_record(1, b"1")
    with node.turn("record", 1):  # nowhere to write: nothing is raised, and the rank is alone
        assert node.records() == ({1: b"1"} if place == "missing" else {})
    node.leave()
    assert node.read("1") is None and not list(memory.iterdir())
