"""Evaluation while training: it changes no bit of the run, keeps the best checkpoint, and ends at a stop request."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.evaluation.test_features import npz, resnet_weights
from tests.launch import TINY, committed_step, ddpm, ended, launch, start, until

RUN = (*TINY, "data.workers=0", "train.steps=6", "run.checkpoint_every=6")


@pytest.fixture
def evaluating(tmp_path: Path) -> tuple[str, ...]:
    network = npz(tmp_path / "resnet.npz", resnet_weights())
    return ("run.evaluate_every=2", "run.evaluate_samples=10", f"run.evaluate_features={network}")


def test_evaluating_changes_no_bit_and_keeps_the_best_checkpoint(
    evaluating: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    for name, settings in (("plain", ()), ("evaluated", evaluating)):
        arguments = (*RUN, *settings, f"data.shards={digits}", f"run.dir={tmp_path / name}")
        assert launch(2, "train", *arguments, log=tmp_path / f"{name}.log") == 0, (tmp_path / f"{name}.log").read_text()
    for part in ("model", "ema", "optimizer"):
        plain, evaluated = (
            tmp_path / name / f"checkpoints/step_00000006/{part}.safetensors" for name in ("plain", "evaluated")
        )
        assert plain.read_bytes() == evaluated.read_bytes()
    log = [json.loads(line) for line in (tmp_path / "evaluated/log.jsonl").read_text().splitlines()]
    distances = {line["step"]: line for line in log if "evaluation/frechet_distance" in line}
    assert sorted(distances) == [2, 4, 6] and distances[4]["evaluation/samples"] == 10
    assert len(list((tmp_path / "evaluated").glob("features-*/*"))) == 6  # of the reference, one for each shard
    lowest = min(distances, key=lambda step: distances[step]["evaluation/frechet_distance"])
    best = json.loads((tmp_path / "evaluated/best.json").read_text())
    assert best["step"] == lowest and (tmp_path / f"evaluated/checkpoints/step_{lowest:08d}").exists()
    drawn = ddpm("sample", tmp_path / "evaluated", "--best", "--seeds", "0-3", "--out", tmp_path / "set", "--quiet")
    assert drawn.returncode == 0, drawn.stderr
    refused = ddpm("sample", tmp_path / "plain", "--best", "--seeds", "0-3", "--out", tmp_path / "other")
    assert refused.returncode == 2 and "was not evaluated" in refused.stderr


def test_a_stop_during_an_evaluation_ends_within_two_steps(
    evaluating: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    long = (*evaluating, "run.evaluate_samples=1000000", f"data.shards={digits}", f"run.dir={run}")
    launcher = start(2, "train", *RUN, *long, log=log)

    beats = run / "control/nodes/00000.json"

    def phases() -> list[str]:
        return [beat["phase"] for beat in json.loads(beats.read_text())["ranks"]]

    assert until(lambda: beats.exists() and phases() == ["evaluation"] * 2, launcher)
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher, log, 60) == 1  # of accelerate's launcher
    assert "is not evaluated: a stop was requested" in log.read_text()
    assert "stop requested (SIGTERM): saved step" in log.read_text()
    assert 2 <= committed_step(run) <= 4
    assert not (run / "best.json").exists()


def test_evaluation_needs_a_feature_file(digits: Path, tmp_path: Path) -> None:
    refused = ddpm("train", *RUN, f"data.shards={digits}", f"run.dir={tmp_path / 'run'}", "run.evaluate_every=2")
    assert refused.returncode == 2 and "run.evaluate_every needs run.evaluate_features" in refused.stderr
