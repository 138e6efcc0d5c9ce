"""The rank of this process in its job, from the environment variables of a launcher.

A shell may keep such variables after the end of their job, and a command that believes them would train on or sample
only a part. So an empty variable counts as unset, and the variables of a job of several processes must be complete.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError

_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
_RANKS = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")
_OTHER_TRAINERS = tuple(
    f"ACCELERATE_USE_{kind}" for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "SAGEMAKER", "PARALLELISM_CONFIG")
)
EXIT_CODES = "DDPM_EXIT_CODES"
"""Names the directory into which each rank writes its exit code."""
_KEEP = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE")
_YES = {"1", "true", "yes", "y", "on", "t"}


@dataclass(frozen=True)
class ProcessRank:
    """The place of this process among the processes of its job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def process_rank(needed: Collection[str] = ()) -> ProcessRank:
    """Read the rank of this process.

    Args:
        needed: further variables that several processes need.

    Raises:
        ConfigError: the variables contradict each other, so that it is unknown whether other processes run.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 0:
        raise ConfigError("WORLD_SIZE is 0: start with `accelerate launch`, or unset WORLD_SIZE for a single process")
    if size > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", *needed) if not os.environ.get(name)]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {size}, but {', '.join(missing)} are not set: start with `accelerate launch`, "
                "or unset WORLD_SIZE for a single process"
            )
    process = ProcessRank(_number("RANK", 0), size, _number("LOCAL_RANK", 0))
    for name, value in (("RANK", process.rank), ("LOCAL_RANK", process.local_rank)):
        if value >= size:
            raise ConfigError(
                f"{name} is {value}, but WORLD_SIZE is {os.environ.get('WORLD_SIZE') or 'not set'}: start with "
                f"`accelerate launch`, or unset {name} for a single process"
            )
    return process


def in_turn(shards: list[int], process: ProcessRank) -> list[int]:
    """The shards of this process in the order it works on them: its share under a launcher, otherwise all of them.

    Independent processes share the work too: each checks before a shard whether it is complete, and two processes that
    make the same shard write the same bytes. Task i of n of a job array (SLURM), or index i of n of an Indexed Job
    (Kubernetes, if its manifest sets JOB_COMPLETIONS), starts i/n of the way and wraps around; other processes take a
    random order. The order changes the speed only.
    """
    share = shards[process.rank :: process.size]
    if place := _place_in_array():
        task, tasks = place
        start = len(share) * task // tasks % max(1, len(share))
        return share[start:] + share[:start]
    if process.size == 1:
        random.SystemRandom().shuffle(share)
    return share


def _place_in_array() -> tuple[int, int] | None:
    """The number of this task, from 0, and the number of tasks; None outside of an array."""
    for names in (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
                  ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", None)):  # fmt: skip
        task, tasks, first = (os.environ.get(name, "") if name else "0" for name in names)
        if task.isdecimal() and tasks.isdecimal() and first.isdecimal():
            return int(task) - int(first), max(1, int(tasks))
    return None


def report_exit_code(code: int) -> None:
    """Write the exit code of this rank into the directory that `supervise` names: launchers turn every code into 1."""
    if directory := os.environ.get(EXIT_CODES):
        with suppress(OSError):
            Path(directory, os.environ.get("RANK") or "0").write_text(str(code))


def prepare_training() -> ProcessRank:
    """Read the rank of this process for a training job; remove leftover variables that accelerate would believe.

    Raises:
        ConfigError: as `process_rank`; or MPI has started several processes, or accelerate is configured for another
            way to train.
    """
    process = process_rank(_RENDEZVOUS)
    if process.size == 1:
        for name in _MPI_SIZES:
            if (os.environ.get(name) or "").isdecimal() and int(os.environ[name]) > 1:
                raise ConfigError(
                    f"{name} is {os.environ[name]}, but WORLD_SIZE is not: MPI is not supported: start with "
                    f"`accelerate launch`, or unset {name} for a single process"
                )
        _unset(*_RANKS, *_RENDEZVOUS, "WORLD_SIZE")
    else:
        _number("MASTER_PORT", 0)
    for name in _OTHER_TRAINERS:
        if is_on(name):
            raise ConfigError(
                f"{name} is set: accelerate is configured for another way to train, and this trainer is plain "
                f"data-parallel: launch with --multi_gpu or with a file of launch/accelerate, or unset {name}"
            )
    return process


def is_on(name: str) -> bool:
    """Whether an environment variable switches something on."""
    return os.environ.get(name, "").lower() in _YES


def dynamo_backend() -> str:
    """The compiler of accelerate's configuration; empty if it has none."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "")
    return "" if backend.lower() in ("no", "none") else ascii(backend)[1:-1]


def clear_settings() -> None:
    """Remove the variables by which accelerate would do anything else than its arguments say."""
    settings = [name for name in os.environ if name.startswith(("ACCELERATE_", *_MPI))]
    _unset(*(name for name in settings if name not in _KEEP or not is_on(name)))


def is_first_of_node() -> bool:
    """Whether this is the first process of its node, or no process of a launcher."""
    return not os.environ.get("TORCHELASTIC_RUN_ID") or count("LOCAL_RANK", 0) == 0


def tell_launcher(message: str) -> None:
    """Write an error where the launcher looks for it: it ends its own report with it.

    torch's elastic launcher names a file for this in `TORCHELASTIC_ERROR_FILE`; `accelerate launch` prints a traceback
    of its own after any exit code but 0, and nothing that a process does prevents that.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(file, "w", encoding="utf-8") as output:
            json.dump({"message": {"message": message, "extraInfo": details}}, output)


def count(name: str, default: int) -> int:
    """A number from a scheduler or launcher; the default if the variable is unset or no number."""
    text = os.environ.get(name, "").strip()
    return int(text) if text.isascii() and text.isdecimal() else default


def _unset(*names: str) -> None:
    for name in names:
        os.environ.pop(name, None)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{name} is {text!r}, which is not a process number: unset it for a single process")
    return int(text)
