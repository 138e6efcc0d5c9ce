"""The loop when the device runs behind the host, as a GPU does: what the ranks agreed on is read a step late."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import configfile, train
from pipeline.config import Config
from pipeline.data.batches import Batch
from pipeline.errors import ConfigError, Stopped
from pipeline.trainer import Gradient, Position, Trainer
from tests.launch import TINY, committed_step

SETTINGS = ("data.workers=0", "run.log_every=4", "run.checkpoint_every=4", "train.steps=10", "train.micro_batch=12")


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_RUNS_BEHIND", ("cpu",))


def configured(digits: Path, run: Path, *settings: str) -> Config:
    settings = (f"data.shards={digits}", f"run.dir={run}", *SETTINGS, *settings)
    return configfile.load(TINY[1], settings, lambda name: Path(name).read_text())


def at_gradients(monkeypatch: pytest.MonkeyPatch, *steps: int, asks: bool = False) -> list[int]:
    """Ask for a stop, or make the gradient not finite, in some steps, from 0; the list of all that were begun."""
    begun, real = [], Trainer.gradient

    def gradient(self: Trainer, batch: Batch, position: Position) -> Gradient:
        begun.append(position.step)
        result = real(self, batch, position)
        if asks and position.step in steps:
            os.kill(os.getpid(), signal.SIGTERM)
        elif position.step in steps:
            result = Gradient(result.losses, result.t, result.norm, torch.tensor(False))
            for parameter in self.model.parameters():
                parameter.grad.fill_(torch.nan)  # type: ignore[union-attr]
        return result

    monkeypatch.setattr(Trainer, "gradient", gradient)
    return begun


def tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = run / f"checkpoints/step_{committed_step(run):08d}"
    parts = ("model", "ema", "optimizer")
    return {f"{part}/{k}": v for part in parts for k, v in load_file(checkpoint / f"{part}.safetensors").items()}


def assert_same(run: Path, other: Path) -> None:
    mine, theirs = tensors(run), tensors(other)
    assert [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])] == []


def test_a_verdict_read_a_step_late_changes_no_bit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_gradients(monkeypatch, 2, 3, 8)  # the second verdict is read before a log line, the others a step late
    train.train(configured(digits, tmp_path / "prompt"), quiet=True)
    monkeypatch.setattr(train, "_RUNS_BEHIND", ("cpu",))
    train.train(configured(digits, tmp_path / "late"), quiet=True)
    assert_same(tmp_path / "prompt", tmp_path / "late")


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_stop_leaves_at_the_next_boundary_what_an_unbroken_run_would_have_there(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    train.train(configured(digits, tmp_path / "unbroken"), quiet=True)
    with monkeypatch.context() as patch:
        begun = at_gradients(patch, step, asks=True)
        with pytest.raises(Stopped, match=rf"\(SIGTERM\): saved step {step + 1} of 10"):
            train.train(configured(digits, tmp_path / "stopped"), quiet=True)
        assert len(begun) <= step + 2  # one gradient at most was for nothing
    assert committed_step(tmp_path / "stopped") == step + 1
    train.train(configured(digits, tmp_path / "stopped"), quiet=True)
    assert_same(tmp_path / "stopped", tmp_path / "unbroken")


@pytest.mark.usefixtures("behind")
def test_a_bad_step_is_told_by_its_own_number_and_samples(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_gradients(monkeypatch, 5)
    train.train(configured(digits, tmp_path / "run"), quiet=True)
    told = capsys.readouterr().err
    assert "step 6 changes no weights" in told and "(samples 60 to 71 of the order)" in told
    assert told.count("changes no weights") == 1


@pytest.mark.usefixtures("behind")
def test_too_many_bad_steps_end_the_run_at_the_step_that_was_one_too_many(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = at_gradients(monkeypatch, 1, 4, 5, 6)
    with pytest.raises(ConfigError, match="in 3 steps in a row, up to step 7:"):
        train.train(configured(digits, tmp_path / "run", "train.max_bad_steps=3"), quiet=True)
    assert max(begun) == 7
    assert committed_step(tmp_path / "run") == 4
