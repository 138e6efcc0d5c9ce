"""The collectives of World, and ranks that lose each other: three real gloo processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cluster import world
from pipeline.errors import ConfigError, DataError, NoCheckpoint
from tests import warm
from tests.conftest import ROOT
from tests.launch import ENVIRONMENT

RANKS = 3
PREAMBLE = """
import json, os, sys, time
import torch
import torch.distributed as dist
from pipeline.errors import NoCheckpoint, DataError
from pipeline.cluster import world
w = world.init_distributed("cpu", float(os.environ["PATIENCE_S"]))
r = w.rank
def tell(value):
    print(json.dumps(value), flush=True)
"""


def together(
    code: str, patience_s: float = 60, timeout_s: float = 120, extra: Sequence[dict[str, str]] = ({},) * RANKS
) -> list[tuple[int, list[Any]]]:
    """Run the code on all ranks, each with its extra variables; its exit code and what it told."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**ENVIRONMENT, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "PATIENCE_S": str(patience_s)}  # fmt: skip
    processes = [
        warm.Popen([sys.executable, "-c", PREAMBLE + code], text=True, stdout=subprocess.PIPE,
                   env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), **extra[rank]},
                   cwd=ROOT)
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, [json.loads(line) for line in text.splitlines()])
            for process, text in zip(processes, told)]  # fmt: skip


def test_collectives_give_all_ranks_the_same_values() -> None:
    code = """
tell(w.all_reduce_max(r == 1, 7 - r, torch.tensor(r), ~torch.tensor(True), False))
tell(w.all_reduce_max(False)[0])
tell(w.on_rank0(lambda: {"asked of": r}))
tell(w.broadcast_object([r, None]))
tell(w.sum(torch.tensor([r + 1.0, 10.0])).tolist())
mine = torch.tensor([float(r)])
w.sum(mine)
tell(mine.tolist())
tell(w.gather(torch.full((2, 1), float(r))).flatten().tolist())
x = torch.arange(16.0).reshape(1, 2, 2, 4).contiguous(memory_format=torch.channels_last) * (r == 0)
count = torch.tensor(5 if r == 0 else -1)
w.broadcast_([x, count])
tell([x.flatten().tolist(), int(count), x.is_contiguous(memory_format=torch.channels_last)])
tell(w.is_main)
w.shutdown()
"""
    for rank, (code_of_exit, told) in enumerate(together(code)):
        assert code_of_exit == 0
        assert told == [
            [1, 7, 2, 0, 0],
            0,
            {"asked of": 0},
            [0, None],
            [6.0, 30.0],
            [float(rank)],
            [0.0, 0.0, 1.0, 1.0, 2.0, 2.0],
            [[float(i) for i in range(16)], 5, True],
            rank == 0,
        ]


def test_gradients_are_averaged_in_float32_or_sent_in_half_as_many_bits() -> None:
    code = """
for compression in ("none", "bf16"):
    torch.manual_seed(0)
    layer = torch.nn.Linear(1, 64)
    wrapped = w.data_parallel(layer, compression)
    wrapped(torch.full((1, 1), 1.0 + r / 1000)).square().sum().backward()
    tell(layer.weight.grad.flatten().tolist())
w.shutdown()
"""
    results = together(code)
    exact, sent = (torch.tensor(gradient) for gradient in results[0][1])
    assert results == [(0, [exact.tolist(), sent.tolist()])] * RANKS
    torch.testing.assert_close(sent, exact, rtol=2**-7, atol=0)
    assert not torch.equal(sent, exact) and torch.equal(sent.bfloat16().float(), sent)


def test_an_error_of_rank_0_is_raised_on_all_of_them_with_its_type_and_exit_code() -> None:
    code = """
def refuse():
    raise NoCheckpoint("none is valid")
def broken():
    raise OSError(5, "Input/output error", "/mnt/x")
for question in (refuse, broken):
    try:
        w.on_rank0(question)
    except Exception as error:
        tell([type(error).__name__, str(error), error.exit_code, error.is_told_elsewhere])
tell(w.on_rank0(lambda: "and they continue"))
w.shutdown()
"""
    line = "[Errno 5] Input/output error: '/mnt/x': check this file or directory, then run the same command again"
    for rank, result in enumerate(together(code)):
        errors = [["NoCheckpoint", "none is valid", 4, rank > 0], ["DataError", line, 3, rank > 0]]
        assert result == (0, [*errors, "and they continue"])


LOSING = """
w.all_reduce_max(0)
if r == 1:
    {how}
try:
    for _ in range(3):
        w.all_reduce_max(0)
    tell("nothing noticed")
except Exception as error:
    tell([world.is_lost_contact(error), "\\n" in str(error)])
os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "patience_s"),
    [("os._exit(9)", 60), ("os.kill(os.getpid(), 9)", 60), ("time.sleep(60)", 3)],
    ids=["ended", "killed", "silent"],
)
def test_a_rank_that_is_gone_or_silent_is_lost_contact(how: str, patience_s: float) -> None:
    results = together(LOSING.format(how=how if patience_s > 3 else "time.sleep(8); os._exit(9)"), patience_s)
    for rank in (0, 2):
        assert results[rank][1][0][0] is True, results


def test_other_errors_are_not_lost_contact() -> None:
    for error in (RuntimeError("CUDA error: device-side assert"), torch.OutOfMemoryError("CUDA out of memory"),
                  ValueError("gloomy"), DataError("x"), RuntimeError("shape '[2]' is invalid")):  # fmt: skip
        assert not world.is_lost_contact(error)


def test_one_process_needs_no_collective() -> None:
    alone = world.init_distributed("cpu", 60)
    assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)
    assert alone.all_reduce_max(True, 3, torch.tensor(False)) == [1, 3, 0]
    assert alone.on_rank0(lambda: "it") == alone.broadcast_object("it") == "it"
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(alone.sum(values), values) and torch.equal(alone.gather(values), values)

    def refuse() -> None:
        raise NoCheckpoint("none")

    with pytest.raises(NoCheckpoint):
        alone.on_rank0(refuse)


def test_a_launch_that_is_not_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ConfigError, match="WORLD_SIZE is 4, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"
    ):
        world.init_distributed("cpu", 60)


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device here"):
        world.init_distributed("cuda", 60)


def test_a_file_of_a_store_reaches_every_node_from_rank_0_alone(tmp_path: Path) -> None:
    """Each rank is a node with a temporary directory of its own; only rank 0's process has the store in memory."""
    code = """
import hashlib, tempfile
from pipeline.storage import files
from pipeline.storage.mapped_file import FileReference
data = bytes(range(256)) * 40_000  # two pieces and a half
tempfile.tempdir = os.environ["PLACE"]
if r == 2 and os.environ["FULL"] == "1":
    def refuse(*args, **options):
        raise DataError("no space left")
    files.publishing = refuse
file = FileReference("memory://bucket/table.bin", len(data), hashlib.sha256(data).hexdigest())
if r == 0:
    files.write_bytes(file.url, data)
    file.fetch()
w.copy_to_nodes(file)
try:
    tell(file.map().tobytes() == data)
except Exception as error:
    tell(type(error).__name__)
if os.environ["FULL"] == "0":
    w.copy_to_nodes(file)  # all have it
    local = FileReference(str(file.node_path), len(data), file.sha256)
    w.copy_to_nodes(local)
    local.fetch()
    tell((local.map()[:3]).tolist())
"""
    for full, expected in (("0", [[True, [0, 1, 2]]] * 3), ("1", [[True], [True], ["FileNotFoundError"]])):
        places = [tmp_path / full / str(rank) for rank in range(RANKS)]
        for place in places:
            place.mkdir(parents=True)
        told = together(code, extra=[{"PLACE": str(place), "FULL": full, "LOCAL_RANK": "0"} for place in places])
        assert told == [(0, values) for values in expected]
