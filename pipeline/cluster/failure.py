"""`RUN/FAILED.json`: which rank failed first, where and why, instead of one traceback from each rank."""

from __future__ import annotations

import json
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.errors import DataError, PipelineError, RankLost, RunHeld, Stopped
from pipeline.storage import files


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
        clear_stall(run_dir)
        raise
    except Exception as error:
        if not is_lost_contact(error):
            _write(run_dir, heartbeat, error, traceback.format_exc())
            raise
        where = f"at step {heartbeat.step} in {heartbeat.phase}"
        first = read(run_dir)
        if first and first["trace"]:
            raise RankLost(
                f"lost contact {where}: rank {first['rank']} on {first['host']} failed first, at step {first['step']} "
                f"in {first['phase']}: {first['error']}; see {RunDir(run_dir).failed}"
            ) from error
        cause = first["error"] if first else heartbeat.diagnose()
        lost = RankLost(f"lost contact {where}: {cause}; the same command resumes from the last checkpoint")
        _write(run_dir, heartbeat, lost, traceback.format_exc())
        raise lost from error


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
    with suppress(PipelineError, OSError):
        clear_stall(run_dir)
        files.create(RunDir(run_dir).failed, (json.dumps(content, indent=1) + "\n").encode())
