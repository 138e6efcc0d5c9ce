"""A batch job is requeued as long as that may help, and says in one line why or why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.requeue import why_not_requeue


def checkpoint(run: Path, step: int) -> None:
    directory = run / f"checkpoints/step_{step:08d}"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("{}")


def write(run: Path, name: str, content: object) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(json.dumps(content))


def test_a_stopped_run_is_requeued(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    write(tmp_path, "control/stopped.json", {"reason": "the stop file", "step": 10})
    assert why_not_requeue(str(tmp_path), "7") is None


def test_a_done_run_is_not_requeued(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    write(tmp_path, "DONE", {"step": 10})
    assert why_not_requeue(str(tmp_path), "7") == "done at step 10"


def test_a_run_that_a_person_has_stopped_is_not_requeued(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    write(tmp_path, "control/stopped.json", {"reason": "control/stop", "step": 10})
    assert why_not_requeue(str(tmp_path), "7") == f"stopped at step 10 by {tmp_path}/control/stop"


@pytest.mark.parametrize("code", [2, 4])
def test_what_a_restart_cannot_heal_is_not_requeued(tmp_path: Path, code: int) -> None:
    write(tmp_path, "FAILED.json", {"error": "no such shard set", "exit_code": code})
    assert why_not_requeue(str(tmp_path), "7") == "a restart cannot heal this: no such shard set"


@pytest.mark.parametrize("code", [1, 3])
def test_a_lost_rank_or_a_store_that_was_away_is_requeued(tmp_path: Path, code: int) -> None:
    write(tmp_path, "FAILED.json", {"error": "lost contact", "exit_code": code})
    assert why_not_requeue(str(tmp_path), "7") is None


def test_three_starts_in_a_row_without_progress_are_enough(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert [why_not_requeue(run, "7") for _ in range(2)] == [None, None]
    checkpoint(tmp_path, 10)
    assert [why_not_requeue(run, "7") for _ in range(3)] == [None, None, None]
    assert why_not_requeue(run, "7") == "no progress in 3 starts at step 10"


def test_a_step_that_was_reached_before_is_no_progress(tmp_path: Path) -> None:
    """The newest checkpoint may turn out damaged and be made again, for ever."""
    checkpoint(tmp_path, 19)
    checkpoint(tmp_path, 20)
    newest, reasons = tmp_path / "checkpoints/step_00000020/manifest.json", []
    for start in range(4):
        newest.unlink() if start % 2 else newest.write_text("{}")
        reasons.append(why_not_requeue(str(tmp_path), "7"))
    assert reasons == [None, None, None, "no progress in 3 starts at step 19"]


def test_a_job_that_is_submitted_again_has_three_starts_of_its_own(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    run = str(tmp_path)
    assert [why_not_requeue(run, "7") for _ in range(4)][-1]
    assert [why_not_requeue(run, "8") for _ in range(2)] == [None, None]
    assert why_not_requeue(run, "8") == "no progress in 3 starts at step 10"


def test_a_run_that_another_job_holds_is_not_requeued(tmp_path: Path) -> None:
    lease = {"job": "4711", "pid": 1, "host": "n3", "released": False}
    write(tmp_path, "control/lease-000001.json", lease)
    assert why_not_requeue(str(tmp_path), "7") == "the run is held by job 4711 process 1 on n3"
    assert why_not_requeue(str(tmp_path), "4711") is None  # killed, so it could not give it back
    write(tmp_path, "control/lease-000001.json", lease | {"released": True})
    assert why_not_requeue(str(tmp_path), "7") is None


def test_the_command_says_why_in_one_line(tmp_path: Path) -> None:
    def command() -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "pipeline.cluster.requeue", str(tmp_path)]
        return subprocess.run(line, env={"SLURM_JOB_ID": "7"}, capture_output=True, text=True, check=False)

    checkpoint(tmp_path, 500)
    write(tmp_path, "FAILED.json", {"error": "RuntimeError: boom", "exit_code": 1})
    yes = [command() for _ in range(3)]
    assert [(done.returncode, done.stdout) for done in yes] == [
        (0, f"{tmp_path}: requeued, to resume at step 500\n")
    ] * 3  # the first one got there from nothing
    no = command()
    assert no.returncode == 1 and not no.stderr
    assert no.stdout == f"{tmp_path}: no progress in 3 starts at step 500: not requeued; see {tmp_path}/FAILED.json\n"


def test_it_does_not_wait_for_torch() -> None:
    code = "import sys, pipeline.cluster.requeue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
