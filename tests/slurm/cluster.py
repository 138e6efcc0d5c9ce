"""A real SLURM with two nodes on this machine, the jobs on it, and their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from tests.launch import ENVIRONMENT

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_SCRIPT = Path(__file__).parent / "cluster.sh"
_T = TypeVar("_T")


class Cluster:
    """Two nodes of two cores, n1 and n2, and the partitions `main` and `urgent`, which takes nodes away from it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = ENVIRONMENT | {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": programs}

    def __enter__(self) -> Cluster:
        self._script("up")
        return self

    def __exit__(self, *_: object) -> None:
        self._script("down")

    def kill_node(self, node: str) -> None:
        """The host dies: every process on it, at once."""
        self._script("killnode", node)

    def start_node(self, node: str) -> None:
        """It is switched on again."""
        self._script("startnode", node)

    def submit(self, *arguments: object, log: Path, **variables: str) -> Job:
        """`sbatch …` from the repository's root, as users do; output is appended to `log`."""
        output = self.run("sbatch", "--parsable", f"--output={log}", *arguments, **variables)
        return Job(self, output.strip(), log)

    def run(self, *command: object, **variables: str) -> str:
        """A command of SLURM's; what it prints."""
        done = subprocess.run(list(map(str, command)), env=self.environment | variables, cwd=ROOT,
                              capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def clear(self) -> None:
        """End what a test has left behind, so that the next one has both nodes."""
        deadline = time.monotonic() + 90
        while numbers := self.run("squeue", "--noheader", "--format=%A").split():
            assert time.monotonic() < deadline, f"jobs {numbers} do not end"
            self.run("scancel", "--signal=KILL", "--full", *numbers)
            self.run("scancel", *numbers)
            time.sleep(0.5)

    def _script(self, action: str, *arguments: str) -> None:
        command = [_SCRIPT, action, self.directory, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{action}: {done.stdout}{done.stderr}"


class Job:
    """A batch job, or one task of an array."""

    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        self.cluster, self.number, self.log = cluster, number, log

    def __getitem__(self, key: str) -> str:
        """What `scontrol show job` says of it, such as JobState and Restarts."""
        (line,) = self.cluster.run("scontrol", "show", "job", "-o", self.number).splitlines()
        return dict(field.partition("=")[::2] for field in line.split())[key]

    def cancel(self, *arguments: str) -> None:
        self.cluster.run("scancel", *arguments, self.number)

    def update(self, setting: str) -> None:
        self.cluster.run("scontrol", "update", f"JobId={self.number}", setting)

    def text(self) -> str:
        """What it has printed, over all of its starts."""
        return self.log.read_text() if self.log.exists() else ""

    def until(self, condition: Callable[[], _T], timeout_s: float = 150) -> _T:
        """Wait for a condition and return its value; a failure shows what the job has printed."""
        deadline, ended = time.monotonic() + timeout_s, False
        while time.monotonic() < deadline and not ended:
            ended = self["JobState"] in ENDED
            for _ in range(20):
                if value := condition():
                    return value
                time.sleep(0.02)
        raise AssertionError(f"this did not come in {timeout_s} s; {self['JobState']}:\n{self.text()[-6000:]}")

    def end(self, timeout_s: float = 240) -> str:
        """Wait for the last end of the job; its state."""
        return self.until(lambda: (state := self["JobState"]) in ENDED and state, timeout_s)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those of its present start with these words in their command, launchers left out."""
        python = {p: command for p, command in _ours(self.number) if Path(command[0]).name.startswith("python")}
        return [p for p, command in python.items() if set(words) <= set(command) and "launch" not in command]

    def freeze(self, *words: str, count: int) -> list[psutil.Process]:
        """Hold so many of its processes where they are, so that what comes next comes in the middle of a step."""
        found = self.until(lambda: len(found := self.processes(*words)) == count and found)
        for process in found:
            process.send_signal(signal.SIGSTOP)
        return found


def thaw(processes: list[psutil.Process]) -> None:
    """Let them go on."""
    for process in processes:
        process.send_signal(signal.SIGCONT)


def _ours(number: str) -> Iterator[tuple[psutil.Process, list[str]]]:
    """The living processes of a job or array task, with their commands."""
    parent, _, task = number.partition("_")
    for process in psutil.process_iter():
        try:
            variables, command = process.environ(), process.cmdline()
        except psutil.Error:  # it has just ended
            continue
        mine = variables.get("SLURM_ARRAY_JOB_ID" if task else "SLURM_JOB_ID") == parent
        if mine and variables.get("SLURM_ARRAY_TASK_ID", "") == task and command:
            yield process, command
