"""Snapshots of averages: committed or not there, and known to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoints import ema_snapshots
from pipeline.checkpoints.safetensors_buffer import TensorFile
from pipeline.errors import DataError, RunHeld


def write(run: Path, step: int, value: float = 1.0) -> None:
    tensors = {"0.05/w": torch.full((3, 2), value), "0.1/w": torch.full((3, 2), value / 3)}
    file = TensorFile(tensors)
    file.fill(tensors)
    ema_snapshots.write(str(run), step, file.as_float16(), updates=step - 1)


def test_a_snapshot_is_read_back_in_float16(tmp_path: Path) -> None:
    assert ema_snapshots.committed(str(tmp_path)) == [] == ema_snapshots.verify(str(tmp_path))
    write(tmp_path, 20)
    write(tmp_path, 10, 2.0)
    first, second = ema_snapshots.committed(str(tmp_path))
    assert (first.step, first.updates, second.step, second.updates) == (10, 9, 20, 19)
    expected = {"0.05/w": torch.full((3, 2), 2.0).half(), "0.1/w": torch.full((3, 2), 2 / 3).half()}
    for tensors in (first.tensors(), load_file(first.path)):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert ema_snapshots.verify(str(tmp_path)) == []


def test_a_file_without_its_record_is_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ema_snapshots.files, "write_json", killed)
        write(tmp_path, 20)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # a later save of a step that is there
        patch.setattr(ema_snapshots.files, "publishing", killed)
        write(tmp_path, 10)
    assert ema_snapshots.committed(str(tmp_path)) == [] == ema_snapshots.verify(str(tmp_path))
    write(tmp_path, 20)
    assert [snapshot.step for snapshot in ema_snapshots.committed(str(tmp_path))] == [20]
    with pytest.raises(RunHeld):
        ema_snapshots.write(str(tmp_path), 30, [b""], 30, check_lease=_lost)
    assert [snapshot.step for snapshot in ema_snapshots.committed(str(tmp_path))] == [20]


def _lost() -> None:
    raise RunHeld("another job")


def test_snapshots_after_the_step_of_a_resume_are_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    (tmp_path / "ema_snapshots" / "step_00000030.json").unlink()
    ema_snapshots.remove_newer(str(tmp_path), 10)
    assert sorted(path.name for path in (tmp_path / "ema_snapshots").iterdir()) == [
        "step_00000010.json", "step_00000010.safetensors",
    ]  # fmt: skip


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    directory = tmp_path / "ema_snapshots"
    path = directory / "step_00000010.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (directory / "step_00000020.safetensors").unlink()
    (directory / "step_00000030.json").write_text("{}")
    (directory / "step_00000040.json").write_text((directory / "step_00000010.json").read_text())
    findings = ema_snapshots.verify(str(tmp_path))
    assert findings[:2] == [
        "ema_snapshots/step_00000010.safetensors does not match its sha256",
        "ema_snapshots/step_00000020.safetensors is missing",
    ]
    assert [line.rpartition("/")[2].split(":")[0] for line in findings[2:]] == [
        "step_00000030.json", "step_00000040.json",
    ]  # fmt: skip
    for name in ("step_00000030.json", "step_00000040.json"):
        (directory / name).unlink()
    damaged, missing = ema_snapshots.committed(str(tmp_path))
    for snapshot, reason in ((damaged, "damaged"), (missing, "missing")):
        with pytest.raises(DataError, match=f"{snapshot.path}: {reason}: restore it"):
            snapshot.tensors()
