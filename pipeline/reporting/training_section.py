"""The section of the page on how a run was trained: its starts, its speed and its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.reporting.curves import number
from pipeline.reporting.markup import paragraph, table
from pipeline.reporting.run_facts import RunFacts, as_time

_SPEEDS = (
    ("speed", "speed/images_per_s", "images/s", 1.0),
    ("computing, a device", "speed/tflop_per_s", "TFLOP/s", 1.0),
    ("of the peak of the device (MFU)", "speed/mfu", "%", 100.0),
    ("waiting for data", "speed/data_wait_share", "% of the time", 100.0),
    ("peak memory", "memory/peak_gib", "GiB", 1.0),
    ("a save, in the background", "checkpoint/save_s", "s", 1.0),
)
"""Name, curve, unit, factor."""
_COUNTS = (("bad steps", "train/bad_steps"), ("failed saves", "checkpoint/failed"), ("repeated reads", "io/retries"))


def starts(run: RunFacts) -> str:
    """When and where the run was started, how each start ended, and how fast it was."""
    if run.imported is not None:
        return paragraph("This run was imported and has not been trained here.")
    parts = []
    if run.starts:
        ended = [start.get("before") or "without a word: killed, or its machine went down" for start in run.starts[1:]]
        rows = [
            ((as_time(start["time"]), _where(start)), start.get("step"), end)
            for start, end in zip(run.starts, [*ended, run.state])
        ]
        parts.append(table(("started", "at step", "how it ended"), rows, numbers=(1,)))
    elif run.leases:
        parts.append(
            paragraph(f"Jobs that have trained this run: {run.leases}; their version did not record when and why.")
        )
    else:
        parts.append(paragraph("The run has not been started, or did not record it."))
    speeds = []
    for title, curve, unit, scale in _SPEEDS:
        if values := sorted(scale * value for _, value in run.curve(curve)):
            median, least, most = (number(values[k]) for k in (len(values) // 2, 0, -1))
            speeds.append((title, (f"{median} {unit}", f"{least} to {most}")))
    if speeds:
        parts.append(table(("what", "median, and range"), speeds, numbers=(1,)))
    counts = [f"{name}: {value:.0f}" for name, curve in _COUNTS if (value := run.last(curve)) is not None]
    return "".join(parts) + (paragraph("; ".join(counts).capitalize() + ".") if counts else "")


def _where(start: Mapping[str, Any]) -> str:
    processes = start.get("processes")
    job = f", job {start['job']}" if start.get("job") else ""
    return f"{processes} process{'es' * (processes != 1)} ({start.get('device')}), {start.get('host')}{job}"


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def configuration(run: RunFacts) -> str:
    """The keys that differ from their defaults, and all keys."""
    rows, set_here = [], []
    for section, values in run.config.model_dump(mode="json").items():
        defaults = type(getattr(run.config, section))().model_dump(mode="json")
        for key, value in values.items():
            row = (f"{section}.{key}", json.dumps(value, ensure_ascii=False))
            rows.append(row)
            if value != defaults[key]:
                set_here.append((*row, json.dumps(defaults[key], ensure_ascii=False)))
    return (
        paragraph(f"{len(set_here)} of {len(rows)} keys differ from their defaults:")
        + table(("key", "value", "default"), set_here)
        + f"<details><summary>All keys</summary>{table(('key', 'value'), rows)}</details>"
    )
