"""The diffusion process that a `scheduler_config.json` of `diffusers` describes.

Such a file has two kinds of keys: how the network was trained (noise levels, prediction type), which are read and
written here, and how to sample from it (solver, order, spacing), which are ignored: `ddpm sample` has options for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipeline import messages
from pipeline.config import DiffusionSection, FixedVariance
from pipeline.errors import ConfigError
from pipeline.untrusted import printable

_VARIANCES: dict[Any, FixedVariance] = {
    None: "fixed_small",  # a solver without noise
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same, computed from its logarithm
    "fixed_large": "fixed_large",
}
_SCHEDULES: dict[Any, Literal["linear", "cosine"]] = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
_SHIFTS = ("log_snr_shift", "log_snr_min")
"""Keys of `DiffusionSection` that change a schedule: an exported file has them with `_` before, and `trained_betas`."""

# Schedulers of networks trained on discrete timesteps with betas → their default first and last β.
_PAPER, _LATENT = (1e-4, 0.02), (0.00085, 0.012)
_ENDS = {
    "DDIMParallelScheduler": _PAPER,
    "DDIMScheduler": _PAPER,
    "DDPMParallelScheduler": _PAPER,
    "DDPMScheduler": _PAPER,
    "DEISMultistepScheduler": _PAPER,
    "DPMSolverMultistepScheduler": _PAPER,
    "DPMSolverSDEScheduler": _LATENT,
    "DPMSolverSinglestepScheduler": _PAPER,
    "EulerAncestralDiscreteScheduler": _PAPER,
    "EulerDiscreteScheduler": _PAPER,
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "LMSDiscreteScheduler": _PAPER,
    "PNDMScheduler": _PAPER,
    "SASolverScheduler": _PAPER,
    "UniPCMultistepScheduler": _PAPER,
}

# Keys → values that are supported here.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (None, False),
    "thresholding": (None, False),
    "timestep_type": (None, "discrete"),
    "use_flow_sigmas": (None, False),
    "use_dynamic_shifting": (None, False),
}

# Keys that only affect sampling; early versions also wrote their tensor library (tensor_format).
_SAMPLING_KEYS = {
    "algorithm_type", "corrector_order", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "noise_sampler_seed", "predict_x0", "predictor_order", "sample_max_value", "set_alpha_to_one", "shift_terminal",
    "sigma_max", "sigma_min", "skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "tau_func",
    "tensor_format", "time_shift_type", "timestep_spacing", "timestep_values", "timesteps", "use_beta_sigmas",
    "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
}  # fmt: skip
_READ = {"beta_start", "beta_end", "beta_schedule", "clip_sample", "clip_sample_range", "num_train_timesteps",
         "predict_epsilon", "variance_type"}  # fmt: skip


def scheduler_config(
    section: DiffusionSection, betas: Sequence[float], variance: FixedVariance | Literal["learned"], *, clip: bool
) -> dict[str, Any]:
    """The `scheduler_config.json` of a DDPMScheduler that takes the steps that `ddpm sample --sampler ddpm` takes.

    Args:
        section: the diffusion.
        betas: β_t of its schedule; diffusers reads them from here where its own schedules cannot express them.
        variance: of a step.
        clip: whether estimates of the clean image are clipped to [-1, 1].
    """
    shifts = {f"_{key}": getattr(section, key) for key in _SHIFTS}
    is_shifted = any(shifts.values())
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.35.0",
        **(shifts if is_shifted else {}),
        "beta_end": 20 / section.timesteps,
        "beta_schedule": names[section.schedule],
        "beta_start": 0.1 / section.timesteps,
        "clip_sample": clip,
        "clip_sample_range": 1.0,
        "num_train_timesteps": section.timesteps,
        "prediction_type": section.prediction_type,
        "rescale_betas_zero_snr": False,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "leading",
        "trained_betas": list(betas) if is_shifted else None,
        "variance_type": "learned_range" if variance == "learned" else variance,
    }


def diffusion_from_diffusers(
    scheduler: Mapping[str, Any], learned_variance: bool
) -> tuple[DiffusionSection, FixedVariance, bool]:
    """Convert the content of a `scheduler_config.json`; an empty one means the diffusion of Ho et al. 2020.

    Args:
        scheduler: the content of the file.
        learned_variance: whether the network has learned its variance.

    Returns:
        Diffusion, variance of a DDPM step, and whether estimates of the clean image are clipped to [-1, 1].

    Raises:
        ConfigError: the diffusion is not supported here; one line with all the reasons.
    """
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind not in _ENDS:
        raise ConfigError(
            f"this diffusers model has the scheduler {printable(str(kind))}, which is not one of networks trained on "
            f"discrete timesteps with betas, as here: use a model with one of {', '.join(sorted(_ENDS))}"
        )
    timesteps = scheduler.get("num_train_timesteps", 1000)
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ConfigError(
            f"this diffusers {kind} has the num_train_timesteps {timesteps!r}, which is no number of them"
        )
    prediction = scheduler.get("prediction_type") or _old_prediction_type(scheduler)
    clip = bool(scheduler.get("clip_sample", kind != "HeunDiscreteScheduler"))
    variance_type = scheduler.get("variance_type", "fixed_small" if scheduler else "fixed_large")
    own = any(f"_{key}" in scheduler for key in _SHIFTS)  # its betas are checked by the caller
    problems = _beta_problems(scheduler, kind, timesteps) + [
        f"{key} is {repr(scheduler[key])[:80]}"
        for key, allowed in _SUPPORTED.items()
        if scheduler.get(key) is not None and scheduler[key] not in allowed and (key, True) != ("trained_betas", own)
    ]
    variances = (None, "learned_range") if learned_variance and "variance_type" in scheduler else tuple(_VARIANCES)
    if variance_type not in variances:
        problems.append(f"variance_type is {variance_type!r}")
    if clip and scheduler.get("clip_sample_range", 1.0) != 1.0:
        problems.append(f"clip_sample_range is {scheduler['clip_sample_range']!r}")
    if problems:
        raise ConfigError(
            f"this diffusers {kind} has options that this package does not support: {'; '.join(problems)}"
        )
    unknown = sorted(key for key in scheduler.keys() - _SAMPLING_KEYS - _READ - _SUPPORTED.keys() if key[:1] != "_")
    if unknown:
        messages.warning(f"scheduler_config.json: {printable(', '.join(unknown))}: unknown keys, which are ignored")
    section = DiffusionSection(
        timesteps=timesteps,
        schedule=_SCHEDULES[scheduler.get("beta_schedule", "linear")],
        prediction_type=prediction,
        **{key: scheduler[f"_{key}"] for key in _SHIFTS if f"_{key}" in scheduler},
    )
    return section, _VARIANCES.get(variance_type, "fixed_large"), clip


def _old_prediction_type(scheduler: Mapping[str, Any]) -> Literal["epsilon", "sample"]:
    """The prediction type that diffusers up to version 0.9 wrote as `predict_epsilon`."""
    return "epsilon" if scheduler.get("predict_epsilon", True) else "sample"


def _beta_problems(scheduler: Mapping[str, Any], kind: str, timesteps: int) -> list[str]:
    """The reasons why the betas are not supported."""
    schedule = scheduler.get("beta_schedule", "linear")
    if not isinstance(schedule, str) or schedule not in _SCHEDULES:
        return [f"beta_schedule {schedule!r} is neither 'linear' nor 'squaredcos_cap_v2'"]
    ends = [scheduler.get(key, default) for key, default in zip(("beta_start", "beta_end"), _ENDS[kind])]
    wanted = 0.1 / timesteps, 20 / timesteps
    numbers = all(isinstance(end, int | float) for end in ends)
    if schedule == "linear" and not (numbers and all(map(math.isclose, ends, wanted))):
        return [
            f"beta_schedule 'linear' goes from beta_start {ends[0]!r} to beta_end {ends[1]!r}, not from "
            f"{wanted[0]:g} to {wanted[1]:g} as over {timesteps} timesteps here"
        ]
    return []
