"""A Gaussian mixture as images of 2x2 pixels: its optimal denoiser in closed form, and a distance of samples to it.

Whatever a sampler gets wrong with this denoiser is the sampler's own error, as there is no network that could be wrong.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline import keyed_random
from pipeline.diffusion.schedule import Schedule
from pipeline.keyed_random import Use

SHAPE = (1, 2, 2)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[0.5, 0.5, -0.4, 0.1], [-0.5, 0.2, 0.5, -0.5], [0.1, -0.6, -0.2, 0.6]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.10, 0.06, 0.12], dtype=torch.float64)
SEEDS = 20_000
_TRUTH, _DIRECTIONS = 200_000, 64


def predict(x: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """What the optimal network predicts.

    Args:
        x: noisy images, (B, 1, 2, 2).
        alphas_cumprod: ᾱ of each, (B,), or of all, (1,).
        prediction_type: epsilon, sample or v_prediction.

    Returns:
        Like x.
    """
    flat = x.to(torch.float64).flatten(1)  # (B, 4)
    bar = alphas_cumprod.to(torch.float64)[:, None]  # (B, 1)
    variance = bar * DEVIATIONS**2 + 1 - bar  # (B, 3)
    signal = bar.sqrt()
    squares = flat.square().sum(1, keepdim=True) - 2 * signal * (flat @ MEANS.T) + bar * MEANS.square().sum(1)
    log_density = WEIGHTS.log() - 2 * variance.log() - squares / (2 * variance)
    posterior = log_density.softmax(1)  # (B, 3): which mode x came from
    gain = signal * DEVIATIONS**2 / variance
    x0 = (posterior * (1 - gain * signal)) @ MEANS + (posterior * gain).sum(1, keepdim=True) * flat
    noise_ = (flat - signal * x0) / (1 - bar).sqrt()
    velocity = signal * noise_ - (1 - bar).sqrt() * x0
    return {"sample": x0, "epsilon": noise_, "v_prediction": velocity}[prediction_type].reshape(x.shape).to(x.dtype)


class Denoiser:
    """The optimal network of a schedule; counts its calls."""

    def __init__(self, schedule: Schedule, prediction_type: str) -> None:
        self._bars, self._type, self.calls = schedule.alphas_cumprod, prediction_type, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy images (B, 1, 2, 2) and timesteps (B,) → prediction."""
        self.calls += 1
        return predict(x, self._bars[t], self._type)


def start(seeds: int = SEEDS) -> Tensor:
    """The noise that seeds 0, 1, … start from, as `ddpm sample` draws it: (seeds, 1, 2, 2)."""
    return keyed_random.normals(0, torch.arange(seeds), Use.SAMPLE_START, SHAPE)


def step_noise(t: int, seeds: int = SEEDS) -> Tensor:
    """The noise that a step from timestep t adds, as `ddpm sample` draws it: (seeds, 1, 2, 2)."""
    return keyed_random.normals(0, torch.arange(seeds), Use.SAMPLE_STEP, SHAPE, step=t)


class Truth:
    """Draws of the mixture, projected to fixed directions."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        directions = torch.randn(4, _DIRECTIONS, dtype=torch.float64, generator=generator)
        self._directions = directions / directions.norm(dim=0)
        self._sorted = self._project(self.draw(_TRUTH, generator))  # (directions, draws)

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Tensor:
        """Independent draws, (count, 4)."""
        mode = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
        spread = torch.randn(count, 4, dtype=torch.float64, generator=generator)
        return MEANS[mode] + DEVIATIONS[mode, None] * spread

    def distance(self, samples: Tensor) -> float:
        """Sliced Wasserstein-1 distance of samples, (B, 1, 2, 2) or (B, 4), to the mixture."""
        projected = self._project(samples.to(torch.float64).reshape(len(samples), -1))
        ranks = (torch.arange(len(samples)) + 0.5) / len(samples) * _TRUTH
        return float((projected - self._sorted[:, ranks.long()]).abs().mean())

    def _project(self, samples: Tensor) -> Tensor:
        """Sorted on each direction, by NumPy, which is twice as fast at it as torch."""
        return torch.from_numpy(np.sort((samples @ self._directions).T.contiguous().numpy()))
