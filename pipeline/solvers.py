"""The samplers of `ddpm sample`: for each its solver, its defaults and the options that it accepts. Pure.

A solver computes one `Step` after another from noise to images. ᾱ before the first timestep is 1, so the last step of
every solver ends at the network's clean image and adds no noise. This module needs no torch at run time: the
configuration and the command line read the names of the samplers here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Spacing = Literal["auto", "uniform", "quadratic", "trailing", "leading", "karras", "logsnr"]


class Level(NamedTuple):
    """A timestep that a sampler visits."""

    t: int
    bar: float
    """ᾱ of this timestep."""
    bar_next: float
    """ᾱ of the timestep that the step leads to; 1 is the clean image."""


class Step(NamedTuple):
    """The result of one step."""

    t: int
    """The timestep where the step started."""
    x: Tensor
    """The images after the step, (B, C, H, W)."""
    x0: Tensor
    """The estimate of the clean images that the step used, (B, C, H, W)."""


class Model(NamedTuple):
    """A network and its diffusion process, as a solver calls them. Images x are (B, C, H, W)."""

    predict: Callable[[Tensor, Level], tuple[Tensor, Tensor]]
    """(x, level) → estimates of the clean images and of the noise."""
    reverse: Callable[[Tensor, Level], tuple[Tensor, Tensor, Tensor]]
    """(x, level) → estimate of the clean images; mean and log-variance of p(x_{t-1} | x_t)."""
    noise: Callable[[int], Tensor]
    """Timestep → standard normal noise that its step adds."""


class Options(Protocol):
    """The fields of `SamplingOptions` that solvers read."""

    @property
    def eta(self) -> float: ...  # noqa: D102  see SamplingOptions

    @property
    def max_step_ratio(self) -> float | None: ...  # noqa: D102


def ddpm(model: Model, x: Tensor, levels: list[Level], options: Options) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2)."""
    for level in levels:
        x0, mean, log_variance = model.reverse(x, level)
        x = mean + (log_variance / 2).exp() * model.noise(level.t) if level is not levels[-1] else mean
        yield Step(level.t, x, x0)


def ddim(model: Model, x: Tensor, levels: list[Level], options: Options) -> Iterator[Step]:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12)."""
    for level in levels:
        t, bar, bar_next = level
        x0, epsilon = model.predict(x, level)
        variance = options.eta**2 * (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)  # eq. 16
        x = math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next - variance) * epsilon
        if variance > 0:
            x = x + math.sqrt(variance) * model.noise(t)
        yield Step(t, x, x0)


def dpmpp(model: Model, x: Tensor, levels: list[Level], options: Options, *, order: int) -> Iterator[Step]:
    """DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, algorithm 2 and appendix), multistep.

    x0 is a polynomial of λ = log √(ᾱ/(1-ᾱ)) through its values at the last timesteps, of degree order - 1. The first
    steps have a lower order, the last step has order 1. A step that is longer than the previous one by more than
    `max_step_ratio` also has order 1: there the extrapolated polynomial has a larger error than a constant.
    """
    past: list[tuple[float, Tensor]] = []  # (λ, x0), newest last
    max_step_ratio = options.max_step_ratio or math.inf
    for level in levels:
        t, bar, bar_next = level
        x0, _ = model.predict(x, level)
        if bar_next == 1:
            yield Step(t, x0, x0)
            return
        lambda_, lambda_next = _half_log_snr(bar), _half_log_snr(bar_next)
        h = lambda_next - lambda_
        past = [*past, (lambda_, x0)][-order:]
        usable = past if len(past) > 1 and h <= max_step_ratio * (lambda_ - past[-2][0]) else past[-1:]
        average = _step_average([(before - lambda_) / h for before, _ in usable], [value for _, value in usable], h)
        x = math.sqrt((1 - bar_next) / (1 - bar)) * x - math.sqrt(bar_next) * math.expm1(-h) * average
        yield Step(t, x, x0)


def _step_average(nodes: list[float], values: list[Tensor], h: float) -> Tensor:
    """x0 averaged over a step with the weight e^λ, extrapolated from its values at the last timesteps.

    These are the published coefficients. They differ from exact integration of the polynomial: the weight of the slope
    in the second order is 1/2, not 1/2 + O(h), and that of the curvature in the third is half of the exact one, so that
    the third order is formally a second. In few steps both are nearer to the truth than exact integration.

    Args:
        nodes: λ of the values, relative to the start of the step and divided by its length; the last one is 0.
        values: x0 at the nodes, (B, C, H, W) each.
        h: the step's length in λ.
    """
    x0, e = values[-1], math.expm1(-h)
    if len(values) == 1:
        return x0
    slope = (x0 - values[-2]) / -nodes[-2]
    if len(values) == 2:
        return x0 + slope / 2
    curvature = (slope - (values[-2] - values[-3]) / (nodes[-2] - nodes[-3])) / -nodes[-3]
    slope_at_start = slope - nodes[-2] * curvature
    return x0 - (1 / h + 1 / e) * slope_at_start + ((e + h) / h**2 - 0.5) / e * curvature


def heun(model: Model, x: Tensor, levels: list[Level], options: Options) -> Iterator[Step]:
    """Heun's method (Karras et al. 2022, arXiv:2206.00364, algorithm 1): two network passes a step, one in the last.

    It solves the probability-flow ODE dy/dσ = ε of y = x/√ᾱ over σ = √((1-ᾱ)/ᾱ) by the trapezoidal rule.
    """
    for level, after in zip(levels, [*levels[1:], None]):
        t, bar, bar_next = level
        x0, epsilon = model.predict(x, level)
        if after is None:
            yield Step(t, x0, x0)
            return
        y, step = x / math.sqrt(bar), _sigma(bar_next) - _sigma(bar)
        _, epsilon_next = model.predict((y + step * epsilon) * math.sqrt(bar_next), after)
        x = (y + step * (epsilon + epsilon_next) / 2) * math.sqrt(bar_next)
        yield Step(t, x, x0)


def _half_log_snr(bar: float) -> float:
    return math.log(bar / (1 - bar)) / 2


def _sigma(bar: float) -> float:
    return math.sqrt((1 - bar) / bar)


@dataclass(frozen=True)
class Sampler:
    """One sampler. The default steps and spacings are the result of `benchmarks/sampler_truth.py`."""

    solver: Callable[[Model, Tensor, list[Level], Options], Iterator[Step]]
    steps: int | None
    """Default number of steps; None: every timestep."""
    spacing: Spacing
    """The spacing that `auto` stands for."""
    poor_spacings: tuple[Spacing, ...] = ()
    """Spacings that give clearly worse samples in few steps: they cause a warning."""
    options: tuple[str, ...] = ()
    """Keys of `SamplingOptions` that this sampler reads and some others do not."""

    def passes(self, steps: int) -> int:
        """Passes of a batch through the network."""
        return 2 * steps - 1 if self.solver is heun else steps


_EVEN: tuple[Spacing, ...] = ("uniform", "leading", "trailing")

SAMPLERS = {
    "ddpm": Sampler(ddpm, None, "uniform", options=("variance",)),
    "ddim": Sampler(ddim, 50, "quadratic", _EVEN, options=("eta",)),
    "dpmpp": Sampler(partial(dpmpp, order=2), 25, "quadratic", _EVEN, options=("max_step_ratio",)),
    "dpmpp3m": Sampler(partial(dpmpp, order=3), 25, "logsnr", (*_EVEN, "quadratic"), options=("max_step_ratio",)),
    "heun": Sampler(heun, 25, "logsnr", (*_EVEN, "quadratic")),
}
"""Name → sampler: the only list of them. To add a sampler, write its solver above and add a row here."""

if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]
