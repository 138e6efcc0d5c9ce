"""The cheapest checkpointing policy and the largest micro-batch that fit into a device's memory, found by trying."""

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


def sizes_to_try(share: int, device: torch.device) -> list[int]:
    """The micro-batches to try: the divisors of a rank's share of the global batch, largest first."""
    divisors = [size for size in range(share, 0, -1) if share % size == 0]
    return divisors if device.type == "cuda" else [size for size in divisors if size <= CPU_MICRO_BATCH][:1]


def choose_what_fits(
    fits: Callable[[Policy, int], bool], policies: Sequence[Policy], sizes: Sequence[int]
) -> tuple[Policy, int]:
    """Try policies and micro-batches on the device and return the first (policy, micro-batch) that fits.

    A policy that saves memory costs at most a third more compute, while halving the micro-batch often costs less:
    so each policy may halve once before the next is tried, and all sizes are tried under the last.

    Args:
        fits: runs one forward and backward pass on every rank and says whether each had enough memory.
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
        "set train.checkpointing=auto, or use a smaller model or smaller images"
    )


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_bytes(device: torch.device) -> None:
    """Let `peak_bytes` of a GPU count from now on, without the trials."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
