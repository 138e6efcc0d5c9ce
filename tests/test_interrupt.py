"""Signals become a flag, really sent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pipeline.run.interrupt import Interrupt

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        send(number)
        assert interrupt.requested == number.name


def test_a_launcher_may_repeat_its_signal() -> None:
    """SLURM sends SIGTERM to every process of a step, and the launcher passes it on: twice is once."""
    with Interrupt() as interrupt:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
            send(number)
        assert interrupt.requested is not None


@pytest.mark.parametrize("before", [None, signal.SIGTERM, signal.SIGUSR1])
def test_the_second_ctrl_c_does_not_wait(before: signal.Signals | None) -> None:
    with Interrupt() as interrupt:
        if before:
            send(before)
        send(signal.SIGINT)
        assert interrupt.requested is not None
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_ctrl_c_after_another_signal_is_not_yet_the_second() -> None:
    with Interrupt():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
            send(signal.SIGINT)


@pytest.mark.parametrize("how", ["well", "badly"])
def test_handlers_are_restored(how: str) -> None:
    def own(number: int, frame: object) -> None: ...

    previous = signal.signal(signal.SIGUSR1, own)
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        try:
            with Interrupt():
                assert signal.getsignal(signal.SIGUSR1) is not own
                if how == "badly":
                    raise RuntimeError
        except RuntimeError:
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == before
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_step_in_progress_is_finished_before_the_process_leaves() -> None:
    code = (
        "import sys, time\nfrom pipeline.run.interrupt import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        "    for step in range(10_000):\n"
        "        print('begun', flush=True); time.sleep(0.2); print('ended', flush=True)\n"
        "        if interrupt.requested: print(interrupt.requested, flush=True); sys.exit(75)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 75
    assert rest == "ended\nSIGTERM\n"
