"""Under `pipeline.cluster.supervise` a launcher ends with the exit code of its ranks, and a signal saves the run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.supervise import supervise
from tests.launch import ENVIRONMENT, TINY, committed_step, logged_steps, until

RANK = 'echo {} > "$DDPM_EXIT_CODES/{}"; '


@pytest.mark.parametrize(
    ("ranks", "launcher", "expected"),
    [
        ((), 0, 0),
        ((), 1, 1),
        ((75, 75), 1, 75),
        ((1, 2), 1, 2),
        ((75, 2), 1, 2),  # a usage error must not be restarted
        ((4, 1), 1, 4),
        ((75, 3), 1, 3),
        ((75,), 0, 0),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(ranks: tuple[int, ...], launcher: int, expected: int) -> None:
    script = "".join(RANK.format(code, rank) for rank, code in enumerate(ranks))
    assert supervise(["sh", "-c", f"{script}exit {launcher}"]) == expected


def test_a_launcher_that_is_killed_ends_as_in_a_shell() -> None:
    assert supervise(["sh", "-c", "kill -9 $$"]) == 137


def _supervised(*command: object, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        words = [sys.executable, "-m", "pipeline.cluster.supervise", *map(str, command)]
        return subprocess.Popen(words, env=ENVIRONMENT, stdout=output, stderr=output)


def test_a_usage_error_under_a_launcher_ends_with_2(tmp_path: Path) -> None:
    train = f"{sys.executable} -c 'from pipeline.cli import main; main()' train --config /nowhere.yaml; exit 1"
    assert _supervised("sh", "-c", train, log=tmp_path / "log").wait(60) == 2
    assert "no such configuration file" in (tmp_path / "log").read_text()


def test_no_command_and_an_unknown_one_are_one_line(tmp_path: Path) -> None:
    assert _supervised(log=tmp_path / "log").wait(60) == 1
    assert _supervised("/nowhere/launcher", log=tmp_path / "log").wait(60) == 1
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].startswith("usage: ") and lines[1:] == ["/nowhere/launcher: no such command"]


def test_sigterm_to_the_first_process_of_a_container_saves_the_run_and_ends_with_75(
    digits: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = (f"data.shards={digits}", f"run.dir={run}", "train.steps=100000", "run.checkpoint_every=100000")
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m")
    process = _supervised(sys.executable, *launcher, "pipeline.train", *TINY, *settings, "data.workers=0", log=log)
    assert until(lambda: logged_steps(run) >= 2, process), log.read_text()
    assert not committed_step(run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, log.read_text()
    assert committed_step(run) >= 2
    assert not list(run.glob("FAILED.json"))
