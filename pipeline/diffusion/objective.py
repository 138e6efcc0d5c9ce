"""The training loss, one number for each image, in float32 also under autocast. Pure; shapes as in `process`."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import DiffusionSection
from pipeline.diffusion.likelihood import variational_term
from pipeline.diffusion.process import Denoise, DiffusionProcess, split

_BOUND_WEIGHT = 0.001  # λ of Nichol & Dhariwal 2021, section 3.1


def loss(
    denoise: Denoise, x0: Tensor, t: Tensor, noise: Tensor, process: DiffusionProcess, section: DiffusionSection
) -> Tensor:
    """The squared error of the prediction (Ho et al. 2020, eq. 14), weighted by timestep.

    If the variance is learned, L_hybrid = L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16),
    where L_vlb trains the variance only, as the mean in it is held fixed. With the weighting `vlb` it is L_vlb alone,
    and trains both. L_vlb is in bits per dimension and estimated by T times its term at t, without the constant L_T.

    Args:
        denoise: the network.
        x0: images in [-1, 1], (B, C, H, W), float32.
        t: int64, (B,), uniform in [0, T).
        noise: standard normal, like x0.
        process: the diffusion, on the device of x0.
        section: `loss_weighting` and its parameters.

    Returns:
        Mean over C, H and W, (B,), float32.

    Raises:
        TypeError: images or noise have 16 bits.
        ValueError: the variance is learned, but the network outputs none.
    """
    xt = process.add_noise(x0, noise, t)
    output = denoise(xt, t).to(x0.dtype)
    if section.loss_weighting == "vlb":
        return _bound_estimate(output, x0, xt, t, process)
    prediction, mixture = split(output, x0.shape[1])
    error = (prediction - process.target(x0, noise, t)).square().flatten(1).mean(1)
    if section.loss_weighting not in ("simple", "hybrid"):
        error = error * weight(t, process, section).to(error.dtype)
    if process.variance != "learned":
        return error
    if mixture is None:
        raise ValueError("the network does not learn variances: its output has as many channels as its input")
    fixed_mean = torch.cat((prediction.detach(), mixture), dim=1)
    return error + _BOUND_WEIGHT * _bound_estimate(fixed_mean, x0, xt, t, process)


def _bound_estimate(output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, process: DiffusionProcess) -> Tensor:
    """L_vlb without L_T, in bits per dimension, (B,): T times a term drawn uniformly estimates the sum."""
    return len(process.schedule) * variational_term(output, x0, xt, t, process, clip=False)


def weight(t: Tensor, process: DiffusionProcess, section: DiffusionSection) -> Tensor:
    """The weight of a squared error of the prediction at these timesteps, float64, (B,).

    The papers state each weighting for an error in x₀ or in ε. Here it is converted to the prediction type: an error in
    ε is SNR^½ times the corresponding error in x₀, an error in v (SNR + 1)^½ times.

    Args:
        t: int64, (B,).
        process: the diffusion.
        section: `min_snr`: min(SNR, γ) for x₀ (Hang et al. 2023, arXiv:2303.09556, section 3.4); `soft_min_snr`:
            γ SNR/(SNR + γ) for x₀ (Crowson et al. 2024, arXiv:2401.11605, section 3.4; the paper has γ = σ_data^-2);
            `sigmoid`: sigmoid(b - λ) (-dλ/dt) for ε, where λ is the log-SNR (Kingma & Gao 2023, arXiv:2303.00848;
            Hoogeboom et al. 2024, arXiv:2410.19324); here -dλ/dt is divided by its mean.
    """
    bar = process.schedule.alphas_cumprod[t]
    snr, gamma = bar / (1 - bar), section.min_snr_gamma
    if section.loss_weighting == "min_snr":
        per_x0 = snr.clamp(max=gamma)
    elif section.loss_weighting == "soft_min_snr":
        per_x0 = gamma * snr / (snr + gamma)
    else:
        fall = -process.schedule.log_snr.diff()
        speed = (fall / fall.mean())[(t - 1).clamp(min=0)]
        per_x0 = snr * (section.sigmoid_bias - snr.log()).sigmoid() * speed
    return {"sample": per_x0, "epsilon": per_x0 / snr, "v_prediction": per_x0 / (snr + 1)}[process.prediction_type]
