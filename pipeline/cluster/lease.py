"""The lease of a run: files `RUN/control/lease-000007.json`, so that two jobs never write to the same run.

A job takes the run by creating the lease file of the next generation, which only one job can do. It holds the run until
a lease of a higher generation exists. No job changes the lease file of another job, so two jobs can never both believe
that they hold the run: a job that was frozen and continues checks the generations before each of its writes.
The clocks of machines are never compared: the holder increases a counter in its file, and a waiting job measures with
its own clock whether the counter changes.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster import launch_environment
from pipeline.errors import DataError, PipelineError, RunHeld
from pipeline.processes.periodic import Periodic
from pipeline.storage import files

BEAT_S = 5.0
"""Seconds between two increments of the holder's counter."""
_STILL_S = 6 * BEAT_S


@dataclass(frozen=True)
class Holder:
    """The content of a lease file: which process of which job took the run."""

    host: str = "an unknown machine"
    pid: int | None = None
    started: str | None = None
    """Start time of the process, in clock ticks since boot; tells it from a later process of the same number."""
    machine: str | None = None
    """Identifies the machine or container in which the process number is valid; None: unknown."""
    job: str | None = None
    """SLURM job number."""
    restarts: int = 0
    """How often SLURM has restarted the job."""
    count: int = 0
    """The counter that shows that the holder is alive."""
    released: bool = False
    """Whether the holder gave the run back."""

    def __str__(self) -> str:
        job = f"job {self.job} " if self.job else ""
        return f"{job}process {self.pid or '?'} on {self.host}"


class Lease:
    """Holds the run for this job while entered.

    Args:
        run_dir: the run.
        info: gets a line when this job waits for another job, or takes the run from it.

    Raises:
        RunHeld: on entering: another job holds the run and is alive.
    """

    def __init__(self, run_dir: str, info: Callable[[str], None]) -> None:
        self._run, self._info = RunDir(run_dir), info
        self._own = Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_time(os.getpid()),
            machine=_machine(),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=launch_environment.count("SLURM_RESTART_COUNT", 0),
        )
        self.generation = 0
        self.lost = False
        """Whether another job has taken the run over."""

    def __enter__(self) -> Lease:
        while True:
            generations = self._run.lease_generations()
            if generations:
                self._wait_for(generations[-1])
            self.generation = generations[-1] + 1 if generations else 1
            if files.create(self._run.lease(self.generation), _to_json(self._own)) and not self._is_overtaken():
                break  # otherwise another job was faster: look at its lease
        for generation in generations:
            with suppress(PipelineError, OSError):
                files.remove(self._run.lease(generation))
        self._beats = Periodic(BEAT_S, self._beat, "lease")
        return self

    def __exit__(self, *error: object) -> None:
        self._beats.stop()
        with suppress(PipelineError, OSError):
            if not self._is_overtaken():
                files.write_bytes(self._run.lease(self.generation), _to_json(replace(self._own, released=True)))

    def check(self) -> None:
        """Check that this job still holds the run.

        Raises:
            RunHeld: another job has taken the run over.
        """
        if self._is_overtaken():
            self.lost = True
            other = _read(self._run, self._run.lease_generations()[-1])
            raise RunHeld(f"{self._run.path} was taken over by {other}: this job stops writing to it")

    def _wait_for(self, generation: int) -> None:
        """Return when the holder of a generation has released the run or is dead.

        Raises:
            RunHeld: the holder is alive.
        """
        run_dir, holder = self._run.path, _read(self._run, generation)
        if holder.released:
            return
        if reason := self._why_dead(holder):
            self._info(f"taking {run_dir} over from {holder}: {reason}")
            return
        self._info(f"{run_dir} is held by {holder}; watching for {_STILL_S:.0f} s whether it is alive")
        until = time.monotonic() + _STILL_S
        while time.monotonic() < until:
            time.sleep(BEAT_S / 5)
            now = _read(self._run, generation)
            if now.released or self._run.lease_generations()[-1:] != [generation]:
                return
            if now != holder:
                raise RunHeld(f"{run_dir} is held by {holder}: stop that job, or choose another run.dir")
        self._info(f"taking {run_dir} over from {holder}: it has not moved for {_STILL_S:.0f} s")

    def _why_dead(self, holder: Holder) -> str | None:
        """How this job knows that the holder is dead; None if it does not know."""
        if holder.job and holder.job == self._own.job and holder.restarts < self._own.restarts:
            return "this is the same job, started again"
        return "its process is gone" if _is_here(holder) and not _has_process(holder) else None

    def _beat(self) -> None:
        self._own = replace(self._own, count=self._own.count + 1)
        with suppress(PipelineError, OSError):  # the file system may be away for a moment
            self.lost = self.lost or self._is_overtaken()
            if not self.lost:
                files.write_bytes(self._run.lease(self.generation), _to_json(self._own), durable=False)

    def _is_overtaken(self) -> bool:
        return any(generation > self.generation for generation in self._run.lease_generations())


def current_holder(run_dir: str) -> Holder | None:
    """The process that holds a run; None if the run is free."""
    run = RunDir(run_dir)
    for generation in run.lease_generations()[-1:]:
        holder = _read(run, generation)
        return None if holder.released else holder
    return None


def living_holders(run_dirs: Iterable[str]) -> dict[str, Holder]:
    """The processes that hold these runs and are alive: run → its holder.

    A holder on another machine is alive if its counter changes. All of them are watched at once, for two beats at most.
    """
    holders = {run_dir: holder for run_dir in run_dirs if (holder := current_holder(run_dir))}
    alive = {run_dir: holder for run_dir, holder in holders.items() if _is_here(holder) and _has_process(holder)}
    elsewhere = {run_dir: holder for run_dir, holder in holders.items() if not _is_here(holder)}
    until = time.monotonic() + 2 * BEAT_S
    while elsewhere and time.monotonic() < until:
        time.sleep(BEAT_S / 5)
        moved = {run_dir: now for run_dir in elsewhere if (now := current_holder(run_dir)) != elsewhere[run_dir]}
        alive |= {run_dir: now for run_dir, now in moved.items() if now}
        elsewhere = {run_dir: holder for run_dir, holder in elsewhere.items() if run_dir not in moved}
    return alive


def refuse_if_held(run_dir: str) -> None:
    """Check that no living process holds a run, without taking it.

    Raises:
        RunHeld: naming the process.
    """
    if holder := living_holders([run_dir]).get(run_dir):
        raise RunHeld(f"{run_dir} is held by {holder}: stop that job, or choose another run.dir")


def _is_here(holder: Holder) -> bool:
    """Whether a holder's process number is valid on this machine."""
    return holder.machine is not None and holder.machine == _machine()


def _has_process(holder: Holder) -> bool:
    return holder.pid is not None and _start_time(holder.pid) == holder.started


def _read(run: RunDir, generation: int) -> Holder:
    try:
        content = dict(files.read_json(run.lease(generation)))
    except (FileNotFoundError, DataError, TypeError, ValueError):
        return Holder(released=True)  # the next holder removed it, or its machine went down while it was written
    return Holder(**{field.name: content[field.name] for field in fields(Holder) if field.name in content})


def _to_json(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _machine() -> str | None:
    """Identifies the boot and the process namespace in which a process number is valid; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if the process is gone or hidden."""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else values[18]
