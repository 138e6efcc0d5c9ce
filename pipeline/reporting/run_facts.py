"""What the files of a run tell: its state, settings, curves, previews and starts.

A run may come from another machine and may be damaged: what cannot be read is left out, and the page says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline import config_file, path_kind
from pipeline.checkpoints.checkpoint import committed_step
from pipeline.checkpoints.run_dir import RunDir, advice_for_missing
from pipeline.cluster import failure, lease, starts
from pipeline.config import Config
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files

Line = dict[str, float]


@dataclass(frozen=True)
class RunFacts:
    """One run, as its files describe it."""

    path: str
    config: Config
    step: int
    """Of the newest checkpoint."""
    state: str
    """Where the run stands, in a sentence."""
    saved: Mapping[str, Any]
    """The state.json of that checkpoint; {} if there is none, or it cannot be read."""
    imported: Mapping[str, Any] | None
    """What an imported run was made of; None for a run that was trained here."""
    log: list[Line]
    """The lines of log.jsonl: name → finite number."""
    starts: list[dict[str, Any]]
    """The first one first; [] if they were not recorded."""
    leases: int
    """How often a job took the run, which also older runs tell."""
    previews: list[int]
    """Steps with a preview."""

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a curve; [] if it was never recorded."""
        return [(line["step"], line[name]) for line in self.log if name in line]

    def names(self, prefix: str) -> list[str]:
        """The names of curves that begin so, sorted."""
        return sorted({name for line in self.log for name in line if name.startswith(prefix)})

    def last(self, name: str) -> float | None:
        """The last value of a curve."""
        curve = self.curve(name)
        return curve[-1][1] if curve else None

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, by number; None for an unconditional network, or one that does not tell them."""
        names = self.saved.get("classes")
        return [str(name) for name in names] if isinstance(names, list) else None

    def training_s(self) -> float | None:
        """Seconds between each start and the last line of the log that it wrote; None if that is not recorded."""
        times = [start["time"] for start in self.starts]
        written = [line["time"] for line in self.log if "time" in line]
        total = 0.0
        for begun, next_begun in zip(times, [*times[1:], math.inf]):
            total += max((time - begun for time in written if begun <= time < next_begun), default=0.0)
        return total or None


def read(path: str) -> RunFacts:
    """Read a run.

    Args:
        path: its directory or URL.

    Raises:
        ConfigError: it is not a run, or its configuration cannot be read.
    """
    run = RunDir(path)
    if not files.is_dir(path):
        raise ConfigError(f"{path}: no such run: {advice_for_missing(path)}")
    if not files.exists(run.config):
        raise ConfigError(f"{path_kind.not_a_run(path)}: give the run.dir of a run")
    try:
        config = config_file.parse_stored(files.read_bytes(run.config).decode(), run.config)
    except UnicodeDecodeError:
        raise ConfigError(f"{run.config} is not the configuration of a run: restore it from a copy") from None
    step, generations = committed_step(path), run.lease_generations()
    imported = _json(run.imported) if files.exists(run.imported) else None
    return RunFacts(
        path=path, config=config, step=step, state=_state(path, step, config.train.steps, imported is not None),
        saved=_json(files.join(run.checkpoint(step), "state.json")) if step else {}, imported=imported,
        log=_log(run.log), starts=starts.read(path), leases=generations[-1] if generations else 0,
        previews=run.preview_steps(),
    )  # fmt: skip


def as_time(seconds: float) -> str:
    """Date and time in UTC, from seconds since 1970."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def _state(path: str, step: int, steps: int, is_imported: bool) -> str:
    run, reached = RunDir(path), f"its newest checkpoint is of step {step:,} of {steps:,}"
    if is_imported:
        return "Imported: the weights come from elsewhere, this run has not been trained here."
    if files.exists(run.done):
        return f"Finished: all {steps:,} steps."
    if failed := failure.read(path):
        where = f"rank {failed.get('rank')} on {failed.get('host')}, at step {failed.get('step')}"
        return f"Failed ({where}): {failed.get('error')}; {reached}."
    if ended := starts.how_ended(path):
        return f"Not finished, {ended}; {reached}."
    if holder := lease.current_holder(path):
        return f"Not finished: held by {holder}, which is training it or was killed; {reached}."
    return f"Not finished; {reached}."


def _log(path: str) -> list[Line]:
    """The numbers of each line; lines and values that are damaged are left out."""
    lines: list[Line] = []
    with suppress(FileNotFoundError, DataError, OSError):
        for text in files.read_bytes(path).splitlines():
            with suppress(ValueError, RecursionError):
                value = json.loads(text)
                if isinstance(value, dict) and isinstance(value.get("step"), int):
                    numbers = {key: item for key, item in value.items() if isinstance(item, int | float)}
                    lines.append({key: item for key, item in numbers.items() if math.isfinite(item)})
    return sorted(lines, key=lambda line: line["step"])


def _json(path: str) -> dict[str, Any]:
    with suppress(FileNotFoundError, DataError, OSError):
        value = files.read_json(path)
        return value if isinstance(value, dict) else {}
    return {}
