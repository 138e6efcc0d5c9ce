"""How far runs are, from their files alone: any machine that sees a run can ask, and nothing is written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from pipeline import config_file
from pipeline.checkpoints.checkpoint import best_step, committed_step
from pipeline.checkpoints.run_dir import RunDir, checkpoint_name
from pipeline.cluster import failure, interrupt, lease
from pipeline.cluster.lease import Holder
from pipeline.config import Config
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files

NEW, RUNNING, STOPPED, FAILED, DONE, IMPORTED = "new", "running", "stopped", "failed", "done", "imported"
_TAIL_BYTES = 1 << 16
"""So much of the end of a log is read: hundreds of lines."""


@dataclass(frozen=True)
class RunStatus:
    """How far one run is."""

    path: str
    state: str
    """new (no checkpoint yet), running, stopped, failed, done or imported."""
    reason: str | None
    """Why it failed or stopped, or which process trains it."""
    step: int
    """The last step that was logged or saved."""
    steps: int | None
    """The run's last step; None if its configuration cannot be read."""
    loss: float | None
    """The last training loss in the log."""
    checkpoint: str | None
    """Name of the newest checkpoint; its files are not read."""
    best: str | None
    """Name of the checkpoint with the lowest Fréchet distance of `run.evaluate_every`."""
    age_s: float | None
    """Seconds since the last line of the log; None without a log."""


def statuses(urls: Iterable[str]) -> list[RunStatus]:
    """How far these runs are. Takes up to ten seconds if one of them is held by a process on another machine."""
    urls = list(urls)
    alive = lease.living_holders(urls)
    return [_status(url, alive.get(url)) for url in urls]


def stored_config(url: str) -> Config | None:
    """The configuration of a run; None if it has none that can be read."""
    with suppress(OSError, UnicodeDecodeError, DataError, ConfigError):
        return config_file.parse_stored(files.read_bytes(RunDir(url).config).decode())
    return None


def _status(url: str, holder: Holder | None) -> RunStatus:
    step, config, best = committed_step(url), stored_config(url), best_step(url)
    logged, loss, written = _end_of_log(url)
    state, reason = _state(url, holder, step)
    return RunStatus(
        path=url.rstrip("/"),
        state=state,
        reason=reason,
        step=max(step, logged),
        steps=config.train.steps if config and isinstance(config.train.steps, int) else None,
        loss=loss,
        checkpoint=checkpoint_name(step) if step or files.exists(RunDir(url).imported) else None,
        best=checkpoint_name(best) if best is not None else None,
        age_s=None if written is None else max(0.0, round(time.time() - written, 1)),
    )


def _state(url: str, holder: Holder | None, step: int) -> tuple[str, str | None]:
    """The state, and the reason for it."""
    run, reason = RunDir(url), None
    if holder:
        state, reason = RUNNING, str(holder)
    elif files.exists(run.done):
        state = DONE
    elif failed := failure.read(url):
        state, reason = FAILED, f"rank {failed.get('rank')} at step {failed.get('step')}: {failed.get('error')}"
    elif files.exists(run.imported):
        state = IMPORTED
    elif asked := interrupt.stop_reason(url):
        state, reason = STOPPED, f"on request ({asked})"
    elif gone := lease.current_holder(url):
        state, reason = STOPPED, f"{gone} was killed"
    else:
        state = STOPPED if step else NEW
    return state, reason


def _end_of_log(url: str) -> tuple[int, float | None, float | None]:
    """(last step, last loss, time of the last line) of the log; (0, None, None) without one."""
    log = RunDir(url).log
    step, loss, written = 0, None, None
    with suppress(FileNotFoundError):
        size = files.size(log)
        with files.open_read(log, max(0, size - _TAIL_BYTES), size) as file:
            lines = file.read().splitlines()
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # the first line may be cut, the last one half written
                values = json.loads(line)
                step, written = int(values["step"]), float(values["time"])
                loss = float(values["train/loss"])
    return step, loss, written
