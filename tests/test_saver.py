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

from pipeline import storage, train
from pipeline.config import Config
from pipeline.errors import DataError, Superseded
from pipeline.run import checkpoint, world
from pipeline.run.checkpoint import newest
from pipeline.run.saver import Saver
from tests.disk import SmallDisk, small_disk
from tests.test_checkpoint import assert_holds, folder, kept, parts

LARGE = 20_000
"""Values in a tensor that a small disk notices."""


def saver(run: str, said: list[str], **settings: Any) -> Saver:
    defaults = {"keep_last": 2, "keep_every": 0, "generation": 1, "patience_s": 60.0, "say": said.append}
    nothing = {"may_write": lambda: None, "afterwards": lambda: None}
    return Saver(run, **{**defaults, **nothing, **settings})


def save(saver: Saver, step: int, *, wait: bool = True) -> bool:
    begun = saver.save(step, parts(step), {"step": step})
    if wait:
        saver.ended(wait_for_it=True)
    return begun


class Gate:
    """A `may_write` that does not return before it is opened, as on a file system that hangs."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.open.wait(60)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.parametrize("where", ["local", "memory"])
def test_saves_follow_each_other_and_old_ones_go(run: str, where: str, said: list[str]) -> None:
    place = run if where == "local" else f"memory://{uuid.uuid4().hex}/run"
    with saver(place, said, generation=7) as it:
        for step in (10, 20, 30, 40):
            assert save(it, step)
            assert_holds(newest(place)[0], step)
        assert it.figures["checkpoint/failed"] == 0 and it.problem is None and said == []
        assert it.figures["checkpoint/save_s"] > 0 and it.figures["checkpoint/stall_s"] > 0
    assert kept(place) == [30, 40]
    assert json.loads(storage.read_bytes(storage.join(folder(place, 40), "manifest.json")))["generation"] == 7


def test_tensors_may_change_as_soon_as_save_returns(run: str, said: list[str]) -> None:
    gate, live = Gate(), parts(10) | {"large": {"weight": torch.zeros(10_000_000)}}
    with saver(run, said, may_write=gate) as it:
        assert it.save(10, live, {"step": 10})
        for tensors in reversed(live.values()):
            for tensor in tensors.values():
                tensor.fill_(torch.nan)  # the next step, before a byte is written
        gate.open.set()
        it.ended(wait_for_it=True)
    found, _ = newest(run)
    assert_holds(found, 10)
    assert found and not found.tensors("large")["weight"].any()


def test_training_goes_on_while_a_save_is_under_way(run: str, said: list[str]) -> None:
    gate = Gate()
    with saver(run, said, may_write=gate) as it:
        save(it, 10, wait=False)
        it.ended()  # does not wait
        assert newest(run)[0] is None and "checkpoint/save_s" not in it.figures
        gate.open.set()


def test_one_save_is_under_way_and_the_next_waits_for_it(run: str, said: list[str]) -> None:
    gate, order = Gate(), []
    with saver(run, said, may_write=gate, afterwards=lambda: order.append("ended")) as it:
        save(it, 10, wait=False)
        threading.Timer(0.3, lambda: (order.append("released"), gate.open.set())).start()
        assert save(it, 20, wait=False)
        order.append("begun")
        assert order[:2] == ["released", "ended"] and it.figures["checkpoint/stall_s"] > 0.2
    assert kept(run) == [10, 20] and said == []
    assert_holds(newest(run)[0], 20)


def test_a_save_that_hangs_costs_the_next_one_and_not_the_run(run: str, said: list[str]) -> None:
    gate = Gate()
    with saver(run, said, may_write=gate, patience_s=0.2) as it:
        save(it, 10, wait=False)
        for failed, step in enumerate((20, 30), 1):
            began = time.monotonic()
            assert not save(it, step, wait=False)
            assert 0.2 <= time.monotonic() - began < 30
            assert it.problem == "the save before it has not ended in 0 s"
            assert it.figures["checkpoint/failed"] == failed
        assert len(said) == 1 and said[0].startswith("warning: step 20 is not saved, training goes on")
        gate.open.set()
        it.ended(wait_for_it=True)
        assert_holds(newest(run)[0], 10)
        assert save(it, 40)
    assert_holds(newest(run)[0], 40)
    assert kept(run) == [10, 40]


def test_a_last_save_that_is_left_out_is_an_error(run: str, said: list[str]) -> None:
    """Also if the one before it ends well at last: the step is not saved, whatever is said of another."""
    gate = Gate()
    with saver(run, said, may_write=gate, patience_s=0.2) as it:
        save(it, 10, wait=False)
        config = Config.model_validate({"run": {"dir": run}})
        trainer = SimpleNamespace(config=config, world=world.enter("cpu", 60), tensors=lambda: parts(20))
        around = SimpleNamespace(
            saver=it, lease=SimpleNamespace(lost=False), shards=SimpleNamespace(sha256="", samples=0, classes=None)
        )
        threading.Timer(1.0, gate.open.set).start()
        with pytest.raises(DataError, match="step 20 is not saved: the save before it has not ended"):
            train._save(trainer, train.Position(step=20), around, must=True)  # type: ignore[arg-type]
    assert_holds(newest(run)[0], 10)


def test_what_nobody_foresaw_surfaces_at_the_next_step(run: str, said: list[str]) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    with saver(run, said, may_write=broken) as it:
        save(it, 10, wait=False)
        with pytest.raises(ZeroDivisionError):
            it.ended(wait_for_it=True)
        with pytest.raises(ZeroDivisionError):
            save(it, 20)


def test_a_save_under_way_is_finished_before_the_process_leaves_by_an_error(run: str, said: list[str]) -> None:
    gate = Gate()
    with pytest.raises(KeyError), saver(run, said, may_write=gate) as it:
        save(it, 10, wait=False)
        assert gate.entered.wait(60)
        threading.Timer(0.2, gate.open.set).start()
        raise KeyError
    assert_holds(newest(run)[0], 10)


def test_what_follows_a_save_comes_after_it_and_not_after_a_failed_one(run: str, said: list[str]) -> None:
    seen: list[int | None] = []
    lost = False

    def may_write() -> None:
        if lost:
            raise Superseded("held by job 2")

    def afterwards() -> None:
        found, _ = newest(run)
        seen.append(found and found.step)

    with saver(run, said, may_write=may_write, afterwards=afterwards) as it:
        save(it, 10)
        lost = True
        save(it, 20)
        assert it.problem == "held by job 2"
    assert seen == [10]
    assert kept(run) == [10] and said[0].endswith("held by job 2")


def test_retention_that_fails_is_not_taken_for_a_save_that_failed(
    run: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may let nobody delete; the step is saved all the same, and a last save is none to fail for."""

    def forbidden(*_: object, **__: object) -> None:
        raise DataError("cannot remove step_00000010: permission denied")

    monkeypatch.setattr(checkpoint, "retain", forbidden)
    with saver(run, said) as it:
        save(it, 10)
        save(it, 20)
        assert it.problem is None
        assert it.figures["checkpoint/failed"] == 2
    assert said == [
        "warning: step 10 is saved, but not all that follows was done, training goes on (checkpoint/failed counts): "
        "cannot remove step_00000010: permission denied"
    ]
    assert_holds(newest(run)[0], 20)


def test_only_what_this_process_has_not_seen_whole_is_read_again(
    run: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver(run, said) as it:
        save(it, 10)
        save(it, 20)
    hashed, sha256 = [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda url: (hashed.append(url), sha256(url))[1])
    with saver(run, said, sound=folder(run, 20), keep_last=3) as it:
        for step in (30, 40, 50):
            save(it, step)
    assert kept(run) == [30, 40, 50]
    read_again = {url.rpartition("/")[0] for url in hashed if not url.endswith("manifest.json")}
    assert read_again == {folder(run, 10)}


# --- a file system that fails while training goes on ---


def large(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {"weight": torch.full((LARGE,), float(step))} for part in ("model", "ema", "optimizer")}


def assert_costs_only_the_save(it: Saver, said: list[str], run: str, reason: str) -> None:
    """Two saves fail, which is said once; the checkpoint of step 10 is untouched and nothing else lies there."""
    before = {path: path.read_bytes() for path in Path(folder(run, 10)).iterdir()}
    for failed, step in enumerate((20, 30), 1):
        it.save(step, large(step), {"step": step})
        it.ended(wait_for_it=True)
        assert it.problem is not None and reason in it.problem and "\n" not in it.problem
        assert it.figures["checkpoint/failed"] == failed
    assert len(said) == 1 and reason in said[0]
    assert said[0].startswith(
        "warning: step 20 is not saved, training goes on (checkpoint/failed counts): cannot write"
    )
    assert kept(run) == [10]
    assert before == {path: path.read_bytes() for path in Path(folder(run, 10)).iterdir()}


def assert_works_again(it: Saver, run: str) -> None:
    it.save(40, large(40), {"step": 40})
    it.ended(wait_for_it=True)
    assert it.problem is None and it.figures["checkpoint/failed"] == 2
    found, rejected = newest(run)
    assert found and found.step == 40 and rejected == []
    assert torch.equal(found.tensors("ema")["weight"], large(40)["ema"]["weight"])


@pytest.mark.parametrize("estimated", [True, False], ids=["seen to come", "met while writing"])
def test_a_full_disk(disk: SmallDisk, said: list[str], estimated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(disk.path / "run")
    with saver(run, said) as it:
        it.save(10, large(10), {"step": 10})
        it.ended(wait_for_it=True)
        needed = sum(path.stat().st_size for path in Path(folder(run, 10)).iterdir() if path.name != "manifest.json")
        disk.fill(leaving=LARGE * 6)
        free = storage.free_bytes(run)
        if not estimated:
            monkeypatch.setattr(storage, "free_bytes", lambda url: None)
        assert_costs_only_the_save(it, said, run, "are free: make room" if estimated else "no space left")
        if estimated:
            assert f"it takes {needed:,} bytes and {free:,} are free" in said[0]
        disk.make_room()
        assert_works_again(it, run)
    assert not list(disk.path.rglob(".*.tmp"))


def test_a_disk_that_becomes_read_only(disk: SmallDisk, said: list[str]) -> None:
    run = str(disk.path / "run")
    with saver(run, said) as it:
        it.save(10, large(10), {"step": 10})
        it.ended(wait_for_it=True)
        disk.remount("ro")
        assert_costs_only_the_save(it, said, run, "the file system is read-only")
        disk.remount("rw")
        assert_works_again(it, run)


@pytest.mark.parametrize("reason", [errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_a_disk_or_mount_that_fails(run: str, said: list[str], reason: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(reason, os.strerror(reason))

    with saver(run, said) as it:
        it.save(10, large(10), {"step": 10})
        it.ended(wait_for_it=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            assert_costs_only_the_save(it, said, run, f"cannot write {folder(run, 20)[:-2]}")
        assert_works_again(it, run)
