"""A killed job goes on as if nothing had happened: the same bytes, after kills at any moment, with three ranks.

Three, because with two ranks the order in which gradients are summed does not depend on the buckets of
DistributedDataParallel.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launch import TINY, committed_step, ddpm, kill, launch, start, until

RANKS = 3
KILLS = int(os.environ.get("DDPM_KILLS", "3"))  # `make soak` takes 30
STEPS = max(80, 8 * KILLS)  # so many that a fast machine does not come to the end before it is killed
PARTS = ("model", "ema", "optimizer", "posthoc_ema")


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*/manifest.json")).parent


def assert_same_bytes(run: Path, other: Path) -> None:
    mine, theirs = last_checkpoint(run), last_checkpoint(other)
    assert mine.name == theirs.name
    for part in PARTS:
        if (mine / f"{part}.safetensors").read_bytes() != (theirs / f"{part}.safetensors").read_bytes():
            a, b = load_file(mine / f"{part}.safetensors"), load_file(theirs / f"{part}.safetensors")
            name, gap = max(((name, (a[name] - b[name]).abs().max().item()) for name in a), key=lambda item: item[1])
            pytest.fail(f"{part} differs at step {mine.name}, most in {name}: {gap:.3g}")
    snapshots = [{path.name: path.read_bytes() for path in (r / "ema_snapshots").iterdir()} for r in (run, other)]
    assert snapshots[0] == snapshots[1] and len(snapshots[0]) == 2 * (STEPS // 20)


def arguments(digits: Path, run: Path) -> tuple[str, ...]:
    return (*TINY, f"data.shards={digits}", f"run.dir={run}", f"train.steps={STEPS}", "run.ema_snapshot_every=20")


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    log = run.parent / "log"
    assert launch(RANKS, "train", *arguments(digits, run), log=log) == 0, log.read_text()
    return run


def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(digits: Path, unbroken: Path, tmp_path: Path) -> None:
    run, log, chance = tmp_path / "run", tmp_path / "log", random.Random(0)

    def half_saved(since: float) -> bool:
        """A checkpoint is being written: its directory is there, its manifest is not; not the remains of one."""
        unfinished = (path for path in (run / "checkpoints").glob("step_*") if not (path / "manifest.json").exists())
        try:
            return any(path.stat().st_mtime > since for path in unfinished)
        except FileNotFoundError:
            return False

    starts = 0
    while not (run / "DONE").exists():
        launcher, begun = start(RANKS, "train", *arguments(digits, run), log=log), committed_step(run)
        starts += 1
        if starts > KILLS:
            assert launcher.wait(180) == 0, log.read_text()[-4000:]
        elif starts % 3 == 1:  # first, so that the second start resumes however slow the machine is
            target = begun + chance.randint(2, 6)
            until(lambda target=target: committed_step(run) >= target, launcher)  # type: ignore[misc]
        elif starts % 3 == 2:
            until(partial(half_saved, time.time()), launcher)
        else:
            time.sleep(chance.uniform(0, 8))  # also while it starts
        kill(launcher)
    print(f"{starts} starts, {log.read_text().count('resuming at step')} of them from a checkpoint")
    assert starts > min(KILLS, 2), "the run ended before it was killed often enough"
    assert log.read_text().count("resuming at step") >= 2
    assert_same_bytes(run, unbroken)


def test_a_run_told_to_stop_saves_and_goes_on(digits: Path, unbroken: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    told = (*arguments(digits, run), "run.checkpoint_every=1000")
    launcher = start(RANKS, "train", *told, log=log)
    assert until(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count("\n") >= 3, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(60)
    assert "stop requested (SIGTERM): saved step" in log.read_text(), log.read_text()[-4000:]
    assert 0 < committed_step(run) < STEPS
    assert launch(RANKS, "train", *told, log=log) == 0
    assert_same_bytes(run, unbroken)


def test_curves_of_a_killed_run_have_each_step_once(digits: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={run}", "run.checkpoint_every=8", "train.steps=16")
    launcher = start(1, "train", *arguments, log=log)
    until(lambda: committed_step(run) == 8 and (run / "log.jsonl").read_text().count("\n") >= 11, launcher)
    kill(launcher)
    assert launch(1, "train", *arguments, log=log) == 0
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))


def test_a_finished_run_says_so_and_changes_nothing(digits: Path, tiny_run: Path) -> None:
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    result = ddpm("train", *TINY, f"data.shards={digits}", f"run.dir={tiny_run}", "train.steps=6")
    assert result.returncode == 0
    assert "done at step 6, nothing to do" in result.stderr
    assert {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()} == before


def test_a_run_killed_between_its_last_save_and_its_end_is_declared_done(
    digits: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "DONE").unlink()
    ddpm("train", *TINY, f"data.shards={digits}", f"run.dir={run}", "train.steps=6").check_returncode()
    assert json.loads((run / "DONE").read_text()) == {"step": 6}


def test_a_finished_run_trains_on_at_a_lower_rate_and_keeps_its_old_model(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={run}", "train.lr_stages=[[4, 1e-3]]")
    ddpm("train", *arguments, "train.steps=4").check_returncode()
    finished = (run / "checkpoints/step_00000004/model.safetensors").read_bytes()
    on = ddpm("train", *arguments[:-1], "train.lr_stages=[[4, 1e-3], [8, 1e-4]]", "train.steps=12")
    assert on.returncode == 0, on.stderr
    rates = {
        (line := json.loads(text))["step"]: line["train/lr"] for text in (run / "log.jsonl").read_text().splitlines()
    }
    assert rates[4] == 1e-3
    assert rates[5] == rates[12] == 1e-4
    assert (run / "checkpoints/step_00000004/model.safetensors").read_bytes() == finished
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_00000004", "step_00000010", "step_00000012",
    ]  # fmt: skip


def test_a_new_run_starts_from_old_weights(digits: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = ddpm("train", *TINY, f"data.shards={digits}", f"run.dir={run}", f"train.init_from={tiny_run}",
                  "train.steps=1", "train.lr=1e-12", "train.warmup_steps=0")  # fmt: skip
    assert result.returncode == 0, result.stderr
    old = load_file(last_checkpoint(tiny_run) / "ema.safetensors")
    new = load_file(last_checkpoint(run) / "model.safetensors")
    assert all((old[name] - new[name]).abs().max() < 1e-9 for name in old)
