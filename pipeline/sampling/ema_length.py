"""The averaged weights of a run for an average of any length, made of the averages that the run has stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import messages
from pipeline.checkpoints import ema_snapshots
from pipeline.checkpoints.checkpoint import Checkpoint, first_not_finite
from pipeline.checkpoints.ema_snapshots import Snapshot
from pipeline.errors import ConfigError, DataError
from pipeline.model.posthoc_ema import Profile, by_length, check_length, coefficients

_POOR = 0.05
"""Distance of profiles from which a warning says so."""


class _Stored(NamedTuple):
    """The averages of one step."""

    updates: int
    source: Checkpoint | Snapshot
    lengths: tuple[float, ...]


def read(checkpoint: Checkpoint, updates: int, length: float) -> tuple[dict[str, Tensor], str]:
    """The average of a length at a checkpoint, from the averages in it and from the run's older snapshots.

    Args:
        checkpoint: of a run with `run.ema_snapshot_every`.
        updates: of its averages.
        length: σ_rel.

    Returns:
        Name → float32 tensor; and a hash of all that they are made of.

    Raises:
        ConfigError: there is no average of this length, or the run has stored none.
        DataError: a snapshot is damaged, or the result is not finite.
    """
    check_length(length, "--ema-length")
    if not checkpoint.has(ema_snapshots.PART) or not updates:
        raise ConfigError(
            f"--ema-length: {checkpoint.path} has only its own average: leave it out, or train a new run with "
            "run.ema_snapshot_every, such as 5000"
        )
    own = by_length(checkpoint.tensors(ema_snapshots.PART))
    lengths = tuple(own)
    older = [snapshot for snapshot in _snapshots(checkpoint) if snapshot.updates < updates]
    stored: list[_Stored] = [_Stored(updates, checkpoint, lengths)]
    if length not in lengths:  # otherwise the checkpoint has it as it is
        stored += [_Stored(snapshot.updates, snapshot, lengths) for snapshot in older]
    profiles = [Profile(part.updates, each) for part in stored for each in part.lengths]
    weights, distance = coefficients(profiles, Profile(updates, length))
    averages = (average for part in stored for average in _averages(part, own))
    total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in own[lengths[0]].items()}
    for weight, average in zip(weights.tolist(), averages, strict=True):
        for name, tensor in average.items():
            total[name] += tensor.double() * weight
    result = {name: tensor.float() for name, tensor in total.items()}
    if wrong := first_not_finite(result):
        raise DataError(f"--ema-length {length:g}: gives weights that are not finite ({wrong}): give another length")
    _report(length, len(stored) - 1, distance)
    hashes = [checkpoint.manifest_sha256, *(part.source.sha256 for part in stored if isinstance(part.source, Snapshot))]
    return result, hashlib.sha256(" ".join([*hashes, f"{length!r}"]).encode()).hexdigest()


def _report(length: float, snapshots: int, distance: float) -> None:
    line = f"--ema-length {length:g}: made of {snapshots} snapshots, its profile within {distance:.1%} of the true one"
    if distance > _POOR:
        messages.warning(f"{line}: a length nearer to those stored, or more snapshots, would be closer")
    else:
        messages.info(line)


def _snapshots(checkpoint: Checkpoint) -> list[Snapshot]:
    """Of the run that a checkpoint lies in; none elsewhere."""
    directory = checkpoint.path.rstrip("/").rpartition("/")[0]
    return ema_snapshots.committed(directory.removesuffix("/checkpoints")) if directory.endswith("/checkpoints") else []


def _averages(part: _Stored, own: dict[float, dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The averages of one step, in the order of its lengths; only these are in memory."""
    averages = own if isinstance(part.source, Checkpoint) else by_length(part.source.tensors())
    try:
        yield from (averages[length] for length in part.lengths)
    except KeyError:
        raise DataError(f"{part.source.path}: holds averages of other lengths: remove its .json") from None
