"""Checkpoints: written so that a kill at any moment costs only what came after the last one.

`RUN/checkpoints/step_00012000/` holds model, ema and optimizer as safetensors, `state.json`, and last of all
`manifest.json` with the size and sha256 of each. A checkpoint exists if and only if its manifest is there and all of
them agree; one rule for local directories and object stores, with nothing to rename. The tensors' files are a function
of the step alone. There is no pickle, and nothing here needs torch before tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.errors import ConfigError, DataError, NoCheckpoint, Superseded

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")
_MANIFEST = "manifest.json"
_KEEP = "KEEP"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files agree with its manifest."""

    path: str
    step: int
    manifest_sha256: str

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Name → CPU tensor of one part: model, ema or optimizer."""
        import safetensors.torch

        tensors: dict[str, Tensor] = safetensors.torch.load(
            storage.read_bytes(storage.join(self.path, f"{part}.safetensors"))
        )
        return tensors

    def restore(self, part: str, live: Mapping[str, Tensor]) -> None:
        """Copy the tensors of one part into live ones of the same names and shapes."""
        saved = self.tensors(part)
        for name, tensor in live.items():
            tensor.copy_(saved[name])

    def state(self) -> dict[str, Any]:
        """What is not a tensor: configuration, position in the data, versions."""
        return dict(storage.read_json(storage.join(self.path, "state.json")))


def write(
    run_dir: str,
    step: int,
    files: Mapping[str, Sequence[bytes | memoryview]],
    *,
    generation: int = 0,
    may_write: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Save a checkpoint; it exists once this returns, and not before.

    Args:
        run_dir: the run.
        step: finished steps.
        files: file name → its content, in pieces.
        generation: of the writer's hold on the run.
        may_write: called before each file; raises if the run has gone over to another job.

    Raises:
        DataError: no space left, or not permitted; an older checkpoint is untouched.
        Superseded: as `may_write` says.
    """
    root = storage.join(run_dir, "checkpoints")
    path = storage.join(root, f"step_{step:08d}")
    needed, free = sum(len(piece) for pieces in files.values() for piece in pieces), storage.free_bytes(run_dir)
    if free is not None and free < needed:
        raise DataError(f"cannot write {path}: it takes {needed:,} bytes and {free:,} are free: make room")
    may_write()
    storage.remove(path)  # the remains of a killed save, or one that was rejected when the run went on from before it
    manifest: dict[str, Any] = {"version": VERSION, "step": step, "generation": generation, "files": {}}
    try:
        for name, pieces in files.items():
            may_write()
            digest, size = hashlib.sha256(), 0
            with storage.publishing(storage.join(path, name)) as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                may_write()  # writing may have taken its time
            manifest["files"][name] = {"bytes": size, "sha256": digest.hexdigest()}
        if not storage.is_remote(root):
            storage.sync_dir(root)
        may_write()
        committed = (json.dumps(manifest, indent=1) + "\n").encode()
        storage.write_bytes(storage.join(path, _MANIFEST), committed)
    except Superseded:
        raise  # what lies there may be the other job's by now
    except Exception:
        with suppress(DataError, OSError):
            may_write()  # a write that failed after a freeze: what lies there may be the other job's
            storage.remove(path)
        raise
    return Checkpoint(path, step, hashlib.sha256(committed).hexdigest())


def sweep(run_dir: str) -> None:
    """Remove the remains of saves that were never committed."""
    for name in _names(run_dir):
        path = storage.join(run_dir, "checkpoints", name)
        if not storage.exists(storage.join(path, _MANIFEST)):
            storage.remove(path)


def committed_step(run_dir: str) -> int:
    """The newest step whose checkpoint was committed, without a look at its bytes; 0 if there is none."""
    root = storage.join(run_dir, "checkpoints")
    committed = (n for n in reversed(_names(run_dir)) if storage.exists(storage.join(root, n, _MANIFEST)))
    return next(map(_step, committed), 0)


def newest(run_dir: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and why each newer one was rejected; (None, []) for a run that never saved.

    Raises:
        NoCheckpoint: there are checkpoints, but none is valid: a run never goes back to step 0 in silence.
    """
    rejected: list[str] = []
    for name in reversed(_names(run_dir)):
        try:
            return _validated(storage.join(run_dir, "checkpoints", name)), rejected
        except _InvalidError as reason:
            rejected.append(f"ignored {name}: {reason}")
    # A first save that was killed leaves only a directory without manifest: there is nothing to lose yet.
    begun = len(rejected) <= 1 and not storage.exists(storage.join(run_dir, "DONE"))
    if begun and all(line.endswith(f"no {_MANIFEST}") for line in rejected):
        return None, rejected
    raise NoCheckpoint(
        f"{run_dir}: no valid checkpoint ({'; '.join(rejected)}): restore one, or move the run away to start anew"
    )


def find(source: str) -> tuple[Checkpoint, list[str]]:
    """The newest valid checkpoint of a run, or the one that `source` is, and why newer ones were rejected.

    Raises:
        ConfigError: there is nothing of that name.
        NoCheckpoint: it holds none that is valid.
    """
    if not storage.exists(source):
        raise ConfigError(f"{source}: no such run or checkpoint")
    if storage.exists(storage.join(source, _MANIFEST)):
        try:
            return _validated(source), []
        except _InvalidError as reason:
            raise NoCheckpoint(f"{source}: {reason}: take another checkpoint of the run") from None
    checkpoint, rejected = newest(source)
    if checkpoint is None:
        raise NoCheckpoint(f"{source}: holds no checkpoint yet: train first, or give another run")
    return checkpoint, rejected


def keep(checkpoint: Checkpoint) -> None:
    """Exempt a checkpoint from retention for good."""
    storage.write_bytes(storage.join(checkpoint.path, _KEEP), b"")


def retain(run_dir: str, keep_last: int, keep_every: int, *, sound: Iterable[str] = ()) -> None:
    """Remove all but the newest `keep_last` checkpoints, milestones at multiples of `keep_every`, and kept ones.

    Only valid checkpoints count, so damaged ones and the remains of failed saves never push a good one out.

    Args:
        run_dir: the run.
        keep_last: so many of the newest stay.
        keep_every: 0 for no milestones.
        sound: paths that need not be read again, as this process has written or read them in full.
    """
    root, valid = storage.join(run_dir, "checkpoints"), 0
    for name in reversed(_names(run_dir)):
        path = storage.join(root, name)
        committed = storage.exists(storage.join(path, _MANIFEST))
        milestone = keep_every > 0 and _step(name) % keep_every == 0
        if valid < keep_last:
            valid += committed and (path in sound or _reason_against(path) is None)
        elif not committed or not (milestone or storage.exists(storage.join(path, _KEEP))):
            storage.remove(storage.join(path, _MANIFEST))  # first, so that a kill in between leaves no half one
            storage.remove(path)


def verify(run_dir: str, each: Callable[[Sequence[str]], Iterable[str]] = iter) -> list[str]:
    """What is wrong with each checkpoint of a run, one line each; [] if all is sound.

    A sole one without a manifest is a first save that was killed: there is nothing to lose yet.

    Args:
        run_dir: the run.
        each: gives the names one by one, to watch or to end the work.
    """
    root, names = storage.join(run_dir, "checkpoints"), _names(run_dir)
    if len(names) == 1 and not storage.exists(storage.join(root, names[0], _MANIFEST)):
        return []
    reasons = ((name, _reason_against(storage.join(root, name))) for name in each(names))
    return [f"{name}: {reason}" for name, reason in reasons if reason]


def _reason_against(path: str) -> str | None:
    try:
        _validated(path)
    except _InvalidError as reason:
        return str(reason)
    return None


class _InvalidError(Exception):
    """Why a directory is not a checkpoint."""


def _validated(path: str) -> Checkpoint:
    manifest_path = storage.join(path, _MANIFEST)
    try:
        data = storage.read_bytes(manifest_path)
    except FileNotFoundError:
        raise _InvalidError(f"no {_MANIFEST}") from None
    try:
        manifest = json.loads(data)
        version, step = int(manifest["version"]), int(manifest["step"])
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _InvalidError(f"{_MANIFEST} is damaged") from None
    if version > VERSION:
        raise ConfigError(
            f"{path}: written in format {version}, this version reads up to {VERSION}: upgrade ddpm-pipeline"
        )
    named = _NAME.fullmatch(path.rstrip("/").rpartition("/")[2])
    if (named and int(named[1]) != step) or not {"state.json", "model.safetensors"} <= files.keys():
        raise _InvalidError(f"{_MANIFEST} is damaged")
    for name, (promised, digest) in files.items():
        file = storage.join(path, name)
        if not storage.exists(file):
            raise _InvalidError(f"{name} is missing")
        if storage.size(file) != promised:
            raise _InvalidError(f"{name} has {storage.size(file)} bytes instead of {promised}")
        if storage.sha256(file) != digest:
            raise _InvalidError(f"{name} does not match its sha256")
    return Checkpoint(path, step, hashlib.sha256(data).hexdigest())


def _names(run_dir: str) -> list[str]:
    names = [name for name in storage.listdir(storage.join(run_dir, "checkpoints")) if _NAME.fullmatch(name)]
    return sorted(names, key=_step)


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))
