"""Which timesteps a sampler visits, and which sampler suits a number of steps. Pure.

The defaults were chosen by the distance of samples to a distribution whose optimal denoiser is known:
`benchmarks/sampler_truth.py` prints the table, `tests/diffusion/test_sampler_truth.py` checks it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.config import SamplingOptions
from pipeline.diffusion.schedule import Schedule
from pipeline.solvers import SAMPLERS, Spacing

_MANY_STEPS = 250
"""From this number of steps on, no spacing is poor."""
_ANCESTRAL_STEPS = 0.5
"""Share of all timesteps: with fewer steps ddpm's variances have a larger error than the samplers without noise."""
_LARGEST_SIGMA = 80.0
"""Largest σ that `karras` and `logsnr` visit: σ_max of Karras et al. 2022, table 1."""
_RHO = 7.0
"""ρ of Karras et al. 2022, eq. 5."""

SAMPLER_KEYS = ("steps", "spacing", "timesteps", "eta", "max_step_ratio")
"""Options whose default depends on the sampler: a sampler given by name starts from its own defaults."""


def resolve(options: SamplingOptions, schedule: Schedule) -> SamplingOptions:
    """The options with a value for steps, spacing and timesteps.

    Raises:
        ValueError: more steps than the schedule has timesteps.
    """
    if options.timesteps:
        return options.model_copy(update={"steps": len(options.timesteps)})
    sampler = SAMPLERS[options.sampler]
    steps = options.steps or min(sampler.steps or len(schedule), len(schedule))
    spacing = sampler.spacing if options.spacing == "auto" else options.spacing
    update = {"steps": steps, "spacing": spacing, "timesteps": tuple(timesteps(schedule, steps, spacing))}
    return options.model_copy(update=update)


def best_sampler(steps: int) -> str:
    """The sampler without noise whose samples are nearest to the true distribution in this number of steps."""
    return "dpmpp3m" if 8 <= steps < 16 else "dpmpp"


def advice(options: SamplingOptions, schedule: Schedule) -> str | None:
    """Why resolved options are a poor choice and what is better, in one line; None for a good choice."""
    steps, sampler = options.steps or len(schedule), SAMPLERS[options.sampler]
    if options.sampler == "ddpm" and steps < _ANCESTRAL_STEPS * len(schedule):
        better = f"--sampler {best_sampler(steps)} --steps {steps} is nearer to the truth"
        return f"ddpm in {steps} of {len(schedule)} steps draws a wrong spread: {better}"
    if options.spacing in sampler.poor_spacings and steps < min(_MANY_STEPS, len(schedule)):
        poor = f"{options.sampler} in {steps} steps is poor with {options.spacing} spacing"
        return f"{poor}: --spacing {sampler.spacing} is better"
    return None


def timesteps(schedule: Schedule, steps: int, spacing: Spacing) -> list[int]:
    """The timesteps that a sampler visits, descending.

    `uniform` contains both T - 1 and 0. `quadratic` also, with distances that grow with t (Song et al. 2021,
    arXiv:2010.02502, appendix D.2), moved apart where rounding makes two equal. `trailing` starts at T - 1 and ends
    above 0; `leading` ends at 0 and starts below T - 1, where images are not quite noise (both as in diffusers).
    `karras` (Karras et al. 2022, arXiv:2206.00364, eq. 5) and `logsnr` (Lu et al. 2022, arXiv:2206.00927, section 3.3)
    space σ = √((1-ᾱ)/ᾱ) evenly as σ^(1/7) and as log σ, and take the nearest timesteps; they end at 0 and start where
    σ is 80, or at T - 1.

    Args:
        schedule: of T timesteps.
        steps: number of timesteps to visit.
        spacing: any but `auto`.

    Raises:
        ValueError: `steps` is not between 1 and T.
    """
    total = len(schedule)
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} steps cannot be taken among {total} timesteps")
    if spacing == "leading":
        return [i * (total // steps) for i in reversed(range(steps))]
    if spacing == "trailing":
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    if steps == 1:
        return [total - 1]
    if spacing in ("karras", "logsnr"):
        log_sigma = -schedule.log_snr.cpu() / 2
        first, last = min(log_sigma[-1].item(), math.log(_LARGEST_SIGMA)), log_sigma[0].item()
        if spacing == "logsnr":
            wanted = torch.linspace(first, last, steps, dtype=torch.float64)
        else:
            ends = math.exp(first / _RHO), math.exp(last / _RHO)
            wanted = torch.linspace(*ends, steps, dtype=torch.float64).log() * _RHO
        return _nearest(wanted, log_sigma)
    power = 2 if spacing == "quadratic" else 1
    ascending = [0]
    for i in range(1, steps):
        ascending.append(max(round((total - 1) * (i / (steps - 1)) ** power), ascending[-1] + 1))
    return ascending[::-1]


def _nearest(wanted: Tensor, table: Tensor) -> list[int]:
    """The index of the table's entry nearest to each wanted value (both falling), moved apart where two are equal."""
    indices: list[int] = (wanted[:, None] - table).abs().argmin(1).tolist()
    count = len(indices)
    for i in range(1, count):
        indices[i] = min(indices[i], indices[i - 1] - 1)
    return [max(index, count - 1 - i) for i, index in enumerate(indices)]
