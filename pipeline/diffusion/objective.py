"""What training minimises, one number a picture, in float32 whatever the autocast. Pure; shapes as in `schedule`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.diffusion.likelihood import variational_term
from pipeline.diffusion.schedule import Denoise, PredictionType, Schedule, add_noise, split, target

LossWeighting = Literal["simple", "min_snr"]

_BOUND_WEIGHT = 0.001  # λ of Nichol & Dhariwal 2021, section 3.1


def loss(
    denoise: Denoise,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    *,
    prediction_type: PredictionType,
    loss_weighting: LossWeighting = "simple",
    min_snr_gamma: float = 5.0,
    learned_variance: bool = False,
) -> Tensor:
    """The squared error of the prediction (Ho et al. 2020, eq. 14), weighted by timestep.

    With learned variance, L_hybrid = L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16): the
    bound, in bits per dimension, trains the variance only, as the mean in it is held fixed.

    Args:
        denoise: the network.
        x0: pictures in [-1, 1], (B, C, H, W), float32.
        t: int64, (B,), uniform in [0, T).
        noise: standard normal, like x0.
        schedule: the tables, on the device of x0.
        prediction_type: what the network predicts.
        loss_weighting: `simple` weighs all timesteps alike; `min_snr` is given by `min_snr_weight`.
        min_snr_gamma: γ of `min_snr`.
        learned_variance: the network gives 2C channels and learns its variances.

    Returns:
        float32, (B,): means over C, H and W.

    Raises:
        TypeError: 16-bit pictures or noise.
    """
    xt = add_noise(x0, noise, t, schedule)
    output = denoise(xt, t).to(x0.dtype)
    prediction, mixture = split(output, x0.shape[1])
    error = (prediction - target(x0, noise, t, schedule, prediction_type)).square().flatten(1).mean(1)
    if loss_weighting == "min_snr":
        error = error * min_snr_weight(t, schedule, prediction_type, min_snr_gamma).to(error.dtype)
    if not learned_variance:
        return error
    if mixture is None:
        raise ValueError("the network does not learn variances: its output has as many channels as its input")
    bound = variational_term(
        torch.cat((prediction.detach(), mixture), dim=1),
        x0,
        xt,
        t,
        schedule,
        prediction_type=prediction_type,
        variance="learned",
        clip=False,
    )
    return error + _BOUND_WEIGHT * len(schedule) * bound  # T times a uniformly drawn term estimates the sum


def min_snr_weight(t: Tensor, schedule: Schedule, prediction_type: PredictionType, gamma: float) -> Tensor:
    """min(SNR, γ) in terms of x₀, expressed for what is predicted (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    An error in ε is SNR^½ times the one in x₀ that it causes, one in v (SNR + 1)^½ times.

    Returns:
        float64, (B,).
    """
    bar = schedule.alphas_cumprod[t]
    snr = bar / (1 - bar)
    per_x0 = snr.clamp(max=gamma)
    return {"sample": per_x0, "epsilon": per_x0 / snr, "v_prediction": per_x0 / (snr + 1)}[prediction_type]
