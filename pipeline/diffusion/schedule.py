"""The forward process, its posterior, and the reverse process that a network's output describes.

Ho et al. 2020, arXiv:2006.11239. t counts from 0, the paper's from 1: t = 0 is the least noisy level, T - 1 nearly pure
noise. Shapes: B pictures, C channels, H and W pixels, in [-1, 1]. Coefficients come from float64 tables and are rounded
once, to the dtype of the pictures, which must be float32 (or float64): in bfloat16, ᾱ of the first ten levels is 1, and
they would get no noise at all. Pure; on a GPU, move the tables there once (`Schedule.to`), and no call waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import ConfigError

PredictionType = Literal["epsilon", "sample", "v_prediction"]
Variance = Literal["fixed_large", "fixed_small", "learned"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(noisy pictures (B, C, H, W) float32, timesteps (B,) int64) → raw network output."""

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
                f"diffusion.timesteps: {timesteps} is too few for the linear schedule: take at least 21, or cosine"
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
        return cls(betas, alphas_cumprod, _shifted(alphas_cumprod))

    def respaced(self, timesteps: Sequence[int]) -> Schedule:
        """The chain that visits only some levels: the same ᾱ there, and the β that lead from one to the next.

        Args:
            timesteps: ascending levels of this schedule.
        """
        alphas_cumprod = self.alphas_cumprod[list(timesteps)]
        before = _shifted(alphas_cumprod)
        return Schedule(1 - alphas_cumprod / before, alphas_cumprod, before)

    def to(self, device: torch.device | str) -> Schedule:
        """The same tables on a device."""
        return Schedule(*(table.to(device) for table in (self.betas, self.alphas_cumprod, self.alphas_cumprod_prev)))


def make_schedule(name: Literal["linear", "cosine"], timesteps: int) -> Schedule:
    """The schedule that a configuration names."""
    return {"linear": Schedule.linear, "cosine": Schedule.cosine}[name](timesteps)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """A draw of q(x_t | x_0): √ᾱ x₀ + √(1-ᾱ) ε (eq. 4).

    Args:
        x0: pictures, (B, C, H, W).
        noise: standard normal, like x0.
        t: int64, (B,), on the device of the tables.
        schedule: the tables.

    Raises:
        TypeError: 16-bit pictures or noise; see above. So do all functions here.
    """
    signal, spread = _signal_and_spread(x0, t, schedule, x0=x0, noise=noise)
    return signal * x0 + spread * noise


def velocity(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """√ᾱ ε - √(1-ᾱ) x₀ (Salimans & Ho 2022, arXiv:2202.00512, appendix D); arguments as for `add_noise`."""
    signal, spread = _signal_and_spread(x0, t, schedule, x0=x0, noise=noise)
    return signal * noise - spread * x0


def target(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType) -> Tensor:
    """What the network is asked for; arguments as for `add_noise`."""
    if prediction_type == "v_prediction":
        return velocity(x0, noise, t, schedule)
    return noise if prediction_type == "epsilon" else x0


def predict_x0(output: Tensor, xt: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType) -> Tensor:
    """The clean picture that the network's output stands for (eq. 15 for ε), not clipped.

    Args:
        output: the prediction, (B, C, H, W).
        xt: what the network saw, (B, C, H, W).
        t: int64, (B,).
        schedule: the tables.
        prediction_type: what the output is.
    """
    signal, spread = _signal_and_spread(xt, t, schedule, output=output, xt=xt)
    if prediction_type == "epsilon":
        return (xt - spread * output) / signal
    return output if prediction_type == "sample" else signal * xt - spread * output


def predict_noise(output: Tensor, xt: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType) -> Tensor:
    """The noise that the network's output stands for; arguments as for `predict_x0`."""
    signal, spread = _signal_and_spread(xt, t, schedule, output=output, xt=xt)
    if prediction_type == "sample":
        return (xt - signal * output) / spread
    return output if prediction_type == "epsilon" else signal * output + spread * xt


def posterior(x0: Tensor, xt: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) (eqs. 6-7).

    Args:
        x0: clean pictures, (B, C, H, W). Clip x0, never the mean.
        xt: pictures at level t, (B, C, H, W).
        t: int64, (B,).
        schedule: the tables.

    Returns:
        Mean (B, C, H, W) and variance (B, 1, 1, 1); at t = 0 exactly x0 and 0.
    """
    _require_precision(x0=x0, xt=xt)
    beta, bar, bar_prev = (_at(table, t, xt) for table in _tables(schedule))
    x0_weight = bar_prev.sqrt() * beta / (1 - bar)
    xt_weight = (1 - beta).sqrt() * (1 - bar_prev) / (1 - bar)
    mean = x0_weight.to(xt.dtype) * x0 + xt_weight.to(xt.dtype) * xt
    return mean, _posterior_variance(beta, bar, bar_prev).to(xt.dtype)


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) as a network gives it: a Gaussian, and the clean picture that its mean is built on."""

    x0: Tensor
    mean: Tensor
    log_variance: Tensor


def reverse(
    output: Tensor,
    xt: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    prediction_type: PredictionType,
    variance: Variance,
    clip: bool,
) -> Reverse:
    """The reverse step that the network's output describes.

    The variance is β_t (`fixed_large`), that of the posterior (`fixed_small`, section 3.2), or `learned`: their
    geometric mixture in proportions that the network gives in [-1, 1] (Nichol & Dhariwal 2021, eq. 15). The posterior's
    variance is 0 at t = 0, where its value at t = 1 stands in for it, as in the authors' code.

    Args:
        output: raw, (B, C, H, W), or (B, 2C, H, W) from a network that learns variances.
        xt: what the network saw, (B, C, H, W).
        t: int64, (B,).
        schedule: the tables.
        prediction_type: what the first C channels are.
        variance: which one.
        clip: clip x0 to [-1, 1] before the mean is formed.

    Returns:
        x0 and mean, (B, C, H, W), and the log of the variance, broadcastable to them.
    """
    prediction, mixture = split(output, xt.shape[1])
    x0 = predict_x0(prediction, xt, t, schedule, prediction_type)
    if clip:
        x0 = x0.clamp(-1, 1)
    mean, _ = posterior(x0, xt, t, schedule)
    second = min(1, len(schedule) - 1)
    small = _posterior_variance(*(_at(table, t.clamp(min=second), xt) for table in _tables(schedule))).log()
    large = _at(schedule.betas, t, xt).log()
    if variance == "fixed_small":
        return Reverse(x0, mean, small.to(xt.dtype))
    if variance == "fixed_large":
        first = (t == 0).reshape(large.shape)
        return Reverse(x0, mean, torch.where(first, small, large).to(xt.dtype))
    if mixture is None:
        raise ValueError("the network does not learn variances: its output has as many channels as its input")
    share = (mixture + 1) / 2
    return Reverse(x0, mean, share * large.to(xt.dtype) + (1 - share) * small.to(xt.dtype))


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Prediction and, if the network learns it, the variance's mixture: (B, C, H, W) each."""
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None


def _shifted(alphas_cumprod: Tensor) -> Tensor:
    return torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod[:-1]))


def _tables(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    return schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t], (B, 1, 1, 1)."""
    return table[t].reshape(-1, *[1] * (like.ndim - 1))


def _signal_and_spread(like: Tensor, t: Tensor, schedule: Schedule, **pictures: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1-ᾱ_t), (B, 1, 1, 1), in the dtype of the pictures."""
    _require_precision(**pictures)
    bar = _at(schedule.alphas_cumprod, t, like)
    return bar.sqrt().to(like.dtype), (1 - bar).sqrt().to(like.dtype)


def _posterior_variance(beta: Tensor, bar: Tensor, bar_prev: Tensor) -> Tensor:
    return (1 - bar_prev) / (1 - bar) * beta


def _require_precision(**pictures: Tensor) -> None:
    for name, value in pictures.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {value.dtype}: the forward process needs float32, whatever the autocast")
