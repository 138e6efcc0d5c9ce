"""Checkpoints: a kill at any moment loses only the steps after the last checkpoint.

`RUN/checkpoints/step_00012000/` holds model, ema and optimizer as safetensors, `state.json`, and, written last,
`manifest.json` with the size and sha256 of each file. A checkpoint is valid if its manifest exists, all files agree
with it, and the weights are finite. The rule is the same for local directories and object stores, where nothing can be
renamed. The safetensors files depend on the step alone. Nothing is pickled, and torch is imported only to read tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import untrusted
from pipeline.checkpoints.run_dir import RunDir, advice_for_missing, checkpoint_name, step_of
from pipeline.errors import ConfigError, DataError, NoCheckpoint, RunHeld
from pipeline.storage import files

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_MANIFEST = "manifest.json"
_KEEP = "KEEP"


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint."""

    path: str
    step: int
    manifest_sha256: str

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Read one part (model, ema or optimizer): name → CPU tensor."""
        import safetensors.torch

        data = files.read_bytes(files.join(self.path, f"{part}.safetensors"))
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors

    def has(self, part: str) -> bool:
        """Whether it has a part; every checkpoint has model, ema and optimizer."""
        return files.exists(files.join(self.path, f"{part}.safetensors"))

    def restore(self, part: str, live: Mapping[str, Tensor]) -> None:
        """Copy the tensors of one part into live tensors of the same names and shapes.

        Raises:
            NoCheckpoint: a tensor of the optimizer is not finite; weights were checked before.
        """
        saved = self.tensors(part)
        if name := first_not_finite(saved):
            raise NoCheckpoint(
                f"{self.path}: {part}.safetensors is not finite ({name}): remove it, or give an earlier checkpoint"
            )
        for name, tensor in live.items():
            tensor.copy_(saved[name])

    def state(self) -> dict[str, Any]:
        """Read all that is not a tensor: configuration, position in the data, versions."""
        return dict(files.read_json(files.join(self.path, "state.json")))


class _InvalidError(Exception):
    """Why a directory is not a valid checkpoint."""


def write_checkpoint(
    run_dir: str,
    step: int,
    contents: Mapping[str, Sequence[bytes | memoryview]],
    *,
    generation: int = 0,
    check_lease: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Write a checkpoint. It does not exist before this function returns.

    Args:
        run_dir: the run.
        step: number of finished steps.
        contents: file name → the content of the file, in pieces.
        generation: of this job's lease.
        check_lease: called before and after each file; raises RunHeld if another job has taken the run over.

    Raises:
        DataError: the disk is full or must not be written; older checkpoints are untouched.
        RunHeld: from `check_lease`.
    """
    run = RunDir(run_dir)
    path = run.checkpoint(step)
    needed, free = sum(len(piece) for pieces in contents.values() for piece in pieces), files.free_bytes(run_dir)
    if free is not None and free < needed:
        raise DataError(f"cannot write {path}: it takes {needed:,} bytes and {free:,} are free: make room")
    check_lease()
    files.remove(path)  # a save of this step that was killed, or a damaged checkpoint that the run did not resume from
    manifest: dict[str, Any] = {"version": VERSION, "step": step, "generation": generation, "files": {}}
    try:
        for name, pieces in contents.items():
            check_lease()
            digest, size = hashlib.sha256(), 0
            with files.publishing(files.join(path, name)) as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                check_lease()  # writing may have taken long
            manifest["files"][name] = {"bytes": size, "sha256": digest.hexdigest()}
        if not files.is_remote(run_dir):
            files.sync_dir(run.checkpoints)
        check_lease()
        committed = (json.dumps(manifest, indent=1) + "\n").encode()
        files.write_bytes(files.join(path, _MANIFEST), committed)
    except RunHeld:
        raise  # the directory may belong to the other job by now
    except Exception:
        with suppress(DataError, OSError):
            check_lease()  # this job may have been frozen: then the directory may belong to another job
            files.remove(path)
        raise
    return Checkpoint(path, step, hashlib.sha256(committed).hexdigest())


def remove_incomplete(run_dir: str) -> None:
    """Remove the checkpoint directories of saves that were killed."""
    run = RunDir(run_dir)
    for step in run.checkpoint_steps():
        if not _is_committed(run.checkpoint(step)):
            files.remove(run.checkpoint(step))


def committed_step(run_dir: str) -> int:
    """The newest step whose checkpoint has a manifest, without reading its files; 0 if there is none."""
    run = RunDir(run_dir)
    return next((step for step in reversed(run.checkpoint_steps()) if _is_committed(run.checkpoint(step))), 0)


def newest_checkpoint(run_dir: str) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest valid checkpoint of a run.

    Returns:
        The checkpoint, and why each newer one was ignored, a line each. (None, …) for a run without a finished save.

    Raises:
        NoCheckpoint: there are checkpoints, but none is valid: a run never restarts at step 0 silently.
    """
    run = RunDir(run_dir)
    ignored: list[str] = []
    steps = run.checkpoint_steps()
    for step in reversed(steps):
        try:
            return _validate(run.checkpoint(step)), ignored
        except _InvalidError as reason:
            ignored.append(f"ignored {checkpoint_name(step)}: {reason}")
    if _has_nothing_to_lose(run, steps) and not files.exists(run.done):
        return None, ignored
    raise NoCheckpoint(
        f"{run_dir}: no valid checkpoint ({'; '.join(ignored)}): restore a checkpoint, or choose another run.dir"
    )


def find_checkpoint(source: str) -> tuple[Checkpoint, list[str]]:
    """Find the newest valid checkpoint of a run, or validate a given checkpoint.

    Args:
        source: a run directory or a checkpoint directory.

    Returns:
        The checkpoint, and why each newer one was ignored, a line each.

    Raises:
        ConfigError: `source` does not exist.
        NoCheckpoint: `source` has no valid checkpoint.
    """
    if not files.exists(source):
        raise ConfigError(f"{source}: no such run or checkpoint: {advice_for_missing(source)}")
    if _is_committed(source):
        try:
            return _validate(source), []
        except _InvalidError as reason:
            raise NoCheckpoint(f"{source}: {reason}: give another checkpoint of the run") from None
    checkpoint, ignored = newest_checkpoint(source)
    if checkpoint is None:
        raise NoCheckpoint(f"{source} holds no checkpoint yet: train first, or give another run")
    return checkpoint, ignored


def step_of_manifest(run_dir: str, manifest_sha256: str) -> int | None:
    """The step of a run's checkpoint with this manifest; None if the run has no such checkpoint."""
    run = RunDir(run_dir)
    for step in reversed(run.checkpoint_steps()):
        path = files.join(run.checkpoint(step), _MANIFEST)
        if files.exists(path) and files.sha256(path) == manifest_sha256:
            return step
    return None


def best_step(run_dir: str) -> int | None:
    """The step of the best checkpoint by `run.evaluate_every`; None if no evaluation has been saved."""
    with suppress(DataError):
        return untrusted.count(_best(run_dir, "step"), "step")
    return None


def lowest_distance(run_dir: str) -> float | None:
    """The Fréchet distance of the best checkpoint; None if no evaluation has been saved."""
    with suppress(TypeError, ValueError):
        return float(_best(run_dir, "frechet_distance"))
    return None


def _best(run_dir: str, key: str) -> Any:
    """A value of `best.json`; None if there is none."""
    with suppress(FileNotFoundError, DataError, KeyError, TypeError):
        return files.read_json(RunDir(run_dir).best)[key]
    return None


def best_checkpoint(run_dir: str) -> str:
    """The directory of the best checkpoint of a run.

    Raises:
        ConfigError: the run was not evaluated while it was trained.
    """
    if (step := best_step(run_dir)) is None:
        raise ConfigError(f"--best: {run_dir} was not evaluated: train it with run.evaluate_every, or leave --best out")
    return RunDir(run_dir).checkpoint(step)


def keep_forever(checkpoint: Checkpoint) -> None:
    """Mark a checkpoint so that `remove_old` never removes it."""
    files.write_bytes(files.join(checkpoint.path, _KEEP), b"")


def remove_old(run_dir: str, keep_last: int, keep_every: int, *, verified_paths: Collection[str] = ()) -> None:
    """Remove all checkpoints but the newest `keep_last`, multiples of `keep_every`, the best one, and marked ones.

    Only valid checkpoints count towards `keep_last`: damaged ones and killed saves do not replace a good one. A
    checkpoint saved during a row of bad steps does not count either, and stays only while it is the newest: the next
    checkpoint of the row has the same weights.

    Args:
        run_dir: the run.
        keep_last: number of newest checkpoints to keep.
        keep_every: 0: none.
        verified_paths: checkpoints that this process has written, or read in full: they are not read again.
    """
    run, valid = RunDir(run_dir), 0
    steps, best = run.checkpoint_steps(), best_step(run_dir)
    for step in reversed(steps):
        path = run.checkpoint(step)
        committed = _is_committed(path)
        is_milestone = step == best or (keep_every > 0 and step % keep_every == 0)
        bad = valid < keep_last and committed and _position(path).get("bad_in_a_row", 0) > 0
        if valid < keep_last and (not bad or step == steps[-1]):
            valid += committed and not bad and (path in verified_paths or _why_invalid(path) is None)
        elif not committed or not (is_milestone or files.exists(files.join(path, _KEEP))):
            files.remove(files.join(path, _MANIFEST))  # first, so that a kill does not leave half a valid checkpoint
            files.remove(path)


def newest_safe_checkpoint(run_dir: str, good_steps: int) -> str | None:
    """Name of the newest valid checkpoint whose weights have taken a good step since; None if there is none.

    Args:
        run_dir: the run.
        good_steps: number of good steps until now. A checkpoint with as many has the present weights, from which no
            good step has followed.
    """
    run = RunDir(run_dir)
    for step in reversed(run.checkpoint_steps()):
        position = _position(run.checkpoint(step))
        is_proved = not position.get("bad_in_a_row", 0) and position.get("ema_updates", good_steps) < good_steps
        if is_proved and _why_invalid(run.checkpoint(step)) is None:
            return checkpoint_name(step)
    return None


def verify_checkpoints(run_dir: str, each: Callable[[Sequence[int]], Iterable[int]] = iter) -> list[str]:
    """Read all checkpoints of a run in full.

    Args:
        run_dir: the run.
        each: iterates over the steps, to show progress or to stop.

    Returns:
        What is wrong with each invalid checkpoint, a line each.
    """
    run = RunDir(run_dir)
    steps = run.checkpoint_steps()
    if _has_nothing_to_lose(run, steps):
        return []
    reasons = ((step, _why_invalid(run.checkpoint(step))) for step in each(steps))
    return [f"{checkpoint_name(step)}: {reason}" for step, reason in reasons if reason]


def first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that has inf or NaN; None if all are finite."""
    return next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)


def _has_nothing_to_lose(run: RunDir, steps: Sequence[int]) -> bool:
    """Whether the run has no checkpoint, except perhaps a first one whose save was killed."""
    return not steps or (len(steps) == 1 and not _is_committed(run.checkpoint(steps[0])))


def _is_committed(path: str) -> bool:
    return files.exists(files.join(path, _MANIFEST))


def _position(path: str) -> dict[str, Any]:
    """The position in a checkpoint's state; {} if it cannot be read, as the checkpoint is invalid then."""
    with suppress(DataError, OSError, ValueError, KeyError, TypeError):
        return dict(files.read_json(files.join(path, "state.json"))["position"])
    return {}


def _why_invalid(path: str) -> str | None:
    try:
        _validate(path)
    except _InvalidError as reason:
        return str(reason)
    return None


def _validate(path: str) -> Checkpoint:
    try:
        data = files.read_bytes(files.join(path, _MANIFEST))
    except FileNotFoundError:
        raise _InvalidError(f"no {_MANIFEST}") from None
    try:
        manifest = untrusted.parse_json(data, _MANIFEST)
        version, step = int(manifest["version"]), int(manifest["step"])
        listed = {
            untrusted.name_inside(name, _MANIFEST): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        raise _InvalidError(f"{_MANIFEST} is damaged") from None
    if version > VERSION:
        raise ConfigError(
            f"{path}: written in format {version}, this version reads up to {VERSION}: upgrade ddpm-pipeline"
        )
    if step_of(path) not in (None, step) or not {"state.json", "model.safetensors"} <= listed.keys():
        raise _InvalidError(f"{_MANIFEST} is damaged")
    for name, (size, sha256) in listed.items():
        file = files.join(path, name)
        if not files.exists(file):
            raise _InvalidError(f"{name} is missing")
        if files.size(file) != size:
            raise _InvalidError(f"{name} has {files.size(file)} bytes instead of {size}")
        if files.sha256(file) != sha256:
            raise _InvalidError(f"{name} does not match its sha256")
    checkpoint = Checkpoint(path, step, hashlib.sha256(data).hexdigest())
    _check_weights(checkpoint, [part for part in ("model", "ema") if f"{part}.safetensors" in listed])
    return checkpoint


def _check_weights(checkpoint: Checkpoint, parts: list[str]) -> None:
    from safetensors import SafetensorError

    for part in parts:
        try:
            name = first_not_finite(checkpoint.tensors(part))
        except SafetensorError:
            raise _InvalidError(f"{part}.safetensors is damaged") from None
        if name:
            raise _InvalidError(f"{part}.safetensors holds weights that are not finite ({name})")
