"""The diffusion process: forward noising, its posterior, and the reverse step given by a network's output.

Ho et al. 2020, arXiv:2006.11239. Shapes: B images, C channels, H and W pixels, in [-1, 1]; timesteps t are int64, (B,),
on the device of the tables. Coefficients come from float64 tables and are rounded once, to the dtype of the images,
which must be float32 (or float64): in bfloat16, ᾱ of the first ten timesteps is 1, and they would get no noise at all.
Pure. On a GPU, move the tables there once with `DiffusionProcess.to`; then no call waits for a transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.config import DiffusionSection, FixedVariance
from pipeline.diffusion.schedule import Schedule, make_schedule

PredictionType = Literal["epsilon", "sample", "v_prediction"]
Variance = FixedVariance | Literal["learned"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(noisy images (B, C, H, W) float32, timesteps (B,) int64) → raw network output."""


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) given by a network: a Gaussian, and the clean image from which its mean is computed."""

    x0: Tensor
    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True, eq=False)
class DiffusionProcess:
    """The noise schedule, the prediction type of the network, and the variance of a reverse step.

    All methods raise TypeError for 16-bit images or noise; see above.

    Attributes:
        schedule: the noise levels.
        prediction_type: the network predicts the noise ε, the clean image x₀ (`sample`), or the velocity v.
        variance: of a reverse step: β_t (`fixed_large`), that of the posterior (`fixed_small`, section 3.2), or
            `learned`: their geometric mixture in proportions that the network outputs in [-1, 1], as C more channels
            (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).
        clip: clip estimates of x₀ to [-1, 1] when sampling.
    """

    schedule: Schedule
    prediction_type: PredictionType = "epsilon"
    variance: Variance = "fixed_large"
    clip: bool = True

    @classmethod
    def of(
        cls, section: DiffusionSection, *, variance: Variance = "fixed_large", clip: bool = True
    ) -> DiffusionProcess:
        """The process that a configuration describes.

        Args:
            section: forward process and prediction type.
            variance: of a reverse step; see `ModelSection.reverse_variance`.
            clip: clip estimates of x₀ when sampling.

        Raises:
            ConfigError: there is no such schedule.
        """
        schedule = make_schedule(
            section.schedule, section.timesteps, log_snr_shift=section.log_snr_shift, log_snr_min=section.log_snr_min
        )
        return cls(schedule, section.prediction_type, variance, clip)

    def to(self, device: torch.device | str) -> DiffusionProcess:
        """The same process with its tables on a device."""
        return replace(self, schedule=self.schedule.to(device))

    def respaced(self, timesteps: Sequence[int]) -> DiffusionProcess:
        """The process that visits only some timesteps, given in ascending order; see `Schedule.respaced`."""
        return replace(self, schedule=self.schedule.respaced(timesteps))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A draw of q(x_t | x_0): √ᾱ x₀ + √(1-ᾱ) ε (eq. 4), (B, C, H, W).

        Args:
            x0: images, (B, C, H, W).
            noise: standard normal, like x0.
            t: int64, (B,).
        """
        signal, spread = self._signal_and_spread(x0, t, x0=x0, noise=noise)
        return signal * x0 + spread * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of the network's prediction, (B, C, H, W); arguments as for `add_noise`.

        v = √ᾱ ε - √(1-ᾱ) x₀ (Salimans & Ho 2022, arXiv:2202.00512, appendix D).
        """
        if self.prediction_type == "v_prediction":
            signal, spread = self._signal_and_spread(x0, t, x0=x0, noise=noise)
            return signal * noise - spread * x0
        return noise if self.prediction_type == "epsilon" else x0

    def predict_x0(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean image that follows from the network's output (eq. 15 for ε), not clipped, (B, C, H, W).

        Args:
            output: the prediction, (B, C, H, W).
            xt: the network's input, (B, C, H, W).
            t: int64, (B,).
        """
        signal, spread = self._signal_and_spread(xt, t, output=output, xt=xt)
        if self.prediction_type == "epsilon":
            return (xt - spread * output) / signal
        return output if self.prediction_type == "sample" else signal * xt - spread * output

    def predict_noise(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise that follows from the network's output; arguments as for `predict_x0`."""
        if self.prediction_type == "sample":
            return self.noise_of(output, xt, t)
        signal, spread = self._signal_and_spread(xt, t, output=output, xt=xt)
        return output if self.prediction_type == "epsilon" else signal * output + spread * xt

    def noise_of(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise between x0 and xt: (xt - √ᾱ x₀) / √(1-ᾱ), (B, C, H, W)."""
        signal, spread = self._signal_and_spread(xt, t, x0=x0, xt=xt)
        return (xt - signal * x0) / spread

    def posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x_0) (eqs. 6-7).

        Args:
            x0: clean images, (B, C, H, W). Clip x0, never the mean.
            xt: images at timestep t, (B, C, H, W).
            t: int64, (B,).

        Returns:
            Mean (B, C, H, W) and variance (B, 1, 1, 1); at t = 0 exactly x0 and 0.
        """
        _require_precision(x0=x0, xt=xt)
        beta, bar, bar_prev = self._at(t, xt)
        x0_weight = bar_prev.sqrt() * beta / (1 - bar)
        xt_weight = (1 - beta).sqrt() * (1 - bar_prev) / (1 - bar)
        mean = x0_weight.to(xt.dtype) * x0 + xt_weight.to(xt.dtype) * xt
        return mean, _posterior_variance(beta, bar, bar_prev).to(xt.dtype)

    def reverse(self, output: Tensor, xt: Tensor, t: Tensor, *, clip: bool | None = None) -> Reverse:
        """The reverse step given by the network's output.

        The posterior's variance is 0 at t = 0; there its value at t = 1 is used, as in the authors' code.

        Args:
            output: raw, (B, C, H, W), or (B, 2C, H, W) from a network that learns variances.
            xt: the network's input, (B, C, H, W).
            t: int64, (B,).
            clip: clip x0 to [-1, 1] before computing the mean. Default: `self.clip`.

        Returns:
            x0 and mean, (B, C, H, W), and the log of the variance, broadcastable to them.

        Raises:
            ValueError: the variance is learned, but the output has no channels for it.
        """
        prediction, _ = split(output, xt.shape[1])
        x0 = self.predict_x0(prediction, xt, t)
        if self.clip if clip is None else clip:
            x0 = x0.clamp(-1, 1)
        return self.reverse_to(x0, output, xt, t)

    def reverse_to(self, x0: Tensor, output: Tensor, xt: Tensor, t: Tensor) -> Reverse:
        """`reverse` from a given estimate of the clean image; of the output only the learned variance is used."""
        mean, _ = self.posterior(x0, xt, t)
        second = min(1, len(self.schedule) - 1)
        small = _posterior_variance(*self._at(t.clamp(min=second), xt)).log()
        large = self._at(t, xt)[0].log()
        if self.variance == "fixed_small":
            return Reverse(x0, mean, small.to(xt.dtype))
        if self.variance == "fixed_large":
            first = (t == 0).reshape(large.shape)
            return Reverse(x0, mean, torch.where(first, small, large).to(xt.dtype))
        _, mixture = split(output, xt.shape[1])
        if mixture is None:
            raise ValueError("the network does not learn variances: its output has as many channels as its input")
        share = (mixture + 1) / 2
        return Reverse(x0, mean, share * large.to(xt.dtype) + (1 - share) * small.to(xt.dtype))

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """β_t, ᾱ_t and ᾱ_{t-1}, float64, (B, 1, 1, 1)."""
        tables = self.schedule.betas, self.schedule.alphas_cumprod, self.schedule.alphas_cumprod_prev
        beta, bar, bar_prev = (table[t].reshape(-1, *[1] * (like.ndim - 1)) for table in tables)
        return beta, bar, bar_prev

    def _signal_and_spread(self, like: Tensor, t: Tensor, **images: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1-ᾱ_t), (B, 1, 1, 1), in the dtype of the images."""
        _require_precision(**images)
        _, bar, _ = self._at(t, like)
        return bar.sqrt().to(like.dtype), (1 - bar).sqrt().to(like.dtype)


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction and, if the network learns it, the variance's mixing proportion: (B, C, H, W) each."""
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None


def _posterior_variance(beta: Tensor, bar: Tensor, bar_prev: Tensor) -> Tensor:
    return (1 - bar_prev) / (1 - bar) * beta


def _require_precision(**images: Tensor) -> None:
    for name, value in images.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {value.dtype}: the diffusion process needs float32, whatever the autocast")
