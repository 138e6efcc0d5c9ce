"""64 ranks on 8 nodes as real processes, and a thousand as a model: what they write and read, and whom they name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import heartbeat
from pipeline.cluster.heartbeat import Heartbeat
from tests import warm
from tests.cluster import forked_ranks
from tests.conftest import ROOT
from tests.launch import ENVIRONMENT

RANKS, OF_NODE = 64, 8
NODES = RANKS // OF_NODE
EVERY_S = RANKS / (OF_NODE * forked_ranks.WRITES_PER_S)


class Job:
    """The forked ranks."""

    def __init__(self, run: Path, place: Path) -> None:
        self.run, self.place = run, place
        command = [sys.executable, "-m", "tests.cluster.forked_ranks", str(run), str(place), str(RANKS), str(OF_NODE)]
        self._parent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._parent.stdout
        self.pids: list[int] = json.loads(self._parent.stdout.readline())

    def operations(self, first: int = 0) -> list[list[str]]:
        """Rank, function and path of each operation on the run, from the first-th on."""
        return [line.split() for line in (self.place / "operations").read_text().splitlines()[first:]]

    def seen(self) -> set[int]:
        """The ranks in the files of the nodes."""
        nodes = [json.loads(path.read_text()) for path in (self.run / "control/nodes").glob("[!.]*")]
        return {beat["rank"] for node in nodes for beat in node["ranks"]}

    def end(self) -> None:
        """Kill the ranks."""
        self._parent.communicate("")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    begun = Job(tmp_path / "run", tmp_path / "place")
    yield begun
    begun.end()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_64_processes_write_a_file_a_node_and_name_the_dead_and_the_frozen_also_if_they_write_for_a_node(
    job: Job,
) -> None:
    until(lambda: job.seen() == set(range(RANKS)), "not all ranks are seen")

    begun, first = time.monotonic(), len(job.operations())
    time.sleep(3)
    seconds, written = time.monotonic() - begun, job.operations(first)
    assert {function for _, function, _ in written} == {"write_bytes"}
    paths = Counter(path for _, _, path in written)
    assert set(paths) <= {f"/control/nodes/{rank:05d}.json" for rank in range(0, RANKS, OF_NODE)}, paths
    assert max(paths.values()) <= 2 * (seconds / EVERY_S + 1), paths  # two ranks write for one that waits for a core

    killed, frozen = [16, 37], [24, 45]  # 16 and 24 are the first of their nodes
    for rank in killed:
        os.kill(job.pids[rank], signal.SIGKILL)
    for rank in frozen:
        os.kill(job.pids[rank], signal.SIGSTOP)
    expected = "; ".join(
        f"rank {rank} (process {job.pids[rank]} on node{rank // OF_NODE}), silent, last seen in update at step 5"
        for rank in sorted(killed + frozen)
    )
    first = len(job.operations())
    os.kill(job.pids[0], signal.SIGUSR1)
    until((job.place / "diagnosis").exists, "no diagnosis")
    assert (job.place / "diagnosis").read_text() == expected
    assert Counter(function for _, function, _ in job.operations(first))["read_json"] == 2 * NODES

    # Now all living ranks lose contact at once: one diagnoses, and all tell the same.
    living = [rank for rank in range(RANKS) if rank not in killed + frozen]
    begun, first = time.monotonic(), len(job.operations())
    for rank in living:
        os.kill(job.pids[rank], signal.SIGUSR2)
    told = [job.place / f"told-{rank}" for rank in living]
    until(lambda: all(path.exists() and path.read_text() for path in told), "not all ranks are told")
    seconds, done = time.monotonic() - begun, job.operations(first)
    assert all(expected in path.read_text() for path in told)
    assert expected in json.loads((job.run / "FAILED.json").read_text())["error"]
    functions = Counter((function, path.rpartition("/")[2]) for _, function, path in done)
    assert functions["listdir", "nodes"] == 2, functions
    assert sum(function == "read_json" and "/nodes/" in path for _, function, path in done) == 2 * NODES
    assert functions["create", "diagnosing.json"] <= NODES and functions["create", "FAILED.json"] == 1, functions
    assert functions["read_json", "FAILED.json"] <= NODES * (seconds / EVERY_S + 3), functions


# --- 64 gloo processes, forked from one that has imported torch ---

TOGETHER = """
import os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from pipeline.cluster.world import World
from pipeline.errors import DataError
place, size = sys.argv[1], int(sys.argv[2])
pids = []
for rank in range(size):
    pids.append(os.fork())
    if pids[-1] == 0:
        break
else:
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))
store = dist.FileStore(f"{place}/store", size)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=90))
world = World(None, rank, size, torch.device("cpu"))
calls = []
def read():
    calls.append(rank)
    return {"read by": rank, "bytes": b"x" * 1_000_000}
def fail():
    calls.append(rank)
    raise DataError("the shard set is gone")
got = world.on_rank0(read)
assert got["read by"] == 0 and len(got["bytes"]) == 1_000_000, got
try:
    world.on_rank0(fail)
    raise AssertionError("no error")
except DataError as error:
    assert str(error) == "the shard set is gone" and error.is_told_elsewhere == (rank > 0)
weights = torch.full((1000,), float(rank))
world.broadcast_([weights])
assert weights.sum() == 0
assert world.broadcast_object(f"start {rank}") == "start 0"
assert world.all_reduce_max(rank, rank == 17, False) == [size - 1, 1, 0]
assert calls == ([0, 0] if rank == 0 else [])
open(f"{place}/done-{rank}", "x").close()
dist.barrier()
os._exit(0)
"""


def test_what_rank_0_does_for_63_others_is_done_once_and_reaches_all(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOGETHER, str(tmp_path), str(RANKS)]
    ended = warm.run(command, timeout_s=100, env=ENVIRONMENT, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert len(list(tmp_path.glob("done-*"))) == RANKS


# --- a thousand ranks in one process, with a clock of their own ---


class Memory(dict[int, bytes]):
    """Stands in for NodeDirectory."""

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[int, tuple[int, int]] = {}
        self.is_full = False

    def write_record(self, rank: int, data: bytes) -> bool:
        if not self.is_full:
            self[rank] = data
            self._versions[rank] = self._versions.get(rank, (0, 0))[0] + 1, 0
        return not self.is_full

    def records(self) -> dict[int, bytes]:
        return self

    def versions(self) -> dict[int, tuple[int, int]]:
        return self._versions


class Model:
    """Ranks on nodes of given sizes, and the storage of their run, which counts. Stands in for `time` and `files`."""

    def __init__(self, sizes: list[int]) -> None:
        self.now, self.dead = 0.0, set[int]()
        self.stored, self.counts = dict[str, bytes](), Counter[str]()
        nodes = [node for node, size in ((Memory(), size) for size in sizes) for _ in range(size)]
        self.ranks = [Heartbeat("run", rank, len(nodes), start="s", patience_s=1e6, on_stall=lambda: None)
                      for rank in range(len(nodes))]  # fmt: skip
        for beat, node in zip(self.ranks, nodes):
            beat.node = node  # type: ignore[assignment]
            beat._written_at = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """The time in which all living ranks beat."""
        self.now += seconds
        for beat in self.ranks:
            if beat.rank not in self.dead:
                beat._beat()
                beat._write_if_due()

    def write_bytes(self, url: str, data: bytes, *, durable: bool) -> None:
        self.counts["written"] += 1
        self.stored[url] = data

    def listdir(self, url: str) -> list[str]:
        self.counts["listed"] += 1
        return [name.rpartition("/")[2] for name in self.stored]

    def read_json(self, url: str) -> Any:
        self.counts["read"] += 1
        return json.loads(self.stored[url])

    @staticmethod
    def join(*parts: str) -> str:
        return "/".join(parts)


Begin = Callable[[list[int]], Model]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Begin:
    def begin(sizes: list[int]) -> Model:
        begun = Model(sizes)
        monkeypatch.setattr(heartbeat, "time", begun)
        monkeypatch.setattr(heartbeat, "files", begun)
        for _ in range(30):  # longer than any node waits between two writes
            begun.sleep(1.0)
        return begun

    return begin


@pytest.mark.parametrize(
    "sizes", [[8], [8] * 16, [8] * 125, [1] * 1000, [8] * 60 + [1] * 520], ids=lambda sizes: f"{len(sizes)} nodes"
)
def test_nodes_write_40_files_a_second_at_most_whatever_their_number_and_sizes(model: Begin, sizes: list[int]) -> None:
    job = model(sizes)
    of_second = []
    for _ in range(100):
        before = job.counts["written"]
        job.sleep(1.0)
        of_second.append(job.counts["written"] - before)
    most = min(len(sizes) / heartbeat.WRITE_S, heartbeat.WRITES_PER_S) * 100 + len(sizes)
    assert most / 2 < sum(of_second) <= most
    assert max(of_second) <= 2 * heartbeat.WRITES_PER_S, "nodes write at the same time"
    assert set(job.counts) == {"written"} and len(job.stored) == len(sizes)


def test_a_diagnosis_of_a_thousand_ranks_reads_the_file_of_each_node_twice(model: Begin) -> None:
    job = model([8] * 125)
    job.dead = {8, *range(504, 510), 999}  # the first of a node, most of a node, the last of a node
    job.counts.clear()
    begun = job.now
    said = job.ranks[0].diagnose()
    assert [int(line.split()[1]) for line in said.split("; ")] == sorted(job.dead), said
    assert (job.counts["read"], job.counts["listed"]) == (2 * 125, 2)
    assert job.now - begun < 12


def test_a_lost_node_of_a_thousand_ranks_is_told_in_a_line_of_bounded_length(model: Begin) -> None:
    job = model([50] * 20)
    job.dead = set(range(150, 200))
    said = job.ranks[999].diagnose()
    assert said.startswith("rank 150 (process ") and said.count("silent") == 16 and said.endswith("; and 34 more")


@pytest.mark.parametrize("seconds", range(4))
def test_a_death_at_any_moment_before_a_diagnosis_is_told(model: Begin, seconds: int) -> None:
    job = model([4, 4, 4])
    for rank in (1, 4, 8, 0):  # 4 and 8 write for their nodes; 0 for that of the rank that asks
        job.dead.add(rank)
        for _ in range(seconds):
            job.sleep(1.0)
        said = job.ranks[3].diagnose()
        assert [int(line.split()[1]) for line in said.split("; ")] == sorted(job.dead), said


def test_ranks_whose_node_has_no_memory_left_are_not_dead(model: Begin) -> None:
    job = model([8] * 4)
    for beat in job.ranks:
        beat.node.is_full = True  # type: ignore[attr-defined]
    job.dead = {9}
    said = job.ranks[31].diagnose()
    assert said.startswith("rank 9 (process ") and "; " not in said


def test_of_the_nodes_that_stall_the_first_diagnoses_at_once_and_few_others_before_it_has_ended(model: Begin) -> None:
    job = model([8] * 125)
    starts = [job.ranks[rank].head_start_s for rank in range(0, 1000, 8)]
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] < 180 - 20  # 30 % of the default run.timeout
    one_s = starts[1] / 2
    assert [sum(start < one_s * i for start in starts) for i in (1.9, 3.9, 5.9)] == [1, 2, 4]
