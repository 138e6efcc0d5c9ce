"""`RUN/control/starts.jsonl`: one line for each start of a run, with how the start before it ended.

The files that say how a start ended are removed by the next one; this one keeps what they said.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from typing import Any

from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster import failure
from pipeline.cluster.interrupt import stop_reason
from pipeline.errors import DataError
from pipeline.storage import files


def record(run_dir: str, step: int, processes: int, device: str) -> None:
    """Add a line for this start. A line that cannot be written is lost.

    Args:
        run_dir: the run; its `FAILED.json` and `control/stopped.json` are still those of the start before.
        step: at which the run starts or resumes.
        processes: of this job.
        device: on which they compute.
    """
    with suppress(DataError, OSError):
        line = {
            "time": round(time.time(), 3), "step": step, "processes": processes, "device": device,
            "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID"), "before": how_ended(run_dir),
        }  # fmt: skip
        before = files.read_bytes(RunDir(run_dir).starts) if files.exists(RunDir(run_dir).starts) else b""
        files.write_bytes(RunDir(run_dir).starts, before + json.dumps(line).encode() + b"\n")


def how_ended(run_dir: str) -> str | None:
    """How the last start of a run ended, in words; None if it left no word: killed, or still at work."""
    if files.exists(RunDir(run_dir).done):
        return "done"
    if failed := failure.read(run_dir):
        return f"failed: {failed.get('error')}"
    reason = stop_reason(run_dir)
    return f"stopped on request: {reason}" if reason else None


def read(run_dir: str) -> list[dict[str, Any]]:
    """The starts of a run, the first one first; damaged lines are left out."""
    lines: list[bytes] = []
    with suppress(FileNotFoundError, DataError, OSError):
        lines = files.read_bytes(RunDir(run_dir).starts).splitlines()
    starts = []
    for line in lines:
        with suppress(ValueError):
            start = json.loads(line)
            if isinstance(start, dict) and isinstance(start.get("time"), int | float):
                starts.append(start)
    return starts
