"""Decide whether a batch job that has ended is put back into the queue: `python -m pipeline.cluster.requeue RUN`.

The decision uses the files of the run, because a launcher's exit code is 1 for a stop as for a crash. Each start of a
job adds a line to `RUN/control/requeues.jsonl`: a start may die before the trainer writes anything.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress

from pipeline import messages
from pipeline.checkpoints.checkpoint import committed_step
from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster import failure, lease
from pipeline.cluster.interrupt import CONTROL_FILE, stop_reason
from pipeline.errors import ConfigError, Diverged, NoCheckpoint, PipelineError
from pipeline.storage import files

MAX_IDLE_STARTS = 3
"""A job is not requeued after so many starts in a row without progress."""
_INCURABLE = {error.exit_code for error in (ConfigError, Diverged, NoCheckpoint)}
"""Exit codes that the next start would give again. Data errors are not among them: a store or disk may recover."""


def why_not_requeue(run_dir: str, job: str | None) -> str | None:
    """Record the step that this start has reached, and decide whether the job should start again.

    Args:
        run_dir: the run.
        job: the number of the batch job, the same for all of its starts.

    Returns:
        Why the job should not start again; None if it should.

    Raises:
        DataError: the step cannot be recorded.
    """
    run = RunDir(run_dir)
    step, idle_starts = _record_start(run, job)
    failed, holder = failure.read(run_dir), lease.current_holder(run_dir)
    if files.exists(run.done):
        return f"done at step {step}"
    if stop_reason(run_dir) == CONTROL_FILE:
        return f"stopped at step {step} by {run.stop}"
    if failed and failed.get("exit_code") in _INCURABLE:
        return f"a restart cannot heal this: {failed.get('error')}"
    if job and holder and holder.job != job:
        return f"the run is held by {holder}"
    if idle_starts >= MAX_IDLE_STARTS:
        return f"no progress in {idle_starts} starts at step {step}"
    return None


def _record_start(run: RunDir, job: str | None) -> tuple[int, int]:
    """Add a line for this start; the newest step, and how many of the job's last starts have not raised it."""
    step = committed_step(run.path)
    lines: list[bytes] = []
    with suppress(FileNotFoundError):
        lines = files.read_bytes(run.requeues).splitlines()
    lines.append(json.dumps({"job": job, "restart": os.environ.get("SLURM_RESTART_COUNT", "0"), "step": step}).encode())
    files.write_bytes(run.requeues, b"\n".join(lines) + b"\n")
    starts = [json.loads(line) for line in lines]
    step_before = [start["step"] for start in starts if start["job"] != job][-1:] or [0]
    steps = step_before + [start["step"] for start in starts if start["job"] == job]
    return step, len(steps) - 1 - steps.index(max(steps))


def main() -> None:
    """Print the decision in one line; exit code 0 to requeue the job, 1 not to."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.cluster.requeue RUN")
    messages.prepare_streams()
    run_dir = sys.argv[1]
    try:
        reason = why_not_requeue(run_dir, os.environ.get("SLURM_JOB_ID"))
    except PipelineError as error:
        reason = str(error)
    where = f"; see {RunDir(run_dir).failed}" if failure.read(run_dir) else ""
    decision = f"{reason}: not requeued{where}" if reason else f"requeued, to resume at step {committed_step(run_dir)}"
    messages.summary(f"{run_dir}: {decision}")
    sys.exit(bool(reason))


if __name__ == "__main__":
    main()
