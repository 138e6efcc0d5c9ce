"""Whether a batch job that has ended goes back into the queue: `python -m pipeline.run.requeue RUN`.

Decided from the files of the run, for a launcher's exit code is 1 for a stop as for a crash. Where each start of a job
got to is noted in `RUN/control/requeues.jsonl`: a start may die before the trainer writes anything.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress

from pipeline import storage
from pipeline.errors import ConfigError, NoCheckpoint, PipelineError
from pipeline.run import failure, lease
from pipeline.run.checkpoint import committed_step
from pipeline.run.interrupt import CONTROL_FILE, stop_reason

MOST_IDLE_STARTS = 3
"""So many starts of a job in a row may make no progress; the last of them is not requeued."""
_INCURABLE = {error.exit_code for error in (ConfigError, NoCheckpoint)}
"""Data and disks may be well again at the next start; three without progress are the end of it."""


def reason_against(run_dir: str, job: str | None) -> str | None:
    """Note where a start got to, and say why the job should not be started again; None if it should.

    Args:
        run_dir: the run.
        job: the batch job's number, the same for all of its starts.

    Raises:
        DataError: the note cannot be written.
    """
    step, idle = _note(run_dir, job)
    failed, holder = failure.read(run_dir), lease.holder(run_dir)
    if storage.exists(storage.join(run_dir, "DONE")):
        return f"done at step {step}"
    if stop_reason(run_dir) == CONTROL_FILE:
        return f"stopped at step {step} by {storage.join(run_dir, CONTROL_FILE)}"
    if failed and failed.get("exit_code") in _INCURABLE:
        return f"a restart cannot heal this: {failed.get('error')}"
    if job and holder and not holder.startswith(f"job {job} "):
        return f"the run is held by {holder}"
    if idle >= MOST_IDLE_STARTS:
        return f"no progress in {idle} starts at step {step}"
    return None


def _note(run_dir: str, job: str | None) -> tuple[int, int]:
    """The newest step, and how many starts of this job, to the last one, have not raised it."""
    path, step = storage.join(run_dir, "control", "requeues.jsonl"), committed_step(run_dir)
    lines: list[bytes] = []
    with suppress(FileNotFoundError):
        lines = storage.read_bytes(path).splitlines()
    lines.append(json.dumps({"job": job, "restart": os.environ.get("SLURM_RESTART_COUNT", "0"), "step": step}).encode())
    storage.write_bytes(path, b"\n".join(lines) + b"\n")
    notes = [json.loads(line) for line in lines]
    before = [note["step"] for note in notes if note["job"] != job][-1:] or [0]
    steps = before + [note["step"] for note in notes if note["job"] == job]
    return step, len(steps) - 1 - steps.index(max(steps))


def main() -> None:
    """Say it in one line, and leave with 0 if the job should be requeued, 1 if not."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.run.requeue RUN")
    run_dir = sys.argv[1]
    try:
        reason = reason_against(run_dir, os.environ.get("SLURM_JOB_ID"))
    except PipelineError as error:
        reason = str(error)
    where = f"; see {storage.join(run_dir, failure.FILE)}" if failure.read(run_dir) else ""
    verdict = f"{reason}: not requeued{where}" if reason else f"requeued, to go on from step {committed_step(run_dir)}"
    sys.stdout.write(f"{run_dir}: {verdict}\n")
    sys.exit(bool(reason))


if __name__ == "__main__":
    main()
