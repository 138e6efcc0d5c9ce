"""Processes that take turns, from one file that they leave to the next; what counts is the processor's time of each.

A process that has left a file is stopped by a signal until its next turn, so that a change in the machine's speed meets
all alike. It trains on as if nothing had happened: no process starts twice.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil


class Contestant:
    """A process that runs in turns, and the processor time at each of its snapshots."""

    def __init__(self, name: str, command: list[str], awaited: list[Path], log_dir: Path) -> None:
        self.name, self.seconds, self._awaited = name, list[float](), awaited
        with (log_dir / f"{name}.log").open("w") as log:
            self._process = psutil.Popen(command, stdout=log, stderr=log,
                                         start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        self.pause()

    def pause(self) -> None:
        """Stop it until `resume`."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    @property
    def finished(self) -> bool:
        """Whether it has left all of its snapshots."""
        return len(self.seconds) == len(self._awaited)

    def end(self) -> None:
        """Kill it if it is still there."""
        if self._process.is_running():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def has_snapshot(self) -> bool:
        """Whether the awaited snapshot is there. The last one counts when the process has ended."""
        ended = self._process.status() == psutil.STATUS_ZOMBIE
        if ended and not self._awaited[len(self.seconds)].exists():
            raise SystemExit(f"{self.name} has failed: see its log")
        if not (ended or len(self.seconds) < len(self._awaited) - 1) or not self._awaited[len(self.seconds)].exists():
            return False
        family = [self._process, *self._process.children(recursive=True)]
        own = self._process.cpu_times()
        spent = [own.children_user + own.children_system, *(sum(process.cpu_times()[:2]) for process in family)]
        self.seconds.append(sum(spent))
        if self.finished:
            self._process.wait()
        return True


def compete(
    commands: dict[str, list[str]], awaited: dict[str, list[Path]], log_dir: Path, at_once: int = 1
) -> dict[str, list[float]]:
    """All contestants in turns: contestant → seconds of the processor at each of its files.

    Args:
        commands: contestant → command, each to be run on one thread.
        awaited: contestant → the files that it leaves, in order.
        log_dir: where their output is written.
        at_once: contestants that run at the same time.
    """
    everyone = [Contestant(name, commands[name], awaited[name], log_dir) for name in commands]
    try:
        _take_turns(everyone, at_once)
    finally:
        for contestant in everyone:
            contestant.end()
    return {contestant.name: contestant.seconds for contestant in everyone}


def _take_turns(everyone: list[Contestant], at_once: int) -> None:
    waiting, running = list(everyone), list[Contestant]()
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            running[-1].resume()
        time.sleep(0.2)
        for contestant in [contestant for contestant in running if contestant.has_snapshot()]:
            running.remove(contestant)
            print(f"{contestant.name}: {contestant.seconds[-1] / 60:.2f} min", flush=True)
            if not contestant.finished:
                contestant.pause()
                waiting.append(contestant)
