"""Wherever a save, a retention or a start of the next one is cut off, the run goes on from the right step.

A child process dies just before each of its changes to the file system in turn: opening, half a write, the rest of it,
flush to the disk, renaming, linking, making and removing of files and directories. Then each of them fails instead.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pipeline.checkpoints import ema_snapshots
from pipeline.checkpoints.checkpoint import newest_checkpoint, remove_old, verify_checkpoints
from pipeline.errors import DataError
from pipeline.storage import files
from tests.checkpoints.test_checkpoint import FILES, assert_holds, content, directory, find_checkpoint, kept, save

CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    """A run's directory; in memory if that is to be had, for thousands of files are flushed to the disk here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        yield f"{directory}/run"


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed save of step 20 leaves."""
    save(str(tmp_path / "undisturbed"), 20)
    return content(str(tmp_path / "undisturbed"), 20)


class Halves:
    """A file to which each write goes in two parts, so that death may come between them."""

    def __init__(self, file: BinaryIO, before_each: Callable[[], None]) -> None:
        self._file, self._before_each = file, before_each

    def write(self, data: bytes | memoryview) -> None:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._before_each()
            self._file.write(part)
            self._file.flush()


def watch(root: str, before_each: Callable[[], None]) -> None:
    """Call `before_each` before each change under `root` that this process makes from now on. There is no way back."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and str(arguments[0]).startswith(root) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in CHANGES:
            before_each()

    def fsync(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
        before_each()
        fsync(descriptor)

    @contextmanager
    def publishing(url: str, publishing: Callable[..., Any] = files.publishing, **options: bool) -> Iterator[Halves]:
        with publishing(url, **options) as file:
            yield Halves(file, before_each)

    sys.addaudithook(audit)
    os.fsync = fsync
    files.publishing = publishing  # type: ignore[assignment]


def die_at(operation: int, work: Callable[[], object], root: str) -> bool:
    """Run `work` in a child that is killed just before its n-th change under `root`; whether it lived to the end."""
    child = os.fork()
    if child == 0:
        count = 0

        def before_each() -> None:
            nonlocal count
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        watch(root, before_each)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, "the work itself failed"
    return status == 0


def crash_points(work: Callable[[], object], root: str, prepare: Callable[[], object]) -> Iterator[tuple[int, bool]]:
    """Prepare and die at operation 0, 1, …: yields each with whether `work` lived, which it does the last time."""
    operation, lived = 0, False
    while not lived:
        shutil.rmtree(root, ignore_errors=True)
        prepare()
        lived = die_at(operation, work, root)
        yield operation, lived
        operation += 1


def committed(run: str, step: int) -> bool:
    return files.exists(files.join(directory(run, step), "manifest.json"))


def test_killed_at_any_operation_of_a_save_the_run_goes_on_from_the_right_step(
    run: str, whole: dict[str, bytes]
) -> None:
    deaths, complete = 0, []
    for _, lived in crash_points(lambda: save(run, 20), run, lambda: save(run, 10)):
        deaths += not lived
        found, rejected = newest_checkpoint(run)
        complete.append(committed(run, 20))
        assert_holds(found, 20 if complete[-1] else 10)
        begun = files.exists(directory(run, 20))
        assert rejected == (["ignored step_00000020: no manifest.json"] if begun and not complete[-1] else [])
        save(run, 20)  # the next start
        assert content(run, 20) == whole
        assert verify_checkpoints(run) == []
    assert deaths >= 6 * len([*FILES, "manifest.json"])  # opened, written in two, flushed, named, and that flushed
    assert complete == sorted(complete) and complete[-1] and not complete[-3]  # the manifest's name comes last


def test_killed_at_any_operation_of_a_snapshot_it_is_whole_or_not_there(run: str) -> None:
    def snapshot(value: bytes) -> None:
        ema_snapshots.write(run, 10, [value * 100], updates=10)

    deaths = 0
    for _, lived in crash_points(lambda: snapshot(b"new"), run, lambda: snapshot(b"old")):
        deaths += not lived
        for committed_snapshot in ema_snapshots.committed(run):
            assert files.read_bytes(committed_snapshot.path) in (b"old" * 100, b"new" * 100)
        assert ema_snapshots.verify(run) == []
        snapshot(b"new")
        assert ema_snapshots.verify(run) == [] and len(ema_snapshots.committed(run)) == 1
    assert deaths >= 11  # the old record removed; then twice opened, written in two, flushed, named


def test_killed_at_any_operation_of_several_saves_with_retention_nothing_that_was_committed_is_lost(run: str) -> None:
    steps, keep_last = (10, 20, 30, 40), 2

    def work() -> None:
        for step in steps[1:]:
            save(run, step)
            remove_old(run, keep_last, 0, verified_paths=[directory(run, step)])

    reached, deaths = 0, 0
    for _, lived in crash_points(work, run, lambda: save(run, 10)):
        deaths += not lived
        found, _ = newest_checkpoint(run)
        assert found is not None and found.step >= reached  # dying later never goes on from earlier
        reached = found.step
        assert_holds(found, reached)
        assert max(filter(lambda step: committed(run, step), steps)) == reached
        before = [step for step in steps if step < reached][-(keep_last - 1) :]
        for step in before:
            assert_holds(find_checkpoint(directory(run, step))[0], step)
        save(run, reached + 10)  # the next start
        remove_old(run, keep_last, 0)
        assert kept(run) == [reached, reached + 10]
        assert_holds(newest_checkpoint(run)[0], reached + 10)
        assert verify_checkpoints(run) == []
    assert reached == 40 and deaths >= 3 * 6 * len([*FILES, "manifest.json"])


def test_killed_in_the_first_save_the_run_starts_anew(run: str, whole: dict[str, bytes]) -> None:
    for _, _ in crash_points(lambda: save(run, 20), run, lambda: None):
        found, _ = newest_checkpoint(run)
        assert (found is not None) == committed(run, 20)
        save(run, 20)
        assert content(run, 20) == whole


def test_killed_while_a_damaged_checkpoint_is_replaced_nothing_is_lost(run: str, whole: dict[str, bytes]) -> None:
    def damaged() -> None:
        save(run, 10)
        save(run, 20)
        Path(directory(run, 20), "ema.safetensors").write_bytes(b"")

    for _, lived in crash_points(lambda: save(run, 20), run, damaged):
        found, _ = newest_checkpoint(run)
        assert found is not None and (found.step == 20 or not lived)
        assert_holds(found, found.step)
        save(run, 20)
        assert content(run, 20) == whole


def test_killed_at_any_operation_of_retention_the_newest_stay(run: str) -> None:
    def prepare() -> None:
        for step in (10, 20, 30, 40):
            save(run, step)
            for name in FILES:  # newer than the manifest: a directory may list, and so lose, the newest first
                path = Path(directory(run, step), name)
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data)

    deaths = 0
    for _, lived in crash_points(lambda: remove_old(run, 2, 0), run, prepare):
        deaths += not lived
        found, rejected = newest_checkpoint(run)
        assert_holds(found, 40)
        assert rejected == []
        assert all(finding.endswith("no manifest.json") for finding in verify_checkpoints(run))
        remove_old(run, 2, 0)
        assert_holds(find_checkpoint(directory(run, 30))[0], 30)
        assert kept(run) == [30, 40]
    assert deaths >= 12


# --- a file system that fails ---


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE])
def test_a_disk_that_fails_at_any_flush_leaves_the_older_checkpoint_and_no_remains(
    run: str, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    failing, fsync = 0, os.fsync
    while True:
        shutil.rmtree(run, ignore_errors=True)
        save(run, 10)
        calls = 0

        def broken(descriptor: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(reason, os.strerror(reason))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            try:
                save(run, 20)
                break
            except DataError as error:
                assert str(error).startswith(f"cannot write {run}/checkpoints") and "\n" not in str(error)
        assert not files.exists(directory(run, 20))  # so that it does not hold the space the next attempt needs
        assert_holds(newest_checkpoint(run)[0], 10)
        save(run, 20)
        assert_holds(newest_checkpoint(run)[0], 20)
        failing += 1
    assert failing >= 2 * len([*FILES, "manifest.json"]) + 1


def test_the_remains_of_a_killed_retention_are_removed_by_the_next(run: str) -> None:
    for step in (10, 20, 30):
        save(run, step)
    files.remove(files.join(directory(run, 10), "manifest.json"))  # killed here
    remove_old(run, 2, 0)
    assert kept(run) == [20, 30]
