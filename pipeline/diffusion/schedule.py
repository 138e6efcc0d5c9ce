"""The noise schedule: tables of how much noise each timestep has.

t starts from 0, in the paper from 1: t = 0 has the least noise, T - 1 is nearly pure noise. Tables are float64. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError

_LARGEST_BETA = 0.999


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise each of the T levels has.

    Attributes:
        betas: β_t, float64, (T,).
        alphas_cumprod: ᾱ_t, float64, (T,), falling from almost 1 to almost 0.
        alphas_cumprod_prev: ᾱ_{t-1}, float64, (T,); 1 before the first level.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor

    def __len__(self) -> int:
        return len(self.betas)

    @classmethod
    def linear(cls, timesteps: int) -> Schedule:
        """β from 1e-4 to 0.02 for T = 1000 (Ho et al. 2020, section 4), scaled by 1000/T for other T.

        Raises:
            ConfigError: T is so small that β would exceed 1.
        """
        scale = 1000 / timesteps
        if scale * 0.02 >= 1:
            raise ConfigError(
                f"diffusion.timesteps: {timesteps} is too few for the linear schedule: use at least 21, or cosine"
            )
        return cls._of_betas(torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64))

    @classmethod
    def cosine(cls, timesteps: int) -> Schedule:
        """ᾱ a squared cosine (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17), β at most 0.999."""
        edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        alphas_cumprod = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
        return cls._of_betas((1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=_LARGEST_BETA))

    @classmethod
    def _of_betas(cls, betas: Tensor) -> Schedule:
        alphas_cumprod = (1 - betas).cumprod(0)
        return cls(betas, alphas_cumprod, _before(alphas_cumprod))

    @classmethod
    def _of_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Schedule:
        before = _before(alphas_cumprod)
        return cls(1 - alphas_cumprod / before, alphas_cumprod, before)

    def respaced(self, timesteps: Sequence[int]) -> Schedule:
        """The schedule of a chain that visits only some timesteps: the same ᾱ, and β between neighbours.

        Args:
            timesteps: ascending.
        """
        return Schedule._of_alphas_cumprod(self.alphas_cumprod[list(timesteps)])

    def to(self, device: torch.device | str) -> Schedule:
        """The same tables on a device."""
        return Schedule(*(table.to(device) for table in (self.betas, self.alphas_cumprod, self.alphas_cumprod_prev)))

    @property
    def log_snr(self) -> Tensor:
        """log(ᾱ_t / (1-ᾱ_t)), float64, (T,), falling."""
        return self.alphas_cumprod.logit()

    def shifted(self, shift: float) -> Schedule:
        """The schedule whose log-SNR is higher by `shift` (Hoogeboom et al. 2023, arXiv:2301.11093, eq. 4)."""
        return Schedule._of_alphas_cumprod((self.log_snr + shift).sigmoid())

    def ended_at(self, log_snr: float) -> Schedule:
        """The schedule stretched so that its last timestep has this log-SNR; unchanged if it ends above it.

        Between two timesteps log ᾱ is interpolated linearly.

        Raises:
            ConfigError: all timesteps are below that log-SNR.
        """
        if self.log_snr[-1] >= log_snr:
            return self
        steps = len(self)
        if self.log_snr[0] <= log_snr:
            raise ConfigError(f"diffusion.log_snr_min: {log_snr} is above all timesteps of the schedule: lower it")
        logs = np.concatenate(([0.0], self.alphas_cumprod.log().numpy()))  # at -1, 0, …, T - 1
        last = np.interp(log_snr - math.log1p(math.exp(log_snr)), logs[::-1], np.arange(steps + 1)[::-1])
        stretched = np.interp(np.arange(1, steps + 1) * last / steps, np.arange(steps + 1), logs)
        return Schedule._of_alphas_cumprod(torch.from_numpy(stretched).exp())


def make_schedule(
    name: Literal["linear", "cosine"], timesteps: int, *, log_snr_shift: float = 0.0, log_snr_min: float | None = None
) -> Schedule:
    """The schedule of a configuration: named, then shifted, then ended at the lowest log-SNR."""
    schedule = {"linear": Schedule.linear, "cosine": Schedule.cosine}[name](timesteps)
    if log_snr_shift:
        schedule = schedule.shifted(log_snr_shift)
    return schedule if log_snr_min is None else schedule.ended_at(log_snr_min)


def _before(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ_{t-1} for each t; 1 before the first."""
    return torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod[:-1]))
