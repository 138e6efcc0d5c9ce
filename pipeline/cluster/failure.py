"""`RUN/FAILED.json`: which rank failed first, where and why, instead of one traceback from each rank.

When one rank fails, all others lose contact at about the same time. One rank of each node asks for the reason, and
tells it to the others of its node in a file of the node. The first one that asks creates `RUN/control/diagnosing.json`
and reads the heartbeats of all nodes; the others wait for its result. So the run's storage gets a few requests a node.
"""

from __future__ import annotations

import json
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline import messages
from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.errors import DataError, PipelineError, RankLost, RunHeld, Stopped
from pipeline.storage import files

_TOLD = "failed.json"
"""Name of the record in the directory of a node."""
_RECORD_S = 10.0
"""Seconds that a rank waits for another one of its node that records an error."""


@contextmanager
def record_errors(
    run_dir: str, heartbeat: Heartbeat, is_lost_contact: Callable[[BaseException], bool]
) -> Iterator[None]:
    """Record an error that ends the run, unless another rank has recorded its error before.

    Args:
        run_dir: the run.
        heartbeat: of this rank.
        is_lost_contact: whether an error only says that another rank is gone.

    Raises:
        RankLost: instead of an error that another rank has caused.
    """
    try:
        yield
    except RunHeld:
        raise
    except (Stopped, KeyboardInterrupt):
        if heartbeat.rank == 0:
            clear_stall(run_dir)
        raise
    except Exception as error:
        if not is_lost_contact(error):
            _write(run_dir, heartbeat, error, traceback.format_exc())
            raise
        with heartbeat.node.turn("diagnosis", 2 * heartbeat.patience_with_others_s):
            lost = _explained(run_dir, heartbeat, error)
        raise lost from error


def _explained(run_dir: str, heartbeat: Heartbeat, error: Exception) -> RankLost:
    """Why this rank has lost contact; recorded, if no rank has told it before."""
    where = f"at step {heartbeat.step} in {heartbeat.phase}"
    first = _told_on_node(heartbeat) or _told_by_other_nodes(run_dir, heartbeat)
    if first and first["trace"]:
        return RankLost(
            f"lost contact {where}: rank {first['rank']} on {first['host']} failed first, at step {first['step']} "
            f"in {first['phase']}: {first['error']}; see {RunDir(run_dir).failed}"
        )
    cause = first["error"] if first else heartbeat.diagnose()
    lost = RankLost(f"lost contact {where}: {cause}; the same command resumes from the last checkpoint")
    _write(run_dir, heartbeat, lost, traceback.format_exc())
    return lost


def _told_on_node(heartbeat: Heartbeat) -> dict[str, Any] | None:
    """What another rank of this node has found recorded, or has recorded; costs the run's storage nothing."""
    with suppress(ValueError, TypeError):
        return dict(json.loads(heartbeat.node.read(_TOLD) or b""))
    return None


def _told_by_other_nodes(run_dir: str, heartbeat: Heartbeat) -> dict[str, Any] | None:
    """The record of the run, awaited if another rank diagnoses; None if this rank is to find the reason."""
    first = read(run_dir)
    if not first and not _diagnoses_first(run_dir, heartbeat):
        until = time.monotonic() + heartbeat.patience_with_others_s
        while not (first := read(run_dir)) and time.monotonic() < until:
            time.sleep(heartbeat.write_s)
    if first and first.get("trace"):
        heartbeat.node.write(_TOLD, json.dumps(first).encode())
    return first


def _diagnoses_first(run_dir: str, heartbeat: Heartbeat) -> bool:
    content = {"rank": heartbeat.rank, "host": socket.gethostname(), "time": time.time_ns()}
    with suppress(PipelineError, OSError):
        return files.create(RunDir(run_dir).diagnosing, json.dumps(content).encode())
    return True


def report_stall(run_dir: str, heartbeat: Heartbeat) -> None:
    """Warn of a phase that takes too long, and record it, unless another rank has done so or the phase ends."""
    place = heartbeat.step, heartbeat.phase
    if (known := read(run_dir)) and known.get("step", 0) >= heartbeat.step:
        return
    diagnosis = heartbeat.diagnose()
    if place == (heartbeat.step, heartbeat.phase):
        messages.warning(f"rank {heartbeat.rank} makes no progress: {diagnosis}")
        record_stall(run_dir, heartbeat, diagnosis)


def record_stall(run_dir: str, heartbeat: Heartbeat, diagnosis: str) -> None:
    """Record that this rank makes no progress: a time limit may kill the process before it raises an error."""
    _write(run_dir, heartbeat, RankLost(f"no progress: {diagnosis}"), None)


def clear_stall(run_dir: str) -> None:
    """Remove the record of a stall, which has passed; keep that of an error."""
    with suppress(PipelineError, OSError):
        if (earlier := read(run_dir)) and not earlier["trace"]:
            clear(run_dir)


def read(run_dir: str) -> dict[str, Any] | None:
    """The failure that ended the last start of a run; None if there is none."""
    with suppress(FileNotFoundError, DataError, OSError, TypeError, ValueError):  # it may be damaged
        return dict(files.read_json(RunDir(run_dir).failed))
    return None


def clear(run_dir: str) -> None:
    """Remove the record: the run has resumed, or has ended well."""
    files.remove(RunDir(run_dir).failed)


def _write(run_dir: str, heartbeat: Heartbeat, error: Exception, trace: str | None) -> None:
    """Record an error of this rank; of the ranks of a node the first one does it, as all may have the same error."""
    is_explained = isinstance(error, PipelineError)
    content = {
        "rank": heartbeat.rank,
        "host": socket.gethostname(),
        "step": heartbeat.step,
        "phase": heartbeat.phase,
        "error": str(error) if is_explained else f"{type(error).__name__}: {error}",
        "trace": trace,
        "exit_code": getattr(error, "exit_code", 1),
    }
    with heartbeat.node.turn("record", _RECORD_S), suppress(PipelineError, OSError):
        if _told_on_node(heartbeat):
            return
        clear_stall(run_dir)
        is_first = files.create(RunDir(run_dir).failed, (json.dumps(content, indent=1) + "\n").encode())
        if trace and (told := content if is_first else read(run_dir)):
            heartbeat.node.write(_TOLD, json.dumps(told).encode())
