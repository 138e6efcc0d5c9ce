"""Start the real commands, `ddpm` and `accelerate launch` with several gloo processes, watch them, and kill them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.checkpoints import checkpoint
from tests import warm
from tests.warm import ENVIRONMENT

_TINY_YAML = Path(__file__).parent / "tiny.yaml"
TINY = ("--config", str(_TINY_YAML))
"""A network of a few thousand parameters on 8-px digits."""


def command(job: str, *arguments: object) -> list[str]:
    """`ddpm JOB …` of this source tree."""
    return [sys.executable, "-c", "from pipeline.cli import main; main()", job, *map(str, arguments)]


def ddpm(job: str, *arguments: object, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `ddpm JOB …` to its end."""
    return warm.run(command(job, *arguments), env={**ENVIRONMENT, **environment}, timeout_s=timeout_s)


def start(
    processes: int, job: str, *arguments: object, log: Path, package: str = "pipeline", **environment: str
) -> subprocess.Popen[bytes]:
    """Start `accelerate launch -m PACKAGE.JOB …` with so many gloo processes; output is appended to `log`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    if processes > 1:
        launcher.append("--multi_gpu")  # the way to several ranks also without any GPU
    with log.open("ab") as output:
        asked = [*launcher, "-m", f"{package}.{job}", *map(str, arguments)]
        return warm.Popen(asked, env={**ENVIRONMENT, **environment}, stdout=output, stderr=output)


def launch(processes: int, job: str, *arguments: object, log: Path, timeout_s: float = 180, **options: str) -> int:
    """The same, to its end; the launcher's exit code."""
    return ended(start(processes, job, *arguments, log=log, **options), log, timeout_s)


def ended(launcher: subprocess.Popen[bytes], log: Path, timeout_s: float = 180) -> int:
    """The launcher's exit code, once it has one."""
    try:
        return launcher.wait(timeout_s)
    except subprocess.TimeoutExpired:
        kill(launcher)
        raise AssertionError(f"no end after {timeout_s} s:\n{log.read_text()[-4000:]}") from None


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and everything below it, at once."""
    try:
        family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    launcher.wait()


def ranks(launcher: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes that train, by rank."""
    children = [(child, child.name().split()) for child in psutil.Process(launcher.pid).children()]
    return {int(name[1]): child for child, name in children if name[0] == "rank"}  # tests.warm names them


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; an orphan's number may stay for a while."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def committed_step(run: Path) -> int:
    """The newest step with a checkpoint; 0 if there is none."""
    return checkpoint.committed_step(str(run))


def logged_steps(run: Path) -> int:
    """Lines of a run's log; with `run.log_every=1` the step it has come to."""
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def until(condition: Callable[[], bool], launcher: subprocess.Popen[bytes], timeout_s: float = 120) -> bool:
    """Wait for a condition; False if the launcher ends before it holds."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        if launcher.poll() is not None:
            return condition()
        time.sleep(0.002)
    log = Path(f"/proc/{launcher.pid}/fd/1").resolve()  # where its output goes
    kill(launcher)
    raise AssertionError(
        f"condition not met in {timeout_s} s; {log}:\n{log.read_text()[-4000:] if log.is_file() else ''}"
    )
