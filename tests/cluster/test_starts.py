"""The record of starts: each line keeps how the start before ended, which the next start removes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipeline.cluster import starts


def test_each_start_keeps_how_the_one_before_ended(tmp_path: Path) -> None:
    run = str(tmp_path)
    (tmp_path / "control").mkdir()
    starts.record(run, 0, 2, "cpu")
    (tmp_path / "control/stopped.json").write_text(json.dumps({"reason": "SIGTERM", "step": 5}))
    starts.record(run, 5, 1, "cuda")
    (tmp_path / "FAILED.json").write_text(json.dumps({"error": "the disk is full", "trace": ""}))  # the later word
    starts.record(run, 7, 1, "cuda")
    (tmp_path / "FAILED.json").unlink()
    (tmp_path / "control/stopped.json").unlink()
    starts.record(run, 7, 1, "cuda")
    (tmp_path / "DONE").write_text("{}")
    starts.record(run, 9, 1, "cuda")
    found = starts.read(run)
    before = [None, "stopped on request: SIGTERM", "failed: the disk is full", None, "done"]
    assert [start["before"] for start in found] == before
    assert [(start["step"], start["processes"]) for start in found] == [(0, 2), (5, 1), (7, 1), (7, 1), (9, 1)]
    assert all(abs(start["time"] - time.time()) < 60 for start in found)


def test_a_damaged_line_costs_itself(tmp_path: Path) -> None:
    assert starts.read(str(tmp_path)) == []
    (tmp_path / "control").mkdir()
    starts.record(str(tmp_path), 0, 1, "cpu")
    with (tmp_path / "control/starts.jsonl").open("a") as file:
        file.write('[1]\n{"step": 3}\n{"time": "x"}\n{"ti')
    assert [start["step"] for start in starts.read(str(tmp_path))] == [0]


def test_a_directory_that_cannot_be_written_does_not_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "control").write_text("a file")
    starts.record(str(tmp_path), 0, 1, "cpu")
    assert starts.read(str(tmp_path)) == []
