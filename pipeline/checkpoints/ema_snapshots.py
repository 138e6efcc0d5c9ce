"""Snapshots of a run's power-function averages, from which an average of any length is made later.

`RUN/ema_snapshots/step_00012000.safetensors` holds them in float16; the record `step_00012000.json` is written after it
and commits it. A snapshot is written before the checkpoint of its step is committed, so a run that is killed and
resumed writes the same ones as an unbroken run. Torch is imported only to read tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.checkpoints.run_dir import RunDir, checkpoint_name
from pipeline.errors import DataError
from pipeline.storage import files
from pipeline.untrusted import printable

if TYPE_CHECKING:
    from torch import Tensor

PART = "posthoc_ema"
"""The part of a checkpoint that holds the averages themselves."""
VERSION = 1


@dataclass(frozen=True)
class Snapshot:
    """A committed snapshot."""

    path: str
    """Of the tensors."""
    step: int
    updates: int
    """Updates of the averages: good steps until then."""
    sha256: str

    def tensors(self) -> dict[str, Tensor]:
        """Read the averages: `LENGTH/NAME` → CPU tensor, float16.

        Raises:
            DataError: the file is missing or damaged.
        """
        import safetensors.torch

        try:
            data = files.read_bytes(self.path)
        except FileNotFoundError:
            raise DataError(f"{self.path}: missing: restore it, or remove its .json to do without it") from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DataError(f"{self.path}: damaged: restore it, or remove its .json to do without it")
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors


def write(
    run_dir: str,
    step: int,
    pieces: Sequence[bytes | memoryview],
    updates: int,
    check_lease: Callable[[], None] = lambda: None,
) -> None:
    """Write a snapshot. It does not exist before this function returns.

    Args:
        run_dir: the run.
        step: number of finished steps.
        pieces: content of the safetensors file.
        updates: of the averages.
        check_lease: called before each file; raises RunHeld if another job has taken the run over.

    Raises:
        DataError: the disk is full or must not be written.
        RunHeld: from `check_lease`.
    """
    run, digest = RunDir(run_dir), hashlib.sha256()
    check_lease()
    files.remove(run.ema_snapshot(step, "json"))
    with files.publishing(run.ema_snapshot(step, "safetensors")) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        check_lease()  # writing may have taken long
    size = sum(len(piece) for piece in pieces)
    record = {"version": VERSION, "step": step, "updates": updates, "bytes": size, "sha256": digest.hexdigest()}
    files.write_json(run.ema_snapshot(step, "json"), record)


def committed(run_dir: str) -> list[Snapshot]:
    """The snapshots of a run, in ascending order of steps; their files are not read.

    Raises:
        DataError: a record is damaged.
    """
    return [_read(run_dir, step) for step in RunDir(run_dir).ema_snapshot_steps("json")]


def remove_newer(run_dir: str, step: int) -> None:
    """Remove the snapshots after a step, from which a run resumes."""
    run = RunDir(run_dir)
    for extension in ("json", "safetensors"):  # the record first
        for later in run.ema_snapshot_steps(extension):
            if later > step:
                files.remove(run.ema_snapshot(later, extension))


def verify(run_dir: str) -> list[str]:
    """Read all snapshots of a run in full; what is wrong with each damaged one, a line each."""
    findings = []
    for step in RunDir(run_dir).ema_snapshot_steps("json"):
        name = f"ema_snapshots/{checkpoint_name(step)}"
        try:
            snapshot = _read(run_dir, step)
            if files.sha256(snapshot.path) != snapshot.sha256:
                findings.append(f"{name}.safetensors does not match its sha256")
        except FileNotFoundError:
            findings.append(f"{name}.safetensors is missing")
        except DataError as error:
            findings.append(printable(str(error)))
    return findings


def _read(run_dir: str, step: int) -> Snapshot:
    run = RunDir(run_dir)
    path = run.ema_snapshot(step, "json")
    try:
        record: Any = files.read_json(path)
        values = int(record["step"]), int(record["updates"]), str(record["sha256"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: not the record of a snapshot: remove it") from None
    if values[0] != step or not 0 < values[1] <= step:
        raise DataError(f"{path}: not the record of this step: remove it")
    return Snapshot(run.ema_snapshot(step, "safetensors"), *values)
