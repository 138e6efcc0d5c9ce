"""What happened between two log lines: sums that stay on the device until they are asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

QUARTILES = 4


class Meter:
    """Losses by timestep quartile, gradient norms, and where the time went.

    Args:
        timesteps: T of the diffusion.
        device: where the losses are.
    """

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self._timesteps = timesteps
        self._losses = torch.zeros(2, QUARTILES, dtype=torch.float64, device=device)
        self._grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self._clear()

    def _clear(self) -> None:
        self._losses.zero_()
        self._grad_norm.zero_()
        self._finite_norms = torch.zeros_like(self._grad_norm)
        self._steps, self._wait_s, self._since = 0, 0.0, time.perf_counter()

    def add(self, losses: Tensor, t: Tensor, grad_norm: Tensor, wait_s: float) -> None:
        """A step: per-sample losses (n,) at timesteps t (n,), gradient norm, and how long it waited for data.

        What is not finite counts for nothing here.
        """
        quartile, finite = t * QUARTILES // self._timesteps, losses.isfinite()
        self._losses[0].index_add_(0, quartile, torch.where(finite, losses, 0).to(torch.float64))
        self._losses[1].index_add_(0, quartile, finite.to(torch.float64))
        self._grad_norm += grad_norm.nan_to_num(0.0, 0.0, 0.0)
        self._finite_norms += grad_norm.isfinite()
        self._wait_s += wait_s
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent on something else than steps: saving, previews, validation."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def read(self, total: Callable[[Tensor], Tensor], global_batch: int) -> dict[str, float]:
        """The figures since the last reading; what was never finite is left out.

        Args:
            total: elementwise sum over the ranks.
            global_batch: pictures in a step.
        """
        seconds = time.perf_counter() - self._since
        sums, counts = total(self._losses).tolist()
        figures = {
            "speed/images_per_s": global_batch * self._steps / max(seconds, 1e-9),
            "speed/data_wait_share": min(1.0, self._wait_s / max(seconds, 1e-9)),
        }
        if sum(counts):
            figures["train/loss"] = sum(sums) / sum(counts)
        if norms := int(self._finite_norms):
            figures["train/grad_norm"] = float(self._grad_norm) / norms
        bounds = [math.ceil(self._timesteps * i / QUARTILES) for i in range(QUARTILES + 1)]
        for i, (loss, count) in enumerate(zip(sums, counts)):
            if count:
                figures[f"train/loss_t{bounds[i]:04d}-{bounds[i + 1] - 1:04d}"] = loss / count
        self._clear()
        return figures
