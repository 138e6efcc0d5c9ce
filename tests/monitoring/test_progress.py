"""Progress: lines in a log, a bar on a terminal, silence when asked for."""

from __future__ import annotations

import os
import pty
import sys
import termios
import time

import pytest

from pipeline import messages
from pipeline.monitoring.progress import Progress


def test_a_log_gets_plain_lines_now_and_then_and_always_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with Progress(1000, "sharding", unit="images", every_s=0.05) as progress:
        for _ in range(1000):
            progress.advance()
            time.sleep(0.0002)
    elapsed_s = time.monotonic() - started
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""  # results go there
    assert 2 <= len(lines) <= elapsed_s / 0.05 + 1
    assert all(line.startswith("sharding: ") and " images/s" in line and "\r" not in line for line in lines)
    assert lines[-1].startswith("sharding: 1000/1000 images, ")


def test_a_resumed_job_shows_the_whole_count_and_the_rate_of_this_start(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1_000_010, "training", unit="steps", done=1_000_000) as progress:
        time.sleep(0.1)
        progress.advance(10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training: 1000010/1000010 steps, ")
    assert 1 < float(line.split(", ")[1].split()[0]) <= 100


def test_work_that_is_not_counted_does_not_slow_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "training", unit="steps") as progress:
        time.sleep(0.05)
        with progress.paused():
            time.sleep(0.5)
        progress.advance(10)
    (line,) = capsys.readouterr().err.splitlines()
    assert float(line.split(", ")[1].split()[0]) > 20  # of at most 200; 18 if the work counted


def test_what_was_there_before_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, "sampling", unit="images", done=4) as progress:
        progress.advance(0)
    assert capsys.readouterr().err == "sampling: 4/4 images\n"


def test_a_postfix_stays_after_the_count_until_it_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "training", unit="steps", every_s=0.0) as progress:
        progress.set_postfix("loss 0.5")
        progress.advance()
        progress.advance()
        progress.set_postfix("loss 0.4")
        progress.advance()
    assert [line.rpartition(", ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "loss 0.5",
        "loss 0.5",
        "loss 0.4",
    ]


def test_quiet_lets_only_warnings_through(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, "sampling", unit="images", quiet=True, every_s=0.0) as progress:
        progress.advance(2)
        progress.info("by the way")
        messages.warning("careful")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: careful\n")


def test_an_info_line_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, "sampling", unit="images") as progress:
        progress.info("hello")
    assert capsys.readouterr().err == "hello\n"


def _read_to_the_end(descriptor: int) -> str:
    shown = b""
    try:
        while block := os.read(descriptor, 1 << 16):
            shown += block
    except OSError:  # how Linux tells that the other end is closed
        pass
    os.close(descriptor)
    return shown.decode()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with Progress(10, "training", unit="steps", done=4, quiet=quiet) as progress:
            progress.advance(6)
            messages.warning("saved")
    shown = _read_to_the_end(ours)
    assert "warning: saved\r\n" in shown
    assert ("training: 100%" in shown and "10/10" in shown) is not quiet
