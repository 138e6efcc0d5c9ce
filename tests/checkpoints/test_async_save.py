"""Saving beside training: what is saved is the step's, and whatever goes wrong costs the save and is told once."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.checkpoints import async_save
from pipeline.checkpoints.async_save import Saver
from pipeline.checkpoints.checkpoint import newest_checkpoint
from pipeline.cluster import world
from pipeline.config import Config
from pipeline.errors import DataError, RunHeld
from pipeline.storage import files
from pipeline.training.intervals import Schedule
from pipeline.training.run_log import RunLog
from pipeline.training.train_state import TrainState
from pipeline.units import EpochCounter
from tests.checkpoints.test_checkpoint import assert_holds, directory, kept, parts
from tests.disk import SmallDisk, small_disk

LARGE = 20_000
"""Values in a tensor that a small disk notices."""


def saver(run: str, lines: list[str], **settings: Any) -> Saver:
    defaults = {"keep_last": 2, "keep_every": 0, "generation": 1, "patience_s": 60.0, "warn": lines.append}
    nothing = {"check_lease": lambda: None, "on_saved": lambda: None}
    return Saver(run, **{**defaults, **nothing, **settings})


def save(saver: Saver, step: int, *, wait: bool = True) -> bool:
    begun = saver.save(step, parts(step), {"step": step})
    if wait:
        saver.collect_result(wait=True)
    return begun


class Gate:
    """A `check_lease` that does not return before it is opened, as on a file system that hangs."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.open.wait(60)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.parametrize("where", ["local", "memory"])
def test_saves_follow_each_other_and_old_checkpoints_are_removed(run: str, where: str, lines: list[str]) -> None:
    place = run if where == "local" else f"memory://{uuid.uuid4().hex}/run"
    with saver(place, lines, generation=7) as it:
        for step in (10, 20, 30, 40):
            assert save(it, step)
            assert_holds(newest_checkpoint(place)[0], step)
        assert it.figures["checkpoint/failed"] == 0 and it.problem is None and lines == []
        assert it.figures["checkpoint/save_s"] > 0 and it.figures["checkpoint/stall_s"] > 0
    assert kept(place) == [30, 40]
    assert json.loads(files.read_bytes(files.join(directory(place, 40), "manifest.json")))["generation"] == 7


def test_tensors_may_change_as_soon_as_save_returns(run: str, lines: list[str]) -> None:
    gate, live = Gate(), parts(10) | {"large": {"weight": torch.zeros(10_000_000)}}
    with saver(run, lines, check_lease=gate) as it:
        assert it.save(10, live, {"step": 10})
        for tensors in reversed(live.values()):
            for tensor in tensors.values():
                tensor.fill_(torch.nan)  # the next step, before a byte is written
        gate.open.set()
        it.collect_result(wait=True)
    found, _ = newest_checkpoint(run)
    assert_holds(found, 10)
    assert found and not found.tensors("large")["weight"].any()


def test_training_continues_during_a_save(run: str, lines: list[str]) -> None:
    gate = Gate()
    with saver(run, lines, check_lease=gate) as it:
        save(it, 10, wait=False)
        it.collect_result()  # does not wait
        assert newest_checkpoint(run)[0] is None and "checkpoint/save_s" not in it.figures
        gate.open.set()


def test_a_save_waits_for_the_previous_save(run: str, lines: list[str]) -> None:
    gate, order = Gate(), []
    with saver(run, lines, check_lease=gate, on_saved=lambda: order.append("ended")) as it:
        save(it, 10, wait=False)
        threading.Timer(0.3, lambda: (order.append("released"), gate.open.set())).start()
        assert save(it, 20, wait=False)
        order.append("begun")
        assert order[:2] == ["released", "ended"] and it.figures["checkpoint/stall_s"] > 0.2
    assert kept(run) == [10, 20] and lines == []
    assert_holds(newest_checkpoint(run)[0], 20)


def test_a_save_that_hangs_skips_the_next_save_and_does_not_end_the_run(run: str, lines: list[str]) -> None:
    gate = Gate()
    with saver(run, lines, check_lease=gate, patience_s=0.2) as it:
        save(it, 10, wait=False)
        for failed, step in enumerate((20, 30), 1):
            began = time.monotonic()
            assert not save(it, step, wait=False)
            assert 0.2 <= time.monotonic() - began < 30
            assert it.problem == "the previous save has not ended in 0 s"
            assert it.figures["checkpoint/failed"] == failed
        assert len(lines) == 1 and lines[0].startswith("step 20 is not saved, training continues")
        gate.open.set()
        it.collect_result(wait=True)
        assert_holds(newest_checkpoint(run)[0], 10)
        assert save(it, 40)
    assert_holds(newest_checkpoint(run)[0], 40)
    assert kept(run) == [10, 40]


def test_the_newest_safe_checkpoint_may_be_the_one_that_is_being_written(run: str, lines: list[str]) -> None:
    gate, position = Gate(), {"bad_in_a_row": 0, "ema_updates": 10}
    with saver(run, lines, check_lease=gate) as it:
        assert it.save(10, parts(10), {"step": 10, "position": position})
        threading.Timer(0.2, gate.open.set).start()
        assert it.newest_safe_checkpoint(11) == "step_00000010"
        assert it.newest_safe_checkpoint(10) is None


def test_a_last_save_that_is_skipped_is_an_error(run: str, lines: list[str]) -> None:
    """Also if the one before it ends well at last: the step is not saved, whatever is lines of another."""
    gate = Gate()
    with saver(run, lines, check_lease=gate, patience_s=0.2) as it:
        save(it, 10, wait=False)
        config = Config.model_validate({"run": {"dir": run}})
        alone, schedule = world.init_distributed("cpu", 60), Schedule(EpochCounter(1, 1), config.run)
        lease = SimpleNamespace(lost=False, generation=1, check=lambda: None)
        log = RunLog(config, alone, TrainState(step=20), schedule, lease, None, quiet=True)  # type: ignore[arg-type]
        log._saver = it
        threading.Timer(1.0, gate.open.set).start()
        problem = log.save(parts(20), {}, wait=True)
        assert problem and problem.startswith("the previous save has not ended")
    assert_holds(newest_checkpoint(run)[0], 10)


def test_an_unexpected_error_is_raised_at_the_next_step(run: str, lines: list[str]) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    with saver(run, lines, check_lease=broken) as it:
        save(it, 10, wait=False)
        with pytest.raises(ZeroDivisionError):
            it.collect_result(wait=True)
        with pytest.raises(ZeroDivisionError):
            save(it, 20)


def test_a_save_is_finished_before_the_process_ends_by_an_error(run: str, lines: list[str]) -> None:
    gate = Gate()
    with pytest.raises(KeyError), saver(run, lines, check_lease=gate) as it:
        save(it, 10, wait=False)
        assert gate.entered.wait(60)
        threading.Timer(0.2, gate.open.set).start()
        raise KeyError
    assert_holds(newest_checkpoint(run)[0], 10)


def test_on_saved_is_called_after_a_save_and_not_after_a_failed_save(run: str, lines: list[str]) -> None:
    seen: list[int | None] = []
    lost = False

    def check_lease() -> None:
        if lost:
            raise RunHeld("held by job 2")

    def on_saved() -> None:
        found, _ = newest_checkpoint(run)
        seen.append(found and found.step)

    with saver(run, lines, check_lease=check_lease, on_saved=on_saved) as it:
        save(it, 10)
        lost = True
        save(it, 20)
        assert it.problem == "held by job 2"
    assert seen == [10]
    assert kept(run) == [10] and lines[0].endswith("held by job 2")


def test_retention_that_fails_is_not_taken_for_a_save_that_failed(
    run: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may let nobody delete; the step is saved all the same, and a last save is none to fail for."""

    def forbidden(*_: object, **__: object) -> None:
        raise DataError("cannot remove step_00000010: permission denied")

    monkeypatch.setattr(async_save, "remove_old", forbidden)
    with saver(run, lines) as it:
        save(it, 10)
        save(it, 20)
        assert it.problem is None
        assert it.figures["checkpoint/failed"] == 2
    assert lines == [
        "step 10 is saved, but cleaning up after it failed, training continues (checkpoint/failed counts): "
        "cannot remove step_00000010: permission denied"
    ]
    assert_holds(newest_checkpoint(run)[0], 20)


def test_only_checkpoints_that_this_process_has_not_verified_are_read_again(
    run: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver(run, lines) as it:
        save(it, 10)
        save(it, 20)
    hashed, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda url: (hashed.append(url), sha256(url))[1])
    with saver(run, lines, verified_path=directory(run, 20), keep_last=3) as it:
        for step in (30, 40, 50):
            save(it, step)
    assert kept(run) == [30, 40, 50]
    read_again = {url.rpartition("/")[0] for url in hashed if not url.endswith("manifest.json")}
    assert read_again == {directory(run, 10)}


# --- a file system that fails while training goes on ---


def large(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {"weight": torch.full((LARGE,), float(step))} for part in ("model", "ema", "optimizer")}


def assert_costs_only_the_save(it: Saver, lines: list[str], run: str, reason: str) -> None:
    """Two saves fail, which is lines once; the checkpoint of step 10 is untouched and nothing else lies there."""
    before = {path: path.read_bytes() for path in Path(directory(run, 10)).iterdir()}
    for failed, step in enumerate((20, 30), 1):
        it.save(step, large(step), {"step": step})
        it.collect_result(wait=True)
        assert it.problem is not None and reason in it.problem and "\n" not in it.problem
        assert it.figures["checkpoint/failed"] == failed
    assert len(lines) == 1 and reason in lines[0]
    assert lines[0].startswith("step 20 is not saved, training continues (checkpoint/failed counts): cannot write")
    assert kept(run) == [10]
    assert before == {path: path.read_bytes() for path in Path(directory(run, 10)).iterdir()}


def assert_works_again(it: Saver, run: str) -> None:
    it.save(40, large(40), {"step": 40})
    it.collect_result(wait=True)
    assert it.problem is None and it.figures["checkpoint/failed"] == 2
    found, rejected = newest_checkpoint(run)
    assert found and found.step == 40 and rejected == []
    assert torch.equal(found.tensors("ema")["weight"], large(40)["ema"]["weight"])


@pytest.mark.parametrize("estimated", [True, False], ids=["seen to come", "met while writing"])
def test_a_full_disk(disk: SmallDisk, lines: list[str], estimated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(disk.path / "run")
    with saver(run, lines) as it:
        it.save(10, large(10), {"step": 10})
        it.collect_result(wait=True)
        needed = sum(path.stat().st_size for path in Path(directory(run, 10)).iterdir() if path.name != "manifest.json")
        disk.fill(leaving=LARGE * 6)
        free = files.free_bytes(run)
        if not estimated:
            monkeypatch.setattr(files, "free_bytes", lambda url: None)
        assert_costs_only_the_save(it, lines, run, "are free: make room" if estimated else "no space left")
        if estimated:
            assert f"it takes {needed:,} bytes and {free:,} are free" in lines[0]
        disk.make_room()
        assert_works_again(it, run)
    assert not list(disk.path.rglob(".*.tmp"))


def test_a_disk_that_becomes_read_only(disk: SmallDisk, lines: list[str]) -> None:
    run = str(disk.path / "run")
    with saver(run, lines) as it:
        it.save(10, large(10), {"step": 10})
        it.collect_result(wait=True)
        disk.remount("ro")
        assert_costs_only_the_save(it, lines, run, "the file system is read-only")
        disk.remount("rw")
        assert_works_again(it, run)


@pytest.mark.parametrize("reason", [errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_a_disk_or_mount_that_fails(run: str, lines: list[str], reason: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(reason, os.strerror(reason))

    with saver(run, lines) as it:
        it.save(10, large(10), {"step": 10})
        it.collect_result(wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            assert_costs_only_the_save(it, lines, run, f"cannot write {directory(run, 20)[:-2]}")
        assert_works_again(it, run)
