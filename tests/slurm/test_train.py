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
STEPS = 200


def submit(cluster: Cluster, digits: Path, run: Path, *settings: str, options: tuple[str, ...] = ()) -> Job:
    """Two nodes with one rank each."""
    arguments = (*options, "launch/slurm/train.sbatch", TINY[1], f"data.shards={digits}", f"run.dir={run}", *settings)
    return cluster.submit("--nodes=2", *arguments, log=run.with_suffix(".log"), RANKS_PER_NODE="1")


def caught(job: Job, run: Path, after: int) -> list[Any]:
    """The two ranks of a job, held in the middle of a step some steps after `after`."""
    job.until(lambda: logged_steps(run) >= after + 3)
    ranks = job.freeze("pipeline.train", count=2)
    assert not (run / "DONE").exists(), "the run was too fast to be caught: give it more steps"
    return ranks


def told(job: Job, *nodes: int) -> None:
    """Wait until these nodes have been told to stop."""
    restarts = job["Restarts"]
    files = [Path(f"/tmp/ddpm-stop.{job.number}.{restarts}.{node}") for node in nodes]
    job.until(lambda: all(file.exists() for file in files))


def steps_saved_when_told(job: Job, run: Path) -> list[int]:
    """The steps at which the starts of a job ended and saved; the next start resumed there."""
    noted = [json.loads(line)["step"] for line in (run / "control/requeues.jsonl").read_text().splitlines()]
    assert all(f"resuming at step {step} " in job.text() for step in noted), job.text()
    return noted


def assert_as_if_nothing_had_happened(job: Job, run: Path, unbroken: Path) -> None:
    assert job.end() == "COMPLETED", job.text()
    assert (run / "DONE").exists()
    assert "2 processes on cpu" in job.text()
    for part in PARTS:
        file = f"checkpoints/step_{STEPS:08d}/{part}.safetensors"
        assert (run / file).read_bytes() == (unbroken / file).read_bytes(), f"{part} differs"


def test_a_job_goes_on_whatever_slurm_does_to_it(
    cluster: Cluster, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    """A signal before anything has started, the time limit, preemption, a dead node; then scancel, and a new job."""
    run = tmp_path / "run"
    job = submit(cluster, digits, run, *SETTINGS, options=("--time=60",))
    job.until(lambda: job.processes("-"))  # the batch script asks where the run is
    job.cancel("--batch", "--signal=USR2")
    job.until(lambda: job["Restarts"] == "1" and job["JobState"] == "RUNNING")

    ranks = caught(job, run, committed_step(run))
    job.update("TimeLimit=5")  # minutes, and train.sbatch asks for the signal 300 s before the end
    told(job, 0)
    thaw(ranks)
    job.until(lambda: job["JobState"] == "PENDING")
    job.update("TimeLimit=60")
    job.until(lambda: job["Restarts"] == "2" and job["JobState"] == "RUNNING")

    ranks = caught(job, run, committed_step(run))
    end = cluster.run("date", "-d", job["EndTime"], "+%s").strip()
    assert {rank.environ()["DDPM_DEADLINE"] for rank in ranks} == {end}
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "true", log=tmp_path / "urgent")
    told(job, 0, 1)
    assert job["JobState"] == "RUNNING"  # the partition's GraceTime
    thaw(ranks)
    assert urgent.end() == "COMPLETED"
    job.until(lambda: job["Restarts"] == "3" and job["JobState"] == "RUNNING")

    ranks = caught(job, run, committed_step(run))
    saved = steps_saved_when_told(job, run)
    assert len(saved) == 3 and saved == sorted(set(saved)) and saved[0] > 0, job.text()
    assert any(step % 50 for step in saved)  # it saves when it is told, not only at its checkpoints
    resumes, last = job.text().count("resuming at step"), committed_step(run)
    cluster.kill_node("n2")
    thaw([rank for rank in ranks if rank.is_running()])
    job.until(lambda: job["JobState"] == "PENDING")
    cluster.start_node("n2")
    job.until(lambda: job["Restarts"] == "4" and job.text().count("resuming at step") > resumes)
    assert job.text().rpartition("resuming at step ")[2].startswith(f"{last} ")

    ranks = caught(job, run, last)
    job.cancel()
    told(job, 0, 1)
    thaw(ranks)
    job.until(lambda: "SLURM ends this job" in job.text())
    assert job.end() == "CANCELLED" and job["Restarts"] == "4"
    assert committed_step(run) > last, job.text()
    assert_as_if_nothing_had_happened(submit(cluster, digits, run, *SETTINGS), run, unbroken)


def test_a_person_stops_a_run_for_good(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, digits, run, *SETTINGS)
    ranks = caught(job, run, 0)
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
    assert "train.stepps: unknown key; did you mean train.steps?" in job.text() and "Traceback" not in job.text()


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
