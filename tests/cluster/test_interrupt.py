"""Whatever asks for a stop becomes a flag: signals really sent, files, deadlines, and launchers that die."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from pipeline.cluster import interrupt as interrupts
from pipeline.cluster.interrupt import REASONS, Interrupt
from pipeline.errors import ConfigError
from pipeline.storage import files
from tests.conftest import ROOT

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _plain_and_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_POLL_S", 0.02)
    for name in ("DDPM_STOP_FILE", "DDPM_DEADLINE", "TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def requested(interrupt: Interrupt) -> str:
    """Wait for a request."""
    until = time.monotonic() + 60
    while not interrupt.requested:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert interrupt.requested in REASONS
    return interrupt.requested


def stays_quiet(interrupt: Interrupt) -> bool:
    time.sleep(0.2)  # ten looks
    return interrupt.requested is None


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        send(number)
        assert interrupt.requested == number.name


def test_the_first_request_is_answered_at_once_and_by_one_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, again in ((signal.SIGTERM, ""), (signal.SIGINT, "; Ctrl-C again stops at once, without saving")):
        with Interrupt("this step is saved first"):
            send(number)
            answer = capsys.readouterr().err
            send(signal.SIGTERM)
            assert capsys.readouterr().err == ""
        assert answer == f"stopping ({number.name}): this step is saved first{again}\n"
    monkeypatch.setenv("RANK", "1")
    with Interrupt("this step is saved first"):
        send(signal.SIGTERM)
    assert capsys.readouterr().err == ""


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
        "import sys, time\nfrom pipeline.cluster.interrupt import Interrupt\n"
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


def test_hangup_stays_ignored_under_nohup(tmp_path: Path) -> None:
    if not shutil.which("nohup"):
        pytest.skip("no nohup here")
    code = (
        "import os, signal\nfrom pipeline.cluster.interrupt import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        "    os.kill(os.getpid(), signal.SIGHUP); print(interrupt.requested)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print(interrupt.requested)\n"
    )
    done = subprocess.run(
        ["nohup", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == "None\nSIGTERM\n"


def test_requests_are_numbered_alike_on_all_ranks() -> None:
    assert REASONS[0] == "" and len(set(REASONS)) == len(REASONS) == 10


# --- files ---


def test_the_stop_file_of_a_batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_STOP_FILE", str(tmp_path / "stop"))
    with Interrupt() as interrupt:
        assert stays_quiet(interrupt)
        (tmp_path / "stop").touch()
        assert requested(interrupt) == "the stop file"
    with Interrupt() as interrupt:
        assert interrupt.requested == "the stop file"  # at once
    assert (tmp_path / "stop").exists()  # it is not this job's to remove


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_control_file_of_a_run(tmp_path: Path, where: str) -> None:
    run = str(tmp_path) if where == "local" else f"memory://{uuid.uuid4().hex}"
    with Interrupt() as interrupt:
        files.write_bytes(f"{run}/control/stop", b"")
        assert stays_quiet(interrupt)  # nobody has told it where to look
        interrupt.control_file = f"{run}/control/stop"
        assert requested(interrupt) == "control/stop"


def test_a_control_file_that_cannot_be_read_is_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def broken(url: str) -> bool:
        looked.append(url)
        raise OSError("stale file handle")

    monkeypatch.setattr(files, "exists", broken)
    with Interrupt() as interrupt:
        interrupt.control_file = "somewhere"
        assert stays_quiet(interrupt)
        assert len(looked) > 1


# --- time ---


def test_a_deadline_leaves_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = time.time() + 101
    monkeypatch.setenv("DDPM_DEADLINE", str(deadline))
    with Interrupt() as interrupt:
        interrupt.lead_s = 50.0
        assert stays_quiet(interrupt)
        interrupt.lead_s = 100.0  # saves have become slower
        assert requested(interrupt) == "the deadline"
        assert deadline - 100 <= time.time() < deadline
    monkeypatch.setenv("DDPM_DEADLINE", f"{time.time() + 20:.0f}")  # less than the least lead
    with Interrupt() as interrupt:
        assert interrupt.requested == "the deadline"


def test_the_earlier_of_deadline_and_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for deadline, limit in ((1000.0, 31.0), (31.0, 1000.0)):
        monkeypatch.setenv("DDPM_DEADLINE", str(time.time() + deadline))
        with Interrupt() as interrupt:
            interrupt.set_time_limit(limit)
            began = time.monotonic()
            assert requested(interrupt) == "the deadline"
            assert time.monotonic() - began < 30


@pytest.mark.parametrize("text", ["", None])
def test_no_deadline_is_none(text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        monkeypatch.setenv("DDPM_DEADLINE", text)  # as a scheduler without a limit leaves it
    with Interrupt() as interrupt:
        assert stays_quiet(interrupt)


def test_a_deadline_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("12:30", "nan"):
        monkeypatch.setenv("DDPM_DEADLINE", text)
        with pytest.raises(ConfigError, match=f"DDPM_DEADLINE is '{text}': give Unix seconds"):
            Interrupt()


# --- the launcher ---

LAUNCHED = """
import sys, time
from pipeline.cluster import interrupt
interrupt._POLL_S = 0.05
with interrupt.Interrupt() as it:
    print("running", flush=True)
    until = time.monotonic() + float(sys.argv[1])
    while not it.requested and time.monotonic() < until:
        time.sleep(0.01)
print(it.requested, flush=True)
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""


@pytest.mark.parametrize(
    ("variable", "shell", "wait_s", "expected"),
    [("TORCHELASTIC_RUN_ID", "", 60, "the launcher is gone"),
     ("ACCELERATE_DYNAMO_BACKEND", "", 60, "the launcher is gone"), ("NOTHING", "", 1, "None"),
     ("ACCELERATE_DYNAMO_BACKEND", "sh", 1, "None")],  # left over in a shell, which is no launcher
)  # fmt: skip
def test_a_process_whose_launcher_is_killed_asks_for_a_stop_by_itself(
    variable: str, shell: str, wait_s: float, expected: str
) -> None:
    environment = {**os.environ, variable: "none"}
    command = [sys.executable, "-c", LAUNCHER, LAUNCHED, str(wait_s)]
    if shell:
        command = [shell, "-c", '"$0" -c "$1" "$2"; :', sys.executable, LAUNCHED, str(wait_s)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True,
                          cwd=ROOT) as launcher:  # fmt: skip
        assert launcher.stdout and launcher.stdout.readline() == "running\n"
        launcher.kill()
        assert launcher.stdout.readline() == f"{expected}\n"


def test_a_launcher_that_lives_is_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interrupt() as interrupt:
        assert stays_quiet(interrupt)


# --- together ---


def test_the_first_reason_stays_unless_a_person_insists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_STOP_FILE", str(tmp_path / "stop"))
    with Interrupt() as interrupt:
        send(signal.SIGUSR2)
        (tmp_path / "stop").touch()
        time.sleep(0.2)
        assert interrupt.requested == "SIGUSR2"


def test_polling_ends_with_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setenv("DDPM_STOP_FILE", str(tmp_path / "stop"))
    with Interrupt() as interrupt:
        pass
    assert threading.active_count() == before
    (tmp_path / "stop").touch()
    assert stays_quiet(interrupt)


def test_a_time_limit_below_the_lead_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with Interrupt() as interrupt:
        interrupt.warn_if_too_short(lines.append)
        interrupt.set_time_limit(3600)
        interrupt.warn_if_too_short(lines.append)
        assert not lines
        interrupt.set_time_limit(20)
        interrupt.warn_if_too_short(lines.append)
    assert len(lines) == 1 and lines[0].startswith("20 s are left, and a stop is asked for 30 s before the end")
