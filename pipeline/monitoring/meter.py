"""Figures between two log lines: loss, gradient norm and speed. The sums stay on the device until they are read."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.cluster import launch_environment
from pipeline.monitoring.flops import peak_flop_per_s
from pipeline.storage import files

QUARTILES = 4
SLOW_LOADER_SHARE = 1 / 3
"""Share of the time spent waiting for data above which the loader is too slow."""


class Meter:
    """Collects the losses by timestep quartile, the gradient norms, and the time spent waiting.

    Args:
        timesteps: T of the diffusion.
        device: of the losses.
        flops: of a step on this device, forward and backward, without recomputed activations.
    """

    def __init__(self, timesteps: int, device: torch.device, flops: float) -> None:
        self._timesteps, self._device, self._flops = timesteps, device, flops
        self._peak = peak_flop_per_s(device)
        self._losses = torch.zeros(2, QUARTILES, dtype=torch.float64, device=device)
        self._norms = torch.zeros(2, dtype=torch.float64, device=device)
        self._readings, self._has_warned = 0, False
        self._clear()

    def _clear(self) -> None:
        self._losses.zero_()
        self._norms.zero_()
        self._steps, self._wait_s, self._since = 0, 0.0, time.perf_counter()

    def add(self, losses: Tensor, t: Tensor, grad_norm: Tensor) -> None:
        """Add a step: per-sample losses (n,) at timesteps t (n,), and the norm of the gradient.

        Values that are not finite are ignored.
        """
        quartile, finite = t * QUARTILES // self._timesteps, losses.isfinite()
        self._losses[0].index_add_(0, quartile, torch.where(finite, losses, 0).to(torch.float64))
        self._losses[1].index_add_(0, quartile, finite.to(torch.float64))
        self._norms += torch.stack((grad_norm.nan_to_num(0.0, 0.0, 0.0), grad_norm.isfinite()))
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent here as waiting for data, unless the device still had work to do at its end."""
        started = time.perf_counter()
        yield
        if self._device.type != "cuda" or torch.cuda.current_stream(self._device).query():
            self._wait_s += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent here from the speed: saving, previews, validation."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def read(self, sum_over_ranks: Callable[[Tensor], Tensor], global_batch: int) -> dict[str, float]:
        """The figures since the last call. Figures without a finite value are left out, also MFU on an unknown device.

        Args:
            sum_over_ranks: elementwise sum of a tensor over the ranks.
            global_batch: images in a step.
        """
        sums, counts = sum_over_ranks(self._losses).tolist()
        norm, norms = self._norms.tolist()
        seconds = max(time.perf_counter() - self._since, 1e-9)  # after tolist, which waits for the device
        flop_per_s = self._flops * self._steps / seconds
        figures = {
            "speed/images_per_s": global_batch * self._steps / seconds,
            "speed/data_wait_share": min(1.0, self._wait_s / seconds),
            "speed/tflop_per_s": flop_per_s / 1e12,
        }
        if self._peak:
            figures["speed/mfu"] = flop_per_s / self._peak
        if sum(counts):
            figures["train/loss"] = sum(sums) / sum(counts)
        if norms:
            figures["train/grad_norm"] = norm / norms
        bounds = [math.ceil(self._timesteps * i / QUARTILES) for i in range(QUARTILES + 1)]
        for i, (loss, count) in enumerate(zip(sums, counts)):
            if count:
                figures[f"train/loss_t{bounds[i]:04d}-{bounds[i + 1] - 1:04d}"] = loss / count
        self._readings += 1
        self._clear()
        return figures

    def slow_loader_advice(self, figures: dict[str, float], *, workers: int, shards: str, retries: float) -> str | None:
        """What to do about a slow loader; given once. The first interval is ignored, as the loader fills its queue.

        Args:
            figures: from `read`.
            workers: loader processes of this rank.
            shards: the shard set that they read.
            retries: number of repeated reads, on all ranks.
        """
        share = figures["speed/data_wait_share"]
        if share <= SLOW_LOADER_SHARE or self._readings < 2 or self._has_warned:
            return None
        self._has_warned = True
        cores = len(os.sched_getaffinity(0)) // (launch_environment.count("LOCAL_WORLD_SIZE", 1) or 1)
        if retries:
            cause = f"{retries:.0f} reads were repeated: copy {shards} to nearer or more reliable storage"
        elif workers < cores:
            cause = f"raise data.workers from {workers}: there are {cores} cores for each process"
            cause += f", and {shards} is far away" if files.is_remote(shards) else ""
        else:
            cause = f"{workers} workers share {cores} cores: give the job more cores, or shard at the size trained on"
        return f"{share:.0%} of the time is spent waiting for data; {cause}"
