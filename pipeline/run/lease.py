"""The hold of one job on a run, so that two never write to it: files `RUN/control/lease-000007.json`, one a generation.

Creating the next number, which only one job can do, is taking the run over; a writer holds it as long as there is no
higher number. Nobody changes another's file, so there is no moment in which two could believe that they hold the run,
and a job that was frozen and comes back finds before each of its writes that it does not any more. No clock of another
machine is read: the holder counts, and who waits watches with its own clock whether the count moves.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import storage
from pipeline.errors import PipelineError, Superseded
from pipeline.run.background import Every

BEAT_S = 5.0
"""How often a holder counts."""
_STILL_S = 6 * BEAT_S
_NAME = re.compile(r"lease-(\d{6,})\.json")


class Lease:
    """While entered, this job holds the run.

    Args:
        run_dir: the run.
        say: told why another job's hold is taken over, or waited for.

    Raises:
        Superseded: on entering: another job holds the run and lives.
    """

    def __init__(self, run_dir: str, say: Callable[[str], None]) -> None:
        self._run_dir, self._control, self._say = run_dir, storage.join(run_dir, "control"), say
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid()),
                    "machine": _machine(), "job": os.environ.get("SLURM_JOB_ID"),
                    "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}  # fmt: skip
        self._count = 0
        self.generation = 0
        self.lost = False
        """Whether another job has taken the run over."""

    def __enter__(self) -> Lease:
        while True:
            names = _names(self._control)
            if names:
                self._wait_for(names[-1])
            self.generation = _number(names[-1]) + 1 if names else 1
            if storage.create(self._file(), self._bytes()) and not self._overtaken():
                break  # otherwise another job was faster, and this one asks it
        for name in names:
            with suppress(PipelineError, OSError):
                storage.remove(storage.join(self._control, name))
        self._beats = Every(BEAT_S, self._beat, "lease")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beats.stop()
        with suppress(PipelineError, OSError):
            if not self._overtaken():
                storage.write_bytes(self._file(), self._bytes(released=True))

    def check(self) -> None:
        """See that the run is still this job's.

        Raises:
            Superseded: it is not.
        """
        if self._overtaken():
            self.lost = True
            other = _who(_read(self._control, _names(self._control)[-1]))
            raise Superseded(f"{self._run_dir} was taken over by {other}: this job writes no more")

    def _wait_for(self, name: str) -> None:
        """Return once the holder has released the run or is dead.

        Raises:
            Superseded: it lives.
        """
        holder = _read(self._control, name)
        if holder.get("released"):
            return
        if reason := self._dead(holder):
            self._say(f"taking {self._run_dir} over from {_who(holder)}: {reason}")
            return
        self._say(f"{self._run_dir} is held by {_who(holder)}; watching for {_STILL_S:.0f} s whether it is alive")
        until = time.monotonic() + _STILL_S
        while time.monotonic() < until:
            time.sleep(BEAT_S / 5)
            now = _read(self._control, name)
            if now.get("released") or _names(self._control)[-1:] != [name]:
                return
            if now != holder:
                raise Superseded(f"{self._run_dir} is held by {_who(holder)}: stop that job, or take another run.dir")
        self._say(f"taking {self._run_dir} over from {_who(holder)}: it has not moved for {_STILL_S:.0f} s")

    def _dead(self, holder: dict[str, Any]) -> str | None:
        """Why there is no need to watch."""
        if holder.get("job") and holder["job"] == self._me["job"] and holder["restarts"] < self._me["restarts"]:
            return "this is the same job, started again"
        here = self._me["machine"] and holder.get("machine") == self._me["machine"]
        if here and _start_time(int(holder["pid"])) != holder["started"]:
            return "its process is gone"
        return None

    def _beat(self) -> None:
        self._count += 1
        with suppress(PipelineError, OSError):  # a mount that is away for a moment
            self.lost = self.lost or self._overtaken()
            if not self.lost:
                storage.write_bytes(self._file(), self._bytes(), durable=False)

    def _overtaken(self) -> bool:
        names = _names(self._control)
        return bool(names) and _number(names[-1]) > self.generation

    def _file(self) -> str:
        return storage.join(self._control, f"lease-{self.generation:06d}.json")

    def _bytes(self, *, released: bool = False) -> bytes:
        return json.dumps({**self._me, "count": self._count, "released": released}, indent=1).encode()


def holder(run_dir: str) -> str | None:
    """Who holds a run; None if nobody does, or gave it back."""
    control = storage.join(run_dir, "control")
    held = [lease for name in _names(control)[-1:] if not (lease := _read(control, name)).get("released")]
    return _who(held[0]) if held else None


def _names(control: str) -> list[str]:
    return sorted((name for name in storage.listdir(control) if _NAME.fullmatch(name)), key=_number)


def _read(control: str, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read_bytes(storage.join(control, name))))
    except (FileNotFoundError, ValueError):
        return {"released": True}  # removed by the next holder, or cut short when its machine went down


def _number(name: str) -> int:
    return int(name.removeprefix("lease-").removesuffix(".json"))


def _who(holder: dict[str, Any]) -> str:
    job = f"job {holder['job']} " if holder.get("job") else ""
    return f"{job}process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"


def _machine() -> str | None:
    """Identifies the set of processes among which a process number means something; None if that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """When a process began, in ticks since boot; None if it is gone or cannot be seen."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]
