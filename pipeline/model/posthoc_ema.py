"""Averages of the weights whose length is chosen after training (Karras et al. 2024, arXiv:2312.02696, section 3).

A power-function average at update t weights the weights of update s by the integral of its profile, which is
proportional to τ^γ on [0, t], over [s - 1, s]. Its length σ_rel is the standard deviation of the profile relative to t.
A weighted sum of some of these averages approximates any other: the one whose profile is nearest in least squares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import MAX_EMA_LENGTH
from pipeline.errors import ConfigError


class Profile(NamedTuple):
    """What a power-function average weights."""

    updates: int
    """Number of updates, t."""
    length: float
    """σ_rel: standard deviation of the profile relative to t."""


class PowerAverages:
    """Power-function averages of a network's weights, in their type and on their device.

    Unlike in `ema_pytorch.PostHocEMA` an update is never left out: its decay is that of one step.

    Args:
        model: the bare module.
        lengths: σ_rel of each average.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[float]) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._averages = {length: [torch.zeros_like(p).detach() for p in model.parameters()] for length in lengths}

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor], t: int) -> None:
        """Take in the weights of update t = 1, 2, …: decay (1 - 1/t)^(γ+1) (eq. 3 of appendix C)."""
        weights = list(weights)
        for length, average in self._averages.items():
            decay = (1 - 1 / t) ** (exponent(length) + 1)
            torch._foreach_lerp_(average, weights, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """All averages under `LENGTH/NAME`, not copied."""
        return {
            f"{length!r}/{name}": tensor
            for length, average in self._averages.items()
            for name, tensor in zip(self._names, average, strict=True)
        }


def by_length(tensors: dict[str, Tensor]) -> dict[float, dict[str, Tensor]]:
    """The inverse of `PowerAverages.tensors`: length → name → tensor."""
    averages: dict[float, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        length, _, name = key.partition("/")
        averages.setdefault(float(length), {})[name] = tensor
    return averages


def check_length(length: float, key: str) -> None:
    """Check that there is an average of this length.

    Raises:
        ConfigError: there is none; the message names `key`.
    """
    if not 0 < length <= MAX_EMA_LENGTH:
        raise ConfigError(f"{key} {length:g}: give a length above 0 and up to {MAX_EMA_LENGTH}, such as 0.1")


@cache
def exponent(length: float) -> float:
    """The exponent γ of the profile of a length: σ_rel² = (γ+1) / ((γ+2)² (γ+3)) (eq. 2 of appendix C)."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """The weighted sum of stored averages that is nearest to a wanted one.

    The profiles' distance is minimised in closed form (algorithm 3 of appendix C); then the sum is scaled so that the
    weights of all updates add up to 1.

    Args:
        stored: the averages to combine.
        wanted: the average to approximate.

    Returns:
        A coefficient for each stored average; and the distance between the profiles before the scaling, relative to
        the norm of the wanted one.
    """
    products = np.array([[_product(a, b) for b in stored] for a in stored]) * wanted.updates
    targets = np.array([_product(a, wanted) for a in stored]) * wanted.updates
    solution: NDArray[np.float64] = np.linalg.lstsq(products, targets, rcond=None)[0]
    norm = _product(wanted, wanted) * wanted.updates
    squared = float(solution @ products @ solution - 2 * solution @ targets + norm) / norm
    return solution / solution.sum(), float(np.sqrt(max(squared, 0.0)))


def _product(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles, each with the integral 1."""
    first, last = sorted((a, b))
    x, y = exponent(first.length), exponent(last.length)
    return float((x + 1) * (y + 1) / (x + y + 1) * (first.updates / last.updates) ** y / last.updates)
