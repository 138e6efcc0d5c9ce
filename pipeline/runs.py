"""Job: list the runs in a directory, with their step, loss, state and last checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.errors import ConfigError
from pipeline.path_kind import find_runs
from pipeline.storage import files
from pipeline.training.run_status import statuses
from pipeline.units import duration_text

_COLUMNS = {"run": "<", "state": "<", "step": ">", "loss": ">", "last checkpoint": "<", "age": ">"}


def runs(url: str) -> list[dict[str, Any]]:
    """Every run in a directory or URL and its subdirectories, as JSON values.

    Raises:
        ConfigError: there is no such directory, or no run in it.
    """
    if not files.is_dir(url):
        raise ConfigError(f"{url}: no such directory: give the directory that contains your runs, such as runs")
    found = statuses(find_runs(url))
    if not found:
        raise ConfigError(f"{url} holds no run: `ddpm show {url}` says what it is")
    return [asdict(status) for status in found]


def as_text(found: list[dict[str, Any]]) -> str:
    """A table with a row for each run; below a row the reason why the run failed."""
    rows = [list(_COLUMNS), *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, _COLUMNS.values(), widths)).rstrip()
        for row in rows
    ]
    reasons = [f"  {status['state']}: {status['reason']}" if status["reason"] else "" for status in found]
    return "\n".join([lines[0], *(line for pair in zip(lines[1:], reasons) for line in pair if line)])


def _row(status: dict[str, Any]) -> list[str]:
    steps = f"/{status['steps']}" if status["steps"] is not None else ""
    loss, age = status["loss"], status["age_s"]
    return [
        status["path"],
        status["state"],
        f"{status['step']}{steps}",
        "" if loss is None else f"{loss:.4f}",
        status["checkpoint"] or "none",
        "" if age is None else duration_text(age),
    ]
