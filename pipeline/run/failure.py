"""`RUN/FAILED.json`: which rank failed first, where and why, instead of one trace from each of them."""

from __future__ import annotations

import json
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline import storage
from pipeline.errors import DataError, PipelineError, RankLost, Stopped, Superseded
from pipeline.run.heartbeat import Heartbeat

FILE = "FAILED.json"


@contextmanager
def recorded(run_dir: str, heartbeat: Heartbeat, lost_contact: Callable[[BaseException], bool]) -> Iterator[None]:
    """Write down an error that ends the run, if this rank is the first.

    Args:
        run_dir: the run.
        heartbeat: knows where this rank is, and who may be missing.
        lost_contact: whether an error only says that another rank is gone.

    Raises:
        RankLost: in place of an error for which another rank is the cause.
    """
    try:
        yield
    except (Stopped, Superseded):
        raise
    except Exception as error:
        if not lost_contact(error):
            _write(run_dir, heartbeat, error, traceback.format_exc())
            raise
        place = f"at step {heartbeat.step} in {heartbeat.phase}"
        first = read(run_dir)
        if first and first["trace"]:
            raise RankLost(
                f"lost contact {place}: rank {first['rank']} on {first['host']} failed first, at step {first['step']} "
                f"in {first['phase']}: {first['error']}; see {storage.join(run_dir, FILE)}"
            ) from error
        why = first["error"] if first else heartbeat.diagnosis()
        lost = RankLost(f"lost contact {place}: {why}; the same command goes on from the last save")
        _write(run_dir, heartbeat, lost, traceback.format_exc())
        raise lost from error


def stalled(run_dir: str, heartbeat: Heartbeat, diagnosis: str) -> None:
    """Write down that this rank makes no progress: the end by a time limit may leave no chance to."""
    _write(run_dir, heartbeat, RankLost(f"no progress: {diagnosis}"), None)


def read(run_dir: str) -> dict[str, Any] | None:
    """What ended the last start of a run; None if nothing did."""
    with suppress(FileNotFoundError, DataError, OSError):
        return dict(storage.read_json(storage.join(run_dir, FILE)))
    return None


def clear(run_dir: str) -> None:
    """The run goes on, or has ended well."""
    storage.remove(storage.join(run_dir, FILE))


def _write(run_dir: str, heartbeat: Heartbeat, error: Exception, trace: str | None) -> None:
    explained = isinstance(error, PipelineError)
    content = {
        "rank": heartbeat.rank,
        "host": socket.gethostname(),
        "step": heartbeat.step,
        "phase": heartbeat.phase,
        "error": str(error) if explained else f"{type(error).__name__}: {error}",
        "trace": trace,
        "exit_code": getattr(error, "exit_code", 1),
    }
    with suppress(PipelineError, OSError):
        known = read(run_dir)
        if known and not known["trace"]:
            clear(run_dir)  # it was only a suspicion
        storage.create(storage.join(run_dir, FILE), (json.dumps(content, indent=1) + "\n").encode())
