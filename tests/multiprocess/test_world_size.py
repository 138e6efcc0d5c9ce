"""The same run on any number of processes: the same data and noise, and weights that differ by rounding alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launch import ENVIRONMENT, TINY, ddpm, launch

# A high rate soon takes the last convolutions away from zero, where dropout would not show in the loss.
SETTINGS = ("train.steps=6", "run.checkpoint_every=6", "model.dropout=0.3", "train.micro_batch=3", "train.lr=1e-2",
            "train.warmup_steps=0")  # fmt: skip


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root, done = tmp_path_factory.mktemp("worlds"), {}
    for processes in (1, 2, 4):
        run = root / f"{processes}"
        code = launch(processes, "train", *TINY, f"data.shards={digits}", f"run.dir={run}", *SETTINGS, log=root / "log")
        assert code == 0, (root / "log").read_text()[-4000:]
        done[processes] = run
    return done


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_do_not_depend_on_the_number_of_processes(runs: dict[int, Path], processes: int) -> None:
    # Another order, timestep, noise, flip or dropout mask shows at 1e-4 and above, rounding below 1e-6.
    assert losses(runs[processes]) == pytest.approx(losses(runs[1]), rel=1e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_weights_do_not_depend_on_the_number_of_processes(runs: dict[int, Path], processes: int) -> None:
    one, many = (load_file(runs[n] / "checkpoints/step_00000006/ema.safetensors") for n in (1, processes))
    # Not weight by weight: a bias in front of a normalisation has no gradient but rounding, which Adam enlarges.
    apart = sum(float((tensor - many[name]).square().sum()) for name, tensor in one.items())
    assert apart <= 1e-6 * sum(float(tensor.square().sum()) for tensor in one.values())


def test_another_number_of_processes_goes_on_with_a_run(runs: dict[int, Path], digits: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={run}", *SETTINGS)
    assert launch(2, "train", *arguments, "train.steps=3", log=log) == 0
    assert launch(1, "train", *arguments, "train.steps=6", log=log) == 0
    assert losses(run) == pytest.approx(losses(runs[1]), rel=1e-5)


def test_a_number_of_processes_that_does_not_divide_the_lanes_is_refused(digits: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch(2, "train", *TINY, f"data.shards={digits}", f"run.dir={tmp_path / 'run'}", "data.lanes=3", log=log)
    assert "data.lanes" in log.read_text()
    assert not (tmp_path / "run/checkpoints").exists()


def test_processes_that_do_not_see_each_other_are_refused(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "WORLD_SIZE", "2")
    result = ddpm("train", *TINY, f"data.shards={digits}", f"run.dir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert "WORLD_SIZE is 2, but RANK, LOCAL_RANK are not set" in result.stderr


def test_validation_and_previews_use_all_processes(digits: Path, tmp_path: Path) -> None:
    figures = []
    for processes in (1, 2):
        run, log = tmp_path / f"{processes}", tmp_path / "log"
        code = launch(processes, "train", *TINY, f"data.shards={digits}", f"data.val_shards={digits}", f"run.dir={run}",
                      "train.steps=2", "run.val_every=2", "run.val_samples=101", "run.preview_every=2",
                      "run.preview_samples=9", log=log)  # fmt: skip
        assert code == 0, log.read_text()[-4000:]
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        figures += [line["val/loss"] for line in lines if "val/loss" in line]
        assert (run / "previews/step_00000002.png").exists()
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
