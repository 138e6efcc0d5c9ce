"""Curves as TensorBoard itself reads them, after a run that was killed and went back to its checkpoint."""

from __future__ import annotations

import json
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.monitoring.telemetry import Telemetry
from pipeline.storage import files
from tests.disk import small_disk


def no_line_expected(line: str) -> None:
    raise AssertionError(line)


def curve(run: Path, tag: str = "loss/train") -> list[tuple[int, float]]:
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def logged(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines]


def start(run: Path, first: int, last: int, value: float) -> None:
    """A start that goes on from step `first` and records steps up to `last`."""
    with Telemetry(str(run), first, no_line_expected) as telemetry:
        for step in range(first + 1, last + 1):
            telemetry.scalars(step, {"train/loss": value + step, "speed/images_per_s": 1.0})


def next_second() -> None:
    """TensorBoard orders the starts of a run by the second in their file names."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


def test_curves_are_clean_after_starts_that_were_killed(tmp_path: Path) -> None:
    start(tmp_path, 0, 7, 0.0)  # killed at step 7, its checkpoint is of step 4
    next_second()
    start(tmp_path, 4, 6, 0.5)  # killed again, before a new checkpoint
    next_second()
    start(tmp_path, 4, 9, 0.25)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.25), (6, 6.25), (7, 7.25), (8, 8.25), (9, 9.25)]
    assert curve(tmp_path) == expected
    assert logged(tmp_path) == expected


def test_a_clean_resume_loses_nothing(tmp_path: Path) -> None:
    start(tmp_path, 0, 3, 0.0)
    next_second()
    start(tmp_path, 3, 5, 0.0)
    assert curve(tmp_path) == logged(tmp_path) == [(step, float(step)) for step in range(1, 6)]


def test_log_lines_are_complete_and_there_at_once(tmp_path: Path) -> None:
    with Telemetry(str(tmp_path), 0, no_line_expected) as telemetry:
        telemetry.scalars(1, {"train/loss": 0.5, "train/lr": 2e-4})
        (line,) = (tmp_path / "log.jsonl").read_text().splitlines()  # without waiting for the end
        value = json.loads(line)
        assert abs(value.pop("time") - time.time()) < 60
        assert value == {"step": 1, "train/loss": 0.5, "train/lr": 2e-4}


@pytest.mark.parametrize("tail", ['{"step": 3, "time": 1', '{"step"', "{"])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path, tail: str) -> None:
    line = '{"step": %d, "time": 1.0, "train/loss": %d}\n'
    (tmp_path / "log.jsonl").write_text(line % (1, 1) + line % (2, 2) + tail)
    start(tmp_path, 2, 3, 0.0)
    assert logged(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_line_cut_before_its_newline_stays_a_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 1}')
    start(tmp_path, 1, 2, 0.0)
    assert logged(tmp_path) == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("damage", [b"\0" * 300, b"\xff\xfe\n", b"[1]\n", b"{}\n", b'{"step": 2}}\n'])
def test_a_log_damaged_by_a_power_cut_does_not_end_the_run(tmp_path: Path, damage: bytes) -> None:
    line = b'{"step": 1, "time": 1.0, "train/loss": 1}\n'
    (tmp_path / "log.jsonl").write_bytes(line + damage)
    start(tmp_path, 1, 2, 0.0)
    assert logged(tmp_path) == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_preview_is_a_file_and_an_image_in_tensorboard(tmp_path: Path, channels: int) -> None:
    sheet = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
    with Telemetry(str(tmp_path), 0, no_line_expected) as telemetry:
        telemetry.preview(500, sheet)
    path = tmp_path / "previews" / "step_00000500.png"
    image = np.asarray(Image.open(path)).reshape(20, 30, channels)
    assert np.array_equal(image, sheet)
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    (event,) = reader.Images("preview")
    assert (event.step, event.width, event.height) == (500, 30, 20)


# --- what cannot be written ---


def is_whole(log: Path) -> bool:
    text = log.read_text()
    return all(json.loads(line)["step"] for line in text.splitlines()) and text.endswith("}\n")


@pytest.mark.filterwarnings("error")
def test_a_full_disk_loses_only_curves_and_gives_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    sheet = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with small_disk(tmp_path / "disk", "256k") as disk:
        run = disk.path / "run"
        with Telemetry(str(run), 0, lines.append) as telemetry:
            telemetry.scalars(1, {"train/loss": 1.0})
            disk.fill()
            for step in range(2, 200):  # until the last page of the log is full
                telemetry.scalars(step, {"train/loss": float(step)} | {f"a/{i}": 0.1 for i in range(10)})
                telemetry.preview(step, sheet)
                assert is_whole(run / "log.jsonl")
            assert len(lines) == 1 and lines[0].startswith("curves and images are not recorded, training continues")
            before = len(logged(run))
            disk.make_room()
            telemetry.scalars(200, {"train/loss": 200.0})
        assert 1 < before < 199
        assert logged(run)[-1] == (200, 200.0) and len(logged(run)) == before + 1
        assert curve(run)[0] == (1, 1.0) and curve(run)[-1] == (200, 200.0)
        assert list((run / "previews").glob(".*")) == []
    assert len(lines) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_read_only_file_system_loses_only_curves(tmp_path: Path) -> None:
    lines: list[str] = []
    with small_disk(tmp_path / "disk") as disk:
        start(disk.path / "run", 0, 3, 0.0)
        disk.remount("ro")
        with Telemetry(str(disk.path / "run"), 2, lines.append) as telemetry:
            telemetry.scalars(3, {"train/loss": 1.0})
            telemetry.preview(3, np.zeros((4, 4, 3), np.uint8))
        assert len(lines) == 1 and "ead-only" in lines[0]
        assert logged(disk.path / "run") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_run_on_an_object_store_has_its_curves_there(tmp_path: Path) -> None:
    run = f"memory://{uuid.uuid4().hex}/run"
    for first, last, value in ((0, 7, 0.0), (4, 6, 0.5)):
        with Telemetry(run, first, no_line_expected) as telemetry:
            for step in range(first + 1, last + 1):
                telemetry.scalars(step, {"train/loss": value + step})
            telemetry.preview(last, np.zeros((4, 4, 3), np.uint8))
            uploading = threading.Thread(target=telemetry.upload)  # as after a save
            uploading.start()
            telemetry.scalars(last, {"val/loss": 0.0})
            uploading.join()
        next_second()
    (tmp_path / "tensorboard").mkdir()
    for name in files.listdir(f"{run}/tensorboard"):
        (tmp_path / "tensorboard" / name).write_bytes(files.read_bytes(f"{run}/tensorboard/{name}"))
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5)]
    assert curve(tmp_path) == expected
    lines = [json.loads(line) for line in files.read_bytes(f"{run}/log.jsonl").decode().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] == expected
    assert files.listdir(f"{run}/previews") == ["step_00000006.png", "step_00000007.png"]
