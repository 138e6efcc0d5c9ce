"""What fits the device, found by trying: the cheapest checkpointing policy and the largest micro-batch."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from pipeline.errors import ConfigError

Policy = TypeVar("Policy", bound=str)

CPU_MICRO_BATCH = 64
"""Largest automatic micro-batch on a CPU, where memory is rarely the limit and larger ones are no faster."""


def micro_batches(share: int, device: torch.device) -> list[int]:
    """The micro-batches to try for a rank's share of the global batch: its divisors, largest first."""
    divisors = [size for size in range(share, 0, -1) if share % size == 0]
    return divisors if device.type == "cuda" else [size for size in divisors if size <= CPU_MICRO_BATCH][:1]


def what_fits(
    fits: Callable[[Policy, int], bool], policies: Sequence[Policy], sizes: Sequence[int]
) -> tuple[Policy, int]:
    """The first (policy, micro-batch) that does not run out of memory; larger micro-batches before cheaper policies.

    A policy that saves memory costs at most a third more compute, while halving the micro-batch often costs less:
    so each policy may halve once before the next is tried, and all sizes are tried under the last.

    Args:
        fits: runs one forward and backward pass on every rank; whether none ran out of memory.
        policies: cheapest first.
        sizes: largest first.

    Raises:
        ConfigError: nothing fits.
    """
    for policy in policies:
        for size in sizes if policy == policies[-1] else sizes[:2]:
            if fits(policy, size):
                return policy, size
            gc.collect()
            torch.cuda.empty_cache()
    raise ConfigError(
        f"not even micro-batch {sizes[-1]} with checkpointing {policies[-1]} fits this device: "
        "take train.checkpointing=auto, a smaller model or smaller pictures"
    )


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """Leave out of `peak_bytes` what trials took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
