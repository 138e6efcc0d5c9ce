"""An average of another length, from a run that has stored snapshots; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import sample as job
from pipeline.checkpoints.checkpoint import find_checkpoint
from pipeline.data.shards.seeds import parse_seeds
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, DataError
from pipeline.model.posthoc_ema import exponent
from pipeline.sampling import pretrained
from pipeline.sampling.options import SamplingRequest
from pipeline.verify import verify
from tests.launch import TINY, ddpm

STEPS = 32


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 32 steps with 8 snapshots that keeps the weights of every step, and is resumed at step 18."""
    run = tmp_path_factory.mktemp("ema_length") / "run"
    more = ("run.checkpoint_every=1", "run.keep_every=1", "run.ema_snapshot_every=4", "data.workers=0")
    for steps in (18, STEPS):
        ddpm(
            "train", *TINY, f"data.shards={digits}", f"run.dir={run}", *more, f"train.steps={steps}"
        ).check_returncode()
    (run / "ema_snapshots/step_00000018.json").unlink()  # there, because the run ended there
    return run


def direct(run: Path, length: float, steps: int = STEPS) -> torch.Tensor:
    """The average of the weights of every step, by its definition."""
    power = exponent(length) + 1
    weights = [load_file(run / f"checkpoints/step_{s:08d}/model.safetensors") for s in range(1, steps + 1)]
    shares = [(s / steps) ** power - ((s - 1) / steps) ** power for s in range(1, steps + 1)]
    return sum(flat(step).double() * share for step, share in zip(weights, shares))  # type: ignore[return-value]


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize(("length", "bound"), [(0.05, 1e-4), (0.1, 1e-4), (0.08, 0.02), (0.15, 0.05)])
def test_it_is_the_average_of_the_weights_of_all_steps(run: Path, length: float, bound: float) -> None:
    last = flat(load_file(run / f"checkpoints/step_{STEPS:08d}/model.safetensors"))
    made, expected = flat(pretrained.read(str(run), ema=True, ema_length=length).weights), direct(run, length)
    assert (made - expected).norm() / (last - expected).norm() < bound


def test_a_checkpoint_between_two_snapshots_has_its_own(run: Path) -> None:
    model = pretrained.read(str(run / "checkpoints/step_00000030"), ema=True, ema_length=0.08)
    last = flat(load_file(run / "checkpoints/step_00000030/model.safetensors"))
    expected = direct(run, 0.08, steps=30)
    assert (flat(model.weights) - expected).norm() / (last - expected).norm() < 0.02


def test_samples_record_the_length(run: Path, tmp_path: Path) -> None:
    def draw(seeds: str, out: str, length: float | None) -> None:
        job.sample(
            SamplingRequest(str(run), parse_seeds(seeds), out=str(tmp_path / out), ema_length=length), quiet=True
        )

    draw("0-3", "a", 0.08)
    draw("0-3", "own", None)
    settings = ShardSet.open(str(tmp_path / "a")).settings
    assert settings["ema_length"] == 0.08 and "ema_length" not in ShardSet.open(str(tmp_path / "own")).settings
    assert (tmp_path / "a/shard_000000.tar").read_bytes() != (tmp_path / "own/shard_000000.tar").read_bytes()
    for other in (0.15, None):
        with pytest.raises(ConfigError, match=r"drawn differently .*ema_length: 0\.08 there, "):
            draw("0-7", "a", other)
    draw("0-7", "a", 0.08)
    assert verify(str(tmp_path / "a"), quiet=True) == []


def test_a_damaged_snapshot_is_found_and_not_used(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    older = [f"step_{step:08d}" for step in range(1, STEPS)]
    shutil.copytree(run, damaged, ignore=shutil.ignore_patterns(*older, "tensorboard"))
    assert verify(str(damaged), quiet=True) == []
    path = damaged / "ema_snapshots/step_00000024.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(str(damaged), quiet=True) == ["ema_snapshots/step_00000024.safetensors does not match its sha256"]
    with pytest.raises(DataError, match=r"step_00000024\.safetensors: damaged"):
        pretrained.read(str(damaged), ema=True, ema_length=0.08)
    path.with_suffix(".json").unlink()  # as the message says
    without = pretrained.read(str(damaged), ema=True, ema_length=0.08)
    whole = pretrained.read(str(run), ema=True, ema_length=0.08)
    assert without.identity != whole.identity


def test_where_there_is_none_a_line_says_what_to_do(run: Path, tiny_run: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--ema-length: .* has only its own average: .* run\.ema_snapshot_every"):
        pretrained.read(str(tiny_run), ema=True, ema_length=0.1)
    request = SamplingRequest(str(run), parse_seeds("0"), grid="g.png", ema=False, ema_length=0.1)
    with pytest.raises(ConfigError, match="--no-ema and --ema-length cannot both be set"):
        request.check_start()
    resumed = shutil.copytree(tiny_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (resumed / "checkpoints").rglob("*") if path.is_file()}
    asked = (*TINY, f"data.shards={digits}", f"run.dir={resumed}", "train.steps=8", "run.ema_snapshot_every=2")
    refused = ddpm("train", *asked)
    assert refused.returncode == 2 and "did not track these averages from its start" in refused.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert find_checkpoint(str(resumed))[0].step == 6
