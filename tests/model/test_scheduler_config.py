"""What scheduler_config.json says of a network: the noise levels and the target as diffusers has them, or a refusal."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch

from pipeline.diffusion.process import DiffusionProcess
from pipeline.errors import ConfigError
from pipeline.model.scheduler_config import _ENDS, diffusion_from_diffusers

BY_BETAS = sorted(_ENDS.keys() - {"DPMSolverSDEScheduler"})  # needs torchsde
PAPER, COSINE = {"beta_start": 1e-4, "beta_end": 0.02}, {"beta_schedule": "squaredcos_cap_v2"}


def saved(kind: str, **settings: Any) -> dict[str, Any]:
    scheduler = getattr(diffusers, kind)(**settings)
    return json.loads(scheduler.to_json_string().replace("-Infinity", "null"))


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, PAPER) for kind in BY_BETAS), ("UniPCMultistepScheduler", COSINE), ("HeunDiscreteScheduler", COSINE)],
)
def test_the_noise_levels_are_those_of_diffusers(kind: str, settings: dict[str, Any], capsys: Any) -> None:
    theirs = getattr(diffusers, kind)(**settings, prediction_type="v_prediction")
    section, _, _ = diffusion_from_diffusers(saved(kind, **settings, prediction_type="v_prediction"), False)
    ours = DiffusionProcess.of(section).schedule.alphas_cumprod
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    assert section.prediction_type == "v_prediction"
    assert not capsys.readouterr().err  # every key is known


@pytest.mark.parametrize("kind", BY_BETAS)
def test_defaults_of_each_scheduler_are_known(kind: str) -> None:
    config = saved(kind)
    named = {"_class_name": kind}
    if (config["beta_start"], config["beta_end"]) == (1e-4, 0.02):
        assert diffusion_from_diffusers(named, False)[0] == diffusion_from_diffusers(config, False)[0]
        return
    with pytest.raises(ConfigError, match=rf"{kind} .* from beta_start {config['beta_start']} to beta_end"):
        diffusion_from_diffusers(named, False)


@pytest.mark.parametrize(
    "kind",
    ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "IPNDMScheduler",
     "ScoreSdeVeScheduler", "CMStochasticIterativeScheduler", "LCMScheduler", "TCDScheduler", "UnCLIPScheduler",
     "My\x1b"],
)  # fmt: skip
def test_schedulers_of_other_trainings_are_named(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=r"has the scheduler \w+.*, which is not one of networks trained on"
    ) as refusal:
        diffusion_from_diffusers({"_class_name": kind}, False)
    assert kind.replace("\x1b", "\\x1b") in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear'"),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ("DDPMScheduler", {"beta_schedule": ["linear"]}, r"beta_schedule \['linear'\]"),
        ("PNDMScheduler", {"beta_end": 0.012}, "from beta_start 0.0001 to beta_end 0.012, not from 0.0001 to 0.02"),
        ("DDIMScheduler", {"num_train_timesteps": 500}, "not from 0.0002 to 0.04 as over 500 timesteps"),
        ("DDIMScheduler", {"beta_start": "0.0001"}, "beta_start '0.0001'"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding is True"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ("DDPMScheduler", {"trained_betas": [0.1] * 1000}, r"trained_betas is \[0\.1, 0\.1"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type is 'learned'"),
        ("DDPMScheduler", {"clip_sample_range": 2.0}, "clip_sample_range is 2.0"),
        ("DDPMScheduler", {"num_train_timesteps": "1000"}, "num_train_timesteps '1000'"),
        ("DDPMScheduler", {"num_train_timesteps": True}, "num_train_timesteps True"),
        ("DDPMScheduler", {"num_train_timesteps": 0}, "num_train_timesteps 0"),
    ],
)
def test_unsupported_values_are_refused_with_scheduler_and_key(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        diffusion_from_diffusers({"_class_name": kind} | settings, False)
    assert kind in str(refusal.value) and len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("epsilon", "fixed_large", True)),
        ({"_class_name": "DDPMScheduler"}, ("epsilon", "fixed_small", True)),
        ({"_class_name": "DDPMScheduler", "predict_epsilon": False}, ("sample", "fixed_small", True)),
        (
            {"_class_name": "DDIMScheduler", "clip_sample": False, "clip_sample_range": 2.0},
            ("epsilon", "fixed_small", False),
        ),
        ({"_class_name": "HeunDiscreteScheduler"} | PAPER, ("epsilon", "fixed_small", False)),
        (
            {"_class_name": "PNDMScheduler", "tensor_format": "pt", "timestep_values": None},
            ("epsilon", "fixed_small", True),
        ),
    ],
)
def test_published_and_early_configurations(config: dict[str, Any], expected: tuple[str, str, bool]) -> None:
    section, variance, clip = diffusion_from_diffusers(config, False)
    assert (section.prediction_type, variance, clip) == expected


def test_unknown_keys_cause_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    diffusion_from_diffusers({"_class_name": "DDPMScheduler", "wobble": 3}, False)
    assert "scheduler_config.json: wobble: unknown keys, which are ignored" in capsys.readouterr().err


@pytest.mark.parametrize(("variance_type", "taken"), [("learned_range", True), (None, True), ("fixed_small", False)])
def test_a_network_with_its_own_variance(variance_type: str | None, taken: bool) -> None:
    config = {"_class_name": "DDPMScheduler", "variance_type": variance_type}
    if taken:
        diffusion_from_diffusers(config, True)
        return
    with pytest.raises(ConfigError, match="variance_type is 'fixed_small'"):
        diffusion_from_diffusers(config, True)
