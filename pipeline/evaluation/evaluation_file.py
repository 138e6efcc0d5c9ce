"""The file of figures that `ddpm evaluate` writes beside the samples; `export` and `report` read it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pipeline.errors import DataError
from pipeline.storage import files

NAME = "evaluation.json"


def read(directory: str, warn: Callable[[str], None], consequence: str) -> dict[str, Any] | None:
    """Read the result of the last evaluation.

    Args:
        directory: the sample set, a path or URL.
        warn: called with a warning about a damaged file.
        consequence: what the job does without the figures: the end of that warning.

    Returns:
        The result as `evaluate` gives it; None if there is no file, or if it is damaged.
    """
    path = files.join(directory, NAME)
    if not files.exists(path):
        return None
    with suppress(DataError):
        value = files.read_json(path)
        if isinstance(value, dict) and isinstance(value.get("figures"), dict):
            return value
    warn(f"{path} is not what `ddpm evaluate` writes: {consequence}")
    return None
