"""The variational bound on the log-likelihood, term by term, in bits per dimension.

Ho et al. 2020, arXiv:2006.11239, eq. 5: L = L_T + Σ L_{t-1} + L_0. Pure; shapes as in `schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.process import Denoise, DiffusionProcess
from pipeline.diffusion.schedule import Schedule

_HALF_BIN = 1 / 255  # half the distance of two of 256 levels in [-1, 1]


class Bound(NamedTuple):
    """The bound on -log₂ p(x₀) per dimension, and its parts.

    Attributes:
        total: (B,).
        prior: L_T, (B,).
        terms: (B, T); column 0 is the decoder's L_0, column t is L_t, of the step from t to t - 1.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor


def bits_per_dimension(
    denoise: Denoise, x0: Tensor, process: DiffusionProcess, noise: Callable[[int], Tensor]
) -> Bound:
    """The bound of each image, in T network passes.

    Args:
        denoise: the network.
        x0: images of 256 levels in [-1, 1], (B, C, H, W).
        process: the diffusion; it clips estimates of x0 as in sampling.
        noise: timestep → standard normal noise for that term, shaped like x0.
    """
    terms = []
    for step in range(len(process.schedule)):
        t = torch.full((len(x0),), step, dtype=torch.int64, device=x0.device)
        xt = process.add_noise(x0, noise(step), t)
        terms.append(variational_term(denoise(xt, t).to(x0.dtype), x0, xt, t, process))
    prior, stacked = prior_term(x0, process.schedule), torch.stack(terms, dim=1)
    return Bound(stacked.sum(1) + prior, prior, stacked)


def variational_term(
    output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, process: DiffusionProcess, *, clip: bool | None = None
) -> Tensor:
    """L_t for t > 0: KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)); for t = 0 the decoder's -log p(x_0 | x_1).

    Args:
        output: raw output of the network for (xt, t).
        x0: images of 256 levels in [-1, 1], (B, C, H, W).
        xt: their noisy form at t, (B, C, H, W).
        t: int64, (B,).
        process: the diffusion.
        clip: clip the estimate of x0. Default: `process.clip`.

    Returns:
        Bits per dimension, (B,).
    """
    true_mean, true_variance = process.posterior(x0, xt, t)
    _, mean, log_variance = process.reverse(output, xt, t, clip=clip)
    # At t = 0 the posterior is a point and its divergence is infinite; the decoder's term is used instead.
    first = t == 0
    true_variance = torch.where(first.reshape(true_variance.shape), 1, true_variance)
    divergence = _divergence(true_mean, true_variance.log(), mean, log_variance)
    return torch.where(first, -_bits(decoder_log_likelihood(x0, mean, log_variance)), _bits(divergence))


def prior_term(x0: Tensor, schedule: Schedule) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, 1)) in bits per dimension, (B,); independent of the network."""
    bar = schedule.alphas_cumprod[-1]
    mean, log_variance = bar.sqrt().to(x0.dtype) * x0, (1 - bar).log().to(x0.dtype)
    zero = torch.zeros((), dtype=x0.dtype, device=x0.device)
    return _bits(_divergence(mean, log_variance, zero, zero))


def decoder_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability, in nats, of a Gaussian's bin around each value (eq. 13).

    Args:
        x0: values of 256 levels in [-1, 1]; the outermost bins reach to infinity.
        mean: of the Gaussian, like x0.
        log_variance: of the Gaussian, broadcastable.

    Returns:
        Like x0.
    """
    centred, scale = x0 - mean, (-log_variance / 2).exp()
    below = torch.special.log_ndtr((centred + _HALF_BIN) * scale)
    above = torch.special.log_ndtr((_HALF_BIN - centred) * scale)
    # Inner bins are mirrored into the lower tail, where the difference of two distribution functions loses no digits.
    distance = centred.abs()
    upper = torch.special.log_ndtr((_HALF_BIN - distance) * scale)
    lower = torch.special.log_ndtr((-_HALF_BIN - distance) * scale)
    inside = upper + (-torch.expm1(lower - upper)).clamp(min=torch.finfo(x0.dtype).tiny).log()
    return torch.where(x0 < -0.999, below, torch.where(x0 > 0.999, above, inside))


def _divergence(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) ‖ N(mean2, variance2)), in nats, elementwise."""
    difference = log_variance1 - log_variance2
    return (difference.exp() - 1 - difference + (mean1 - mean2).square() * (-log_variance2).exp()) / 2


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
