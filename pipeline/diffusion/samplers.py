"""From noise to images: a network and a diffusion process under one of the samplers, one `Step` at a time.

Pure: the network is a callable, the noise is an argument. Everything outside the network is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.config import SamplingOptions
from pipeline.diffusion.process import Denoise, DiffusionProcess, Reverse, split
from pipeline.diffusion.spacing import resolve
from pipeline.solvers import SAMPLERS, Level, Model, Step

StepNoise = Callable[[int], Tensor]
"""Timestep → the standard normal noise that its step adds, (B, C, H, W) float32."""


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,  # noqa: N803  the paper's symbol
    process: DiffusionProcess,
    options: SamplingOptions,
    noise: StepNoise,
) -> Iterator[Step]:
    """Denoise; yield a `Step` after each step. The last one holds the images.

    Args:
        denoise: the network; `ddpm` uses its learned variance if the process says so.
        x_T: standard normal noise, (B, C, H, W), float32.
        process: the diffusion the network was trained with.
        options: sampler, steps, spacing and so on.
        noise: called only for steps that add noise.
    """
    options = resolve(options, process.schedule)
    visited = list(options.timesteps or ())
    bars: list[float] = process.schedule.alphas_cumprod[visited].tolist()
    levels = [Level(t, bar, bar_next) for t, bar, bar_next in zip(visited, bars, [*bars[1:], 1.0])]
    on_device = process.to(x_T.device)
    ascending = visited[::-1]
    chain = process.respaced(ascending).to(x_T.device)  # the process that visits only these timesteps
    is_clipped = process.clip or options.dynamic_threshold is not None

    def predict(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        t = _batch(level.t, x)
        output, _ = split(denoise(x, t).to(x.dtype), x.shape[1])
        x0 = on_device.predict_x0(output, x, t)
        if not is_clipped:
            return x0, on_device.predict_noise(output, x, t)
        x0 = _clip(x0, options.dynamic_threshold)
        # The noise that belongs to the clipped image; the network's own would lead off the schedule's noise levels.
        return x0, on_device.noise_of(x0, x, t)

    def reverse(x: Tensor, level: Level) -> Reverse:
        index, output = _batch(ascending.index(level.t), x), denoise(x, _batch(level.t, x)).to(x.dtype)
        x0 = chain.predict_x0(split(output, x.shape[1])[0], x, index)
        return chain.reverse_to(_clip(x0, options.dynamic_threshold) if is_clipped else x0, output, x, index)

    yield from SAMPLERS[options.sampler].solver(Model(predict, reverse, noise), x_T, levels, options)


def _clip(x0: Tensor, dynamic_threshold: float | None) -> Tensor:
    """Estimates of the clean images, clipped to [-1, 1]; with a threshold, each image is scaled before."""
    if dynamic_threshold is not None:
        magnitudes = x0.abs().flatten(1)  # one image at a time: torch.quantile refuses more than 2^24 values
        quantiles = torch.stack([image.quantile(dynamic_threshold) for image in magnitudes])
        x0 = x0 / quantiles.clamp(min=1)[:, None, None, None]
    return x0.clamp(-1, 1)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → the nearest of 0 … 255; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """0 … 255 → float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def _batch(t: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
