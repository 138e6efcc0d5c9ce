"""The loop of training: stops, bad steps, weights that explode, lengths in epochs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import config_file, train
from pipeline.cluster import starts
from pipeline.config import Config
from pipeline.data.loading.batches import Batch
from pipeline.errors import Diverged, NoCheckpoint, Stopped
from pipeline.training.trainer import Gradient, Trainer
from tests.launch import TINY, committed_step, ddpm

SETTINGS = ("data.workers=0", "run.log_every=4", "run.checkpoint_every=4", "train.steps=10", "train.micro_batch=12")


def configured(digits: Path, run: Path, *settings: str) -> Config:
    settings = (f"data.shards={digits}", f"run.dir={run}", *SETTINGS, *settings)
    return config_file.load(TINY[1], settings, lambda name: Path(name).read_text())


def at_gradients(monkeypatch: pytest.MonkeyPatch, *steps: int, asks: bool = False) -> list[int]:
    """Ask for a stop, or make the gradient not finite, in some steps, from 0; the list of all that were begun."""
    begun, real = [], Trainer.gradient

    def gradient(self: Trainer, batch: Batch) -> Gradient:
        begun.append(self.state.step)
        result = real(self, batch)
        if asks and self.state.step in steps:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.state.step in steps:
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


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train.train(configured(digits, run), quiet=True)
    return run


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_stop_leaves_at_the_next_boundary_what_an_unbroken_run_would_have_there(
    digits: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        begun = at_gradients(patch, step, asks=True)
        with pytest.raises(Stopped, match=rf"\(SIGTERM\): saved step {step + 1} of 10"):
            train.train(configured(digits, tmp_path / "stopped"), quiet=True)
        assert len(begun) == step + 1  # no gradient was computed in vain
    assert committed_step(tmp_path / "stopped") == step + 1
    train.train(configured(digits, tmp_path / "stopped"), quiet=True)
    assert_same(tmp_path / "stopped", unbroken)
    recorded = [(start["step"], start["before"]) for start in starts.read(str(tmp_path / "stopped"))]
    assert recorded == [(0, None), (step + 1, "stopped on request: SIGTERM")]


def test_a_bad_step_is_told_by_its_own_number_and_samples(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_gradients(monkeypatch, 5)
    train.train(configured(digits, tmp_path / "run"), quiet=True)
    told = capsys.readouterr().err
    assert "step 6 changes no weights" in told and "(samples 60 to 71 of the order)" in told
    assert told.count("changes no weights") == 1


def test_too_many_bad_steps_end_the_run_at_the_step_that_was_one_too_many(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = at_gradients(monkeypatch, 1, 4, 5, 6)
    with pytest.raises(Diverged, match="in 3 steps in a row, up to step 7:"):
        train.train(configured(digits, tmp_path / "run", "train.max_bad_steps=3"), quiet=True)
    assert max(begun) == 6
    assert committed_step(tmp_path / "run") == 4


# --- weights that explode ---


def weights_of(run: Path) -> dict[int, float]:
    """Step → the largest weight of model and average, NaN if one is; of each checkpoint there is."""
    return {
        int(path.name.removeprefix("step_")): max(
            float(tensor.abs().max())
            for part in ("model", "ema")
            for tensor in load_file(path / f"{part}.safetensors").values()
        )
        for path in sorted(run.glob("checkpoints/step_*"))
    }


def test_a_row_of_bad_steps_pushes_no_good_checkpoint_out_and_is_not_called_sound(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_gradients(monkeypatch, *range(4, 12))
    settings = ("train.max_bad_steps=6", "run.checkpoint_every=1", "train.steps=12")
    with pytest.raises(Diverged, match=r"in 6 steps in a row, up to step 10: .*; newest sound checkpoint: step_0*3: "):
        train.train(configured(digits, tmp_path / "run", *settings), quiet=True)
    assert sorted(weights_of(tmp_path / "run")) == [3, 4, 9]  # 4 has the weights that no good step followed from


@pytest.mark.parametrize(("steps", "every"), [(8, 1), (8, 3), (5, 100)], ids=["after it", "in the row", "last step"])
def test_a_run_that_explodes_ends_in_one_line_and_leaves_only_sound_weights(
    digits: Path, tmp_path: Path, steps: int, every: int
) -> None:
    run = tmp_path / "run"
    settings = (f"data.shards={digits}", f"run.dir={run}", "train.warmup_steps=0", f"run.checkpoint_every={every}")
    exploding = ("train.lr_stages=[[4, 0.001], [1, 1e30]]", f"train.steps={steps}")
    ran = ddpm("train", *TINY, *settings, *exploding)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert not (run / "DONE").exists() and json.loads((run / "FAILED.json").read_text())["exit_code"] == 2
    told, newest = ran.stderr.splitlines()[-1], 4 // every * every
    assert "its weights give no finite loss: lower train.lr" in told
    assert (f"newest sound checkpoint: step_{newest:08d}" if newest else "there is no sound checkpoint") in told
    assert max(weights_of(run), default=0) == newest and all(value < 10 for value in weights_of(run).values())
    ran = ddpm("train", *TINY, *settings, "train.lr_stages=[[1, 0.001]]", f"train.steps={steps}")
    assert ran.returncode == 0, ran.stderr
    assert (f"resuming at step {newest} " if newest else "starting at step 0") in ran.stderr


def test_a_stop_does_not_save_weights_that_have_exploded(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_gradients(monkeypatch, 3, asks=True)
    settings = ("train.lr=1e30", "train.warmup_steps=0")
    with pytest.raises(Diverged, match=r"step [34] is not saved: .*; there is no sound checkpoint: start a new run"):
        train.train(configured(digits, tmp_path / "run", *settings), quiet=True)
    assert weights_of(tmp_path / "run") == {}


def respoilt(run: Path, part: str, factor: float) -> None:
    """Scale the weights of the newest checkpoint, and make its manifest fit again."""
    directory = max((run / "checkpoints").iterdir())
    save_file({name: tensor * factor for name, tensor in load_file(directory / f"{part}.safetensors").items()},
              directory / f"{part}.safetensors")  # fmt: skip
    manifest = json.loads((directory / "manifest.json").read_text())
    data = (directory / f"{part}.safetensors").read_bytes()
    manifest["files"][f"{part}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("part", ["model", "ema"])
def test_a_resume_passes_over_weights_that_are_not_finite_and_ends_in_the_same_bits(
    digits: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    respoilt(run, part, torch.nan)  # DONE, as earlier versions said of such a run
    arguments = ("train", *TINY, f"data.shards={digits}", f"run.dir={run}", "train.steps=6")
    ran = ddpm(*arguments)
    assert ran.returncode == 0, ran.stderr
    assert f"ignored step_00000006: {part}.safetensors holds weights that are not finite" in ran.stderr
    assert "resuming at step 4 " in ran.stderr
    assert_same(run, tiny_run)


def test_nothing_starts_from_weights_that_are_not_finite_or_have_exploded(
    digits: Path, tiny_run: Path, tmp_path: Path
) -> None:
    old, drawn = tmp_path / "old", tmp_path / "drawn"
    shutil.copytree(tiny_run, old)
    shutil.rmtree(old / "checkpoints/step_00000004")
    from_old = configured(digits, tmp_path / "new", f"train.init_from={old}")
    respoilt(old, "ema", 1e30)
    with pytest.raises(NoCheckpoint, match=f"{old}: its weights give no finite loss: remove it, or give an earlier"):
        train.train(from_old, quiet=True)
    respoilt(old, "model", 1e30)
    with pytest.raises(NoCheckpoint, match="step_00000006: its weights give no finite loss"):
        train.train(configured(digits, old), quiet=True)
    respoilt(old, "ema", torch.nan)
    with pytest.raises(NoCheckpoint, match=r"ema\.safetensors holds weights that are not finite"):
        train.train(from_old, quiet=True)
    ran = ddpm("sample", old, "--seeds", "0-3", "--out", drawn)
    assert ran.returncode == 4 and "ema.safetensors holds weights that are not finite" in ran.stderr.splitlines()[-1]
    assert not drawn.exists() and not (tmp_path / "new/checkpoints").exists()


def test_epochs_and_milestones_count_the_samples_consumed_whatever_the_global_batch(
    digits: Path, tmp_path: Path
) -> None:
    """Three epochs of 1,797 images at 599, 1,797 and again 599 a step; nothing but milestones is saved on the way."""
    run = tmp_path / "run"
    states = []
    for epochs, batch in ((1, 599), (3, 1797), (4, 599)):
        train.train(configured(
            digits, run, f"train.steps={epochs}ep", f"train.global_batch={batch}", f"train.micro_batch={batch}",
            "train.lr_stages=[[2ep, 1e-3], [9ep, 1e-4]]", "run.checkpoint_every=100", "run.keep_every=1ep",
            "run.log_every=1", "train.warmup_steps=0",
        ), quiet=True)  # fmt: skip
        states.append(json.loads((run / f"checkpoints/step_{committed_step(run):08d}/state.json").read_text()))
    positions = [state["position"] for state in states]
    assert [(at["step"], at["samples"]) for at in positions] == [(3, 1797), (5, 3 * 1797), (8, 4 * 1797)]
    assert positions[-1]["batch_changes"] == [[3, 1797], [5, 3 * 1797]]
    assert sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir()) == [3, 4, 5, 8]
    assert all((run / f"checkpoints/step_{step:08d}/KEEP").exists() for step in (3, 4, 5, 8))
    rates = [line["train/lr"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())]
    assert rates == [1e-3] * 4 + [1e-4] * 4
