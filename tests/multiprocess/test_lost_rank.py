"""A rank that dies, hangs or fails is named, by the others and in FAILED.json; a run belongs to one job at a time."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.shards.shard_set import ShardSet
from tests.launch import TINY, committed_step, ddpm, ended, kill, launch, logged_steps, ranks, start, until

LONG = (*TINY, "train.steps=100000", "run.checkpoint_every=10", "run.log_every=1")


def failed(run: Path) -> dict:
    return json.loads((run / "FAILED.json").read_text())


def test_a_rank_that_is_killed_is_named_and_the_run_goes_on(digits: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = (*LONG, f"data.shards={digits}", f"run.dir={run}")
    launcher = start(3, "train", *arguments, log=log)
    assert until(lambda: logged_steps(run) >= 12, launcher)
    victim = ranks(launcher)[2]
    victim.kill()
    assert ended(launcher, log, 90) == 1
    told = failed(run)
    assert told["rank"] in (0, 1)
    assert f"rank 2 (process {victim.pid} on " in told["error"], told
    assert "silent, last seen in" in told["error"]
    assert told["exit_code"] == 1
    assert launch(2, "train", *arguments, f"train.steps={told['step'] + 20}", log=log) == 0
    assert "resuming at step" in log.read_text()
    assert not (run / "FAILED.json").exists()


def test_a_rank_that_hangs_is_named_with_its_phase(digits: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = start(3, "train", *LONG, f"data.shards={digits}", f"run.dir={run}", "run.timeout=12", log=log)
    assert until(lambda: logged_steps(run) >= 3, launcher)
    victim = ranks(launcher)[1]
    victim.suspend()
    stopped = time.monotonic()
    blamed = f"rank 1 (process {victim.pid} on "
    until(lambda: (run / "FAILED.json").exists() and blamed in failed(run)["error"], launcher, 60)
    assert time.monotonic() - stopped < 40
    assert blamed in failed(run)["error"]
    kill(launcher)
    assert blamed in log.read_text()


def test_the_first_rank_that_fails_is_recorded_and_the_others_point_at_it(digits: Path, tmp_path: Path) -> None:
    """A damaged sample: the rank that reads it fails with the reason, the other one only loses contact."""
    data, run, log = shutil.copytree(digits, tmp_path / "data"), tmp_path / "run", tmp_path / "log"
    shards = ShardSet.open(str(data))
    rows = shards.sidecar(2)
    with Path(shards.tar(2)).open("r+b") as tar:
        for row in rows[:50]:
            tar.seek(int(row["offset"]) + int(row["image_offset"]) + 20)
            tar.write(np.full(4, 255, np.uint8).tobytes())
    assert launch(2, "train", *LONG, f"data.shards={data}", f"run.dir={run}", "data.workers=0", log=log) == 1
    told = failed(run)
    assert "crc32" in told["error"] and told["exit_code"] == 3 and "Traceback" in told["trace"]
    assert f"rank {told['rank']} on " in log.read_text()
    assert "failed first" in log.read_text()


@pytest.mark.parametrize(("every", "told"), [
    (2, "step 6 is not saved: its weights give no finite loss: "), (4, "not finite in 3 steps in a row, up to step 8: ")
])  # fmt: skip
def test_all_ranks_end_when_the_weights_explode(digits: Path, tmp_path: Path, every: int, told: str) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = (f"data.shards={digits}", f"run.dir={run}", "train.lr_stages=[[4, 0.001], [1, 1e30]]",
                "train.warmup_steps=0", "train.max_bad_steps=3", f"run.checkpoint_every={every}")  # fmt: skip
    assert launch(2, "train", *LONG, *settings, log=log, timeout_s=90) == 1
    ended = failed(run)
    assert told in ended["error"] and ended["exit_code"] == 2
    assert "; newest sound checkpoint: step_00000004: " in ended["error"]
    assert committed_step(run) == 4 and "lost contact" not in log.read_text()


def test_a_second_trainer_is_told_who_holds_the_run(digits: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = (*LONG, f"data.shards={digits}", f"run.dir={run}")
    first = start(2, "train", *arguments, log=log)
    assert until(lambda: logged_steps(run) >= 3, first)
    holder = ranks(first)[0].pid
    second = ddpm("train", *arguments)
    assert second.returncode == 2, second.stderr
    assert f"{run} is held by process {holder} on " in second.stderr
    assert not (run / "FAILED.json").exists()
    before = logged_steps(run)
    undisturbed = until(lambda: logged_steps(run) > before and committed_step(run) > 0, first)
    assert undisturbed, "the second one disturbed the first"

    kill(first)  # a dead holder on this machine is replaced at once
    begun = time.monotonic()
    third = start(2, "train", *arguments, log=log)
    assert until(lambda: "resuming at step" in log.read_text(), third)
    assert f"from process {holder} on " in log.read_text() and "its process is gone" in log.read_text()
    assert time.monotonic() - begun < 60
    kill(third)


def test_a_frozen_holder_finds_out_and_writes_no_more(digits: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = (*LONG, f"data.shards={digits}", f"run.dir={run}", "data.workers=0")
    zombie = start(1, "train", *arguments, log=log)
    assert until(lambda: logged_steps(run) >= 12, zombie)
    process = ranks(zombie)[0]
    process.suspend()
    # As if it ran on another machine, where its process cannot be looked at.
    (lease,) = (run / "control").glob("lease-*.json")
    lease.write_text(lease.read_text().replace('"machine": "', '"machine": "another '))
    heir = ddpm("train", *arguments, f"train.steps={logged_steps(run) + 20}", timeout_s=240)
    assert heir.returncode == 0, heir.stderr
    assert "it has not moved for 30 s" in heir.stderr
    after = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    process.send_signal(signal.SIGCONT)
    assert ended(zombie, log, 60) == 1
    assert "was taken over by" in log.read_text()
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == after
