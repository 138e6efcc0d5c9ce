"""From noise to pictures: DDPM, DDIM, DPM-Solver++(2M) and Heun as generators, one `Step` at a time.

Pure: the network is a callable, the noise is an argument. Everything outside the network is float32. ᾱ before the
first level is 1, so the last step of every sampler ends at the network's clean picture and adds no noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.schedule import (
    Denoise,
    PredictionType,
    Schedule,
    Variance,
    predict_noise,
    predict_x0,
    reverse,
    split,
)

Spacing = Literal["uniform", "quadratic", "trailing", "leading"]
StepNoise = Callable[[int], Tensor]
"""Timestep → the standard normal noise that its step adds, (B, C, H, W) float32."""
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`Denoise` with labels, (B,) int64, as third argument."""


@dataclass(frozen=True)
class Sampler:
    """How to sample.

    Attributes:
        name: `ddpm` (Ho et al. 2020, algorithm 2), `ddim` (Song et al. 2021, arXiv:2010.02502, eq. 12), `dpmpp`
            (DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095, algorithm 2), or `heun` (Karras et al. 2022,
            arXiv:2206.00364, algorithm 1, on the levels of the schedule; two network passes a step but the last).
        steps: steps, at most T.
        eta: of DDIM, in [0, 1]: 0 is deterministic, 1 has DDPM's posterior variance.
        spacing: which levels are visited; see `timesteps`.
        variance: of DDPM.
        clip: clip each estimate of the clean picture to [-1, 1].
    """

    name: Literal["ddpm", "ddim", "dpmpp", "heun"] = "ddpm"
    steps: int = 1000
    eta: float = 0.0
    spacing: Spacing = "uniform"
    variance: Variance = "fixed_large"
    clip: bool = True


class Step(NamedTuple):
    """A step done: the timestep it started from, where it led, and the clean picture it aimed at."""

    t: int
    x: Tensor
    x0: Tensor


class _Level(NamedTuple):
    t: int
    bar: float  # ᾱ here
    bar_next: float  # ᾱ where the step leads; 1 is the picture


_Predict = Callable[[Tensor, _Level], tuple[Tensor, Tensor]]
"""Pictures at a level → estimates of the clean picture and of the noise."""


def timesteps(T: int, steps: int, spacing: Spacing) -> list[int]:  # noqa: N803  the paper's symbol
    """The timesteps visited, descending.

    `uniform` has both ends, T - 1 and 0. `quadratic` too, with a distance that grows with t (Song et al. 2021,
    appendix D.2), moved apart where rounding makes them equal. `trailing` starts at T - 1 and ends above 0, `leading`
    ends at 0 but starts below T - 1, where the pictures are not quite noise (both as in diffusers).

    Raises:
        ValueError: `steps` is not within 1 and T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps cannot be taken among {T} timesteps")
    if spacing == "leading":
        return [i * (T // steps) for i in reversed(range(steps))]
    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if steps == 1:
        return [T - 1]
    power = 2 if spacing == "quadratic" else 1
    ascending = [0]
    for i in range(1, steps):
        ascending.append(max(round((T - 1) * (i / (steps - 1)) ** power), ascending[-1] + 1))
    return ascending[::-1]


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,  # noqa: N803  the paper's symbol
    schedule: Schedule,
    sampler: Sampler,
    noise: StepNoise,
    prediction_type: PredictionType,
) -> Iterator[Step]:
    """Denoises; gives a `Step` after each step, of which the last holds the pictures.

    Args:
        denoise: the network; what it learned about variances is used by `ddpm` with `learned` and else left aside.
        x_T: standard normal noise, (B, C, H, W), float32.
        schedule: the tables the network was trained with.
        sampler: how.
        noise: asked only for steps that add noise.
        prediction_type: what the network predicts.
    """
    visited = timesteps(len(schedule), sampler.steps, sampler.spacing)
    if sampler.name == "ddpm":
        yield from _ddpm(denoise, x_T, visited, schedule, sampler, noise, prediction_type)
        return
    tables = schedule.to(x_T.device)

    def predict(x: Tensor, level: _Level) -> tuple[Tensor, Tensor]:
        t = _batch(level.t, x)
        output, _ = split(denoise(x, t).to(x.dtype), x.shape[1])
        x0 = predict_x0(output, x, t, tables, prediction_type)
        if not sampler.clip:
            return x0, predict_noise(output, x, t, tables, prediction_type)
        x0 = x0.clamp(-1, 1)
        # The noise that belongs to the clipped picture; the network's own would lead off the schedule's levels.
        return x0, predict_noise(x0, x, t, tables, "sample")

    bars: list[float] = schedule.alphas_cumprod[visited].tolist()
    levels = [_Level(t, bar, bar_next) for t, bar, bar_next in zip(visited, bars, [*bars[1:], 1.0])]
    if sampler.name == "ddim":
        yield from _ddim(predict, x_T, levels, noise, sampler.eta)
    elif sampler.name == "dpmpp":
        yield from _dpmpp(predict, x_T, levels)
    else:
        yield from _heun(predict, x_T, levels)


def _ddpm(
    denoise: Denoise,
    x: Tensor,
    visited: list[int],
    schedule: Schedule,
    sampler: Sampler,
    noise: StepNoise,
    prediction_type: PredictionType,
) -> Iterator[Step]:
    """Ancestral sampling; with few steps, of the chain that visits only these levels."""
    chain = schedule.respaced(visited[::-1]).to(x.device)
    for i, t in zip(reversed(range(len(visited))), visited):
        x0, mean, log_variance = reverse(
            denoise(x, _batch(t, x)).to(x.dtype),
            x,
            _batch(i, x),
            chain,
            prediction_type=prediction_type,
            variance=sampler.variance,
            clip=sampler.clip,
        )
        x = mean + (log_variance / 2).exp() * noise(t) if i else mean
        yield Step(t, x, x0)


def _ddim(predict: _Predict, x: Tensor, levels: list[_Level], noise: StepNoise, eta: float) -> Iterator[Step]:
    for level in levels:
        t, bar, bar_next = level
        x0, epsilon = predict(x, level)
        variance = eta**2 * (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)  # eq. 16
        x = math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next - variance) * epsilon
        if variance > 0:
            x = x + math.sqrt(variance) * noise(t)
        yield Step(t, x, x0)


def _dpmpp(predict: _Predict, x: Tensor, levels: list[_Level]) -> Iterator[Step]:
    """Second order by the slope of x0 over λ = log √(ᾱ/(1-ᾱ)) since the step before; first and last are of order 1."""
    previous: tuple[float, Tensor] | None = None
    for level in levels:
        t, bar, bar_next = level
        x0, _ = predict(x, level)
        if bar_next == 1:
            yield Step(t, x0, x0)
            return
        lambda_, lambda_next = _half_log_snr(bar), _half_log_snr(bar_next)
        aim = x0
        if previous is not None:
            lambda_before, x0_before = previous
            aim = x0 + (lambda_next - lambda_) / (lambda_ - lambda_before) / 2 * (x0 - x0_before)
        weight = -math.sqrt(bar_next) * math.expm1(lambda_ - lambda_next)
        x = math.sqrt((1 - bar_next) / (1 - bar)) * x + weight * aim
        previous = lambda_, x0
        yield Step(t, x, x0)


def _heun(predict: _Predict, x: Tensor, levels: list[_Level]) -> Iterator[Step]:
    """The probability-flow ODE dy/dσ = ε of y = x/√ᾱ over σ = √((1-ᾱ)/ᾱ), by the trapezoidal rule."""
    for level, after in zip(levels, [*levels[1:], None]):
        t, bar, bar_next = level
        x0, epsilon = predict(x, level)
        if after is None:
            yield Step(t, x0, x0)
            return
        y, step = x / math.sqrt(bar), _sigma(bar_next) - _sigma(bar)
        _, epsilon_next = predict((y + step * epsilon) * math.sqrt(bar_next), after)
        x = (y + step * (epsilon + epsilon_next) / 2) * math.sqrt(bar_next)
        yield Step(t, x, x0)


def guided(network: Network, labels: Tensor, null_label: int, scale: float) -> Denoise:
    """The network steered towards its labels (Ho & Salimans 2022, arXiv:2207.12598), in one pass of twice the batch.

    The prediction is null + scale · (labelled - null): 1 is the plain conditional network (and costs no second half),
    0 the unconditional one. Learned variances are those of the labelled half.

    Args:
        network: pictures, timesteps, labels → output.
        labels: int64, (B,).
        null_label: the label that hides the class.
        scale: strength.
    """
    if scale == 1:
        return lambda x, t: network(x, t, labels)
    both = torch.cat((labels, torch.full_like(labels, null_label)))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        labelled, null = network(torch.cat((x, x)), torch.cat((t, t)), both).to(x.dtype).chunk(2)
        (prediction, mixture), (null_prediction, _) = split(labelled, x.shape[1]), split(null, x.shape[1])
        steered = null_prediction + scale * (prediction - null_prediction)
        return steered if mixture is None else torch.cat((steered, mixture), dim=1)

    return denoise


def to_uint8(pictures: Tensor) -> Tensor:
    """[-1, 1] → the nearest of 0 … 255; what lies outside is clipped."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(pictures: Tensor) -> Tensor:
    """0 … 255 → float32 in [-1, 1]."""
    return pictures.to(torch.float32) / 127.5 - 1


def _batch(t: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


def _half_log_snr(bar: float) -> float:
    return math.log(bar / (1 - bar)) / 2


def _sigma(bar: float) -> float:
    return math.sqrt((1 - bar) / bar)
