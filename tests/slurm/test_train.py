"""Training jobs on a real SLURM: whatever it does to a job, the run ends in the bytes of one that nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import TINY, committed_step, logged_steps
from tests.slurm.cluster import Cluster, Job, thaw
from tests.slurm.conftest import SETTINGS

pytestmark = pytest.mark.timeout(1800)  # the other file of this directory may have the cluster
PARTS = ("model", "ema", "optimizer")
STEPS = 120


def submit(cluster: Cluster, digits: Path, run: Path, *settings: str, options: tuple[str, ...] = ()) -> Job:
    """Two nodes with one rank each."""
    arguments = (*options, "launch/slurm/train.sbatch", TINY[1], f"data.shards={digits}", f"run.dir={run}", *settings)
    return cluster.submit("--nodes=2", *arguments, log=run.with_suffix(".log"), RANKS_PER_NODE="1")


def caught(cluster: Cluster, digits: Path, run: Path, *settings: str, options: tuple[str, ...] = ()) -> tuple[Job, Any]:
    """A job, and its two ranks, held in the middle of a step before the first checkpoint."""
    job = submit(cluster, digits, run, *SETTINGS, *settings, options=options)
    job.until(lambda: logged_steps(run) >= 3)
    ranks = job.freeze("pipeline.train", count=2)
    assert committed_step(run) == 0, "the run was too fast to be caught: give it more steps"
    return job, ranks


def told(job: Job, *nodes: int) -> None:
    """Wait until these nodes have been told to stop."""
    restarts = job["Restarts"]
    files = [Path(f"/tmp/ddpm-stop.{job.number}.{restarts}.{node}") for node in nodes]
    job.until(lambda: all(file.exists() for file in files))


def assert_saved_when_told(job: Job, run: Path) -> None:
    """It had saved, between two checkpoints, before it was started again."""
    noted = [json.loads(line) for line in (run / "control/requeues.jsonl").read_text().splitlines()]
    assert 0 < noted[0]["step"] < 50, job.text()
    assert f"resuming at step {noted[0]['step']}" in job.text()


def assert_as_if_nothing_had_happened(job: Job, run: Path, unbroken: Path) -> None:
    assert job.end() == "COMPLETED", job.text()
    assert (run / "DONE").exists()
    assert "2 processes on cpu" in job.text()
    for part in PARTS:
        file = f"checkpoints/step_{STEPS:08d}/{part}.safetensors"
        assert (run / file).read_bytes() == (unbroken / file).read_bytes(), f"{part} differs"


def test_a_job_near_its_time_limit_saves_requeues_itself_and_goes_on(
    cluster: Cluster, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job, ranks = caught(cluster, digits, run)
    job.update("TimeLimit=5")  # minutes, and train.sbatch asks for the signal 300 s before the end
    told(job, 0)
    thaw(ranks)
    job.until(lambda: job["JobState"] == "PENDING")
    job.update("TimeLimit=UNLIMITED")
    assert_as_if_nothing_had_happened(job, run, unbroken)
    assert job["Restarts"] == "1"
    assert_saved_when_told(job, run)


def test_a_signal_that_comes_before_anything_has_started_is_not_lost(
    cluster: Cluster, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, digits, run, *SETTINGS)
    job.until(lambda: job.processes("-"))  # the batch script asks where the run is
    job.cancel("--batch", "--signal=USR2")
    assert_as_if_nothing_had_happened(job, run, unbroken)
    assert job["Restarts"] == "1"
    assert_saved_when_told(job, run)


def test_a_preempted_job_saves_requeues_itself_and_goes_on(
    cluster: Cluster, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job, ranks = caught(cluster, digits, run, "data.workers=1", options=("--time=60",))
    end = cluster.run("date", "-d", job["EndTime"], "+%s").strip()
    assert {rank.environ()["DDPM_DEADLINE"] for rank in ranks} == {end}
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "true", log=tmp_path / "urgent")
    told(job, 0, 1)
    assert job["JobState"] == "RUNNING"  # the partition's GraceTime
    thaw(ranks)
    assert urgent.end() == "COMPLETED"
    assert_as_if_nothing_had_happened(job, run, unbroken)
    assert job["Restarts"] == "1"
    assert_saved_when_told(job, run)


def test_a_cancelled_job_saves_and_stays_ended_until_somebody_submits_it_again(
    cluster: Cluster, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job, ranks = caught(cluster, digits, run)
    job.cancel()
    told(job, 0, 1)
    thaw(ranks)
    job.until(lambda: "SLURM ends this job" in job.text())
    assert 0 < committed_step(run) < 50, job.text()
    assert job.end() == "CANCELLED" and job["Restarts"] == "0"
    assert_as_if_nothing_had_happened(submit(cluster, digits, run, *SETTINGS), run, unbroken)


def test_a_job_whose_node_dies_goes_on_from_its_last_checkpoint_when_the_node_is_back(
    cluster: Cluster, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, digits, run, *SETTINGS)
    job.until(lambda: committed_step(run) >= 50)
    ranks = job.freeze("pipeline.train", count=2)
    assert not (run / "DONE").exists(), "the run was too fast to be caught: give it more steps"
    cluster.kill_node("n2")
    thaw([rank for rank in ranks if rank.is_running()])
    job.until(lambda: job["JobState"] == "PENDING")
    cluster.start_node("n2")
    assert_as_if_nothing_had_happened(job, run, unbroken)
    assert job["Restarts"] == "1"
    assert "resuming at step 50" in job.text() or "resuming at step 100" in job.text()


def test_a_person_stops_a_run_for_good(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job, ranks = caught(cluster, digits, run)
    (run / "control/stop").touch()
    thaw(ranks)
    assert job.end() == "FAILED" and job["Restarts"] == "0"
    assert f"stopped at step {committed_step(run)} by {run}/control/stop: not requeued" in job.text()


def test_an_error_that_a_restart_cannot_heal_is_not_requeued(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, digits, run, "data.lanes=3")
    assert job.end() == "FAILED" and job["Restarts"] == "0", job.text()
    assert "a restart cannot heal this: 2 ranks cannot share data.lanes=3" in job.text()
    assert f"not requeued; see {run}/FAILED.json" in job.text()
    assert json.loads((run / "FAILED.json").read_text())["exit_code"] == 2


def test_a_wrong_key_ends_before_anything_is_started(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    job = submit(cluster, digits, tmp_path / "run", "train.stepps=3")
    assert job.end() == "FAILED" and job["ExitCode"] == "2:0"
    assert "train.stepps: unknown key; did you mean steps?" in job.text() and "Traceback" not in job.text()


def test_three_starts_without_progress_are_enough(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, digits, run, *SETTINGS)
    for start in range(3):
        job.until(lambda start=start: job["Restarts"] == str(start) and job["JobState"] == "RUNNING")  # type: ignore[misc]
        for rank in job.freeze("pipeline.train", count=2):
            rank.kill()
    assert job.end() == "FAILED" and job["Restarts"] == "2"
    assert "no progress in 3 starts at step 0: not requeued" in job.text()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_one_node_with_one_process_or_several(cluster: Cluster, digits: Path, tmp_path: Path, ranks: str) -> None:
    run = tmp_path / "run"
    job = cluster.submit("launch/slurm/train.sbatch", TINY[1], f"data.shards={digits}", f"run.dir={run}",
                         "train.steps=4", log=tmp_path / "log", RANKS_PER_NODE=ranks)  # fmt: skip
    assert job.end() == "COMPLETED", job.text()
    assert f"{ranks} process{'es' * (ranks != '1')} on cpu" in job.text()
    assert committed_step(run) == 4
