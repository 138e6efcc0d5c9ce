"""Our weights and architecture in the words of `diffusers.UNet2DModel`, and back.

Their `num_class_embeds` counts rows of the embedding table; ours has one more row than classes, the null label, and it
is the last. So a table from elsewhere is taken to end with its null label too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.config import DiffusionSection, ModelSection
from pipeline.errors import ConfigError, DataError

# Parts of a parameter's name, ours and theirs; each occurs in one place of a name only.
_NAMES = (
    ("time_mlp.0.", "time_embedding.linear_1."),
    ("time_mlp.2.", "time_embedding.linear_2."),
    ("head.norm.", "conv_norm_out."),
    ("head.conv.", "conv_out."),
    ("down.", "down_blocks."),
    ("middle.", "mid_block."),
    ("up.", "up_blocks."),
    (".blocks.", ".resnets."),
    (".embed.", ".time_emb_proj."),
    (".shortcut.", ".conv_shortcut."),
    (".norm.", ".group_norm."),
    (".out.", ".to_out.0."),
)
_RESAMPLERS = {"down_blocks": ".downsamplers.0.", "up_blocks": ".upsamplers.0."}
_QKV = (".to_q.", ".to_k.", ".to_v.")
# Attention in checkpoints of early diffusers, among them google/ddpm-cifar10-32.
_OLD_NAMES = dict(zip((".query.", ".key.", ".value.", ".proj_attn."), (*_QKV, ".to_out.0.")))

Variance = Literal["fixed_small", "fixed_large"]
_VARIANCES: dict[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same, by way of its logarithm
    "fixed_large": "fixed_large",
}

# What our network is in their configuration, and what they take if nothing is said.
_FIXED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (1e-6, 1e-5),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of our `UNet` under the names of `UNet2DModel`; the tensors are shared, not copied."""
    theirs: dict[str, Tensor] = {}
    for ours, value in state.items():
        name = ours
        for own, other in _NAMES:
            name = name.replace(own, other)
        name = name.replace(".resample.", _RESAMPLERS.get(name.partition(".")[0], ""))
        if ".qkv." in name:
            theirs |= {name.replace(".qkv.", part): tensor for part, tensor in zip(_QKV, value.chunk(3))}
        else:
            theirs[name] = value
    return theirs


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `UNet2DModel` under the names of our `UNet`, also those written by early versions of diffusers.

    Raises:
        DataError: queries without keys or values.
    """
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for theirs, value in state.items():
        name = theirs
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        for resampler in _RESAMPLERS.values():
            name = name.replace(resampler, ".resample.")
        for own, other in _NAMES:
            name = name.replace(other, own)
        for part in _QKV:
            if part in name:
                parts.setdefault(name.replace(part, ".qkv."), {})[part] = value
                break
        else:
            ours[name] = value
    for name, found in parts.items():
        if len(found) < len(_QKV):
            raise DataError(f"weights of {name}: only {', '.join(found)} there; take the file of a whole UNet2DModel")
        ours[name] = torch.cat([found[part] for part in _QKV])
    return ours


def diffusers_config(section: ModelSection, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """The `config.json` of the `UNet2DModel` that is the same function.

    Args:
        section: our architecture.
        channels: of the pictures.
        size: (H, W) of the pictures, in pixels.

    Raises:
        ConfigError: `channel_mults` does not begin with 1; theirs always do.
    """
    if section.channel_mults[0] != 1:
        raise ConfigError(
            f"model.channel_mults: begins with {section.channel_mults[0]}, which diffusers cannot express: it must be 1"
        )
    groups = math.gcd(32, section.base_channels)
    attends = [min(size) >> level in section.attention_sizes for level in range(len(section.channel_mults))]
    return {
        "_class_name": "UNet2DModel",
        **{key: ours for key, (ours, _) in _FIXED.items()},
        "attention_head_dim": section.head_channels,
        "attn_norm_num_groups": groups,
        "block_out_channels": [section.base_channels * mult for mult in section.channel_mults],
        "down_block_types": ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "dropout": section.dropout,
        "in_channels": channels,
        "layers_per_block": section.blocks_per_level,
        "norm_num_groups": groups,
        "num_class_embeds": section.num_classes + 1 if section.num_classes else None,
        "out_channels": 2 * channels if section.learned_variance else channels,
        "resnet_time_scale_shift": "scale_shift" if section.scale_shift else "default",
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "up_block_types": ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
    }


def section_from_diffusers(config: Mapping[str, Any]) -> tuple[ModelSection, int, tuple[int, int]]:
    """The arguments of `diffusers_config` that give this configuration.

    Returns:
        Architecture, channels, (H, W).

    Raises:
        ConfigError: one line with everything that our network cannot be.
    """
    if config.get("sample_size") is None:
        raise ConfigError("sample_size is missing from the diffusers configuration: add the pictures' size in pixels")
    sample_size = config["sample_size"]
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    widths = config.get("block_out_channels", (224, 448, 672, 896))
    base, rows = widths[0], config.get("num_class_embeds")
    scale_shift = config.get("resnet_time_scale_shift", "default")
    groups = config.get("norm_num_groups", 32)
    down = list(config.get("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * 3)))
    up = list(config.get("up_block_types", (*["AttnUpBlock2D"] * 3, "UpBlock2D")))
    attends = [kind == "AttnDownBlock2D" for kind in down]

    problems = [
        f"{key} is {config.get(key, default)!r}, not {ours!r}"
        for key, (ours, default) in _FIXED.items()
        if config.get(key, default) != ours
    ]
    wanted = {
        "out_channels": (out_channels, (channels, 2 * channels)),
        "norm_num_groups": (groups, (math.gcd(32, base),)),
        "attn_norm_num_groups": (
            config.get("attn_norm_num_groups") or (groups if scale_shift == "default" else None),
            (groups,),
        ),
        "resnet_time_scale_shift": (scale_shift, ("default", "scale_shift")),
        "time_embedding_dim": (config.get("time_embedding_dim"), (None, 4 * base)),
        "block_out_channels": ([width % base for width in widths], ([0] * len(widths),)),
        "down_block_types": (down, (["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],)),
        "up_block_types": (up, (["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],)),
        "num_class_embeds": (rows == 1, (False,)),
    }
    problems += [f"{key} is {config.get(key)!r}" for key, (value, allowed) in wanted.items() if value not in allowed]
    if problems:
        raise ConfigError(f"this diffusers model is not one that can be expressed here: {'; '.join(problems)}")
    section = ModelSection(
        base_channels=base,
        channel_mults=tuple(width // base for width in widths),
        blocks_per_level=config.get("layers_per_block", 2),
        attention_sizes=tuple(min(height, width) >> level for level, attention in enumerate(attends) if attention),
        head_channels=config.get("attention_head_dim", 8),
        dropout=config.get("dropout", 0.0),
        num_classes=rows - 1 if rows else 0,
        scale_shift=scale_shift == "scale_shift",
        learned_variance=out_channels == 2 * channels,
    )
    return section, channels, (height, width)


def diffusion_from_diffusers(
    scheduler: Mapping[str, Any], learned_variance: bool
) -> tuple[DiffusionSection, Variance, bool]:
    """What a `scheduler_config.json` describes; an empty one stands for the diffusion of Ho et al. 2020.

    Args:
        scheduler: of a DDPMScheduler or one that knows a part of its settings, such as DDIMScheduler.
        learned_variance: whether the network brings its own variance.

    Returns:
        Diffusion, variance of a DDPM step, and whether estimates of the clean picture are clipped to [-1, 1].

    Raises:
        ConfigError: one line with everything that cannot be had here.
    """
    timesteps = int(scheduler.get("num_train_timesteps", 1000))
    schedule = {"linear": "linear", "squaredcos_cap_v2": "cosine"}.get(scheduler.get("beta_schedule", "linear"))
    ends = (scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02))
    if schedule is None or (schedule == "linear" and ends != (0.1 / timesteps, 20 / timesteps)):
        raise ConfigError(
            f"beta_schedule {scheduler.get('beta_schedule')!r} from {ends[0]} to {ends[1]} over {timesteps} timesteps "
            "cannot be expressed here: take a model of linear betas (1e-4 to 0.02 at 1000 timesteps) or cosine ones"
        )
    variance_type = scheduler.get("variance_type", "fixed_small" if scheduler else "fixed_large")
    wanted = {
        "variance_type": ("learned_range",) if learned_variance and "variance_type" in scheduler else tuple(_VARIANCES),
        "clip_sample_range": (1.0,),
        "thresholding": (False,),
        "rescale_betas_zero_snr": (False,),
        "trained_betas": (None,),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
    }
    problems = [
        f"{key} is {scheduler[key]!r}"
        for key, allowed in wanted.items()
        if key in scheduler and scheduler[key] not in allowed
    ]
    if problems:
        raise ConfigError(f"this diffusers scheduler is not one that can be expressed here: {'; '.join(problems)}")
    section = DiffusionSection(
        timesteps=timesteps, schedule=schedule, prediction_type=scheduler.get("prediction_type", "epsilon")
    )
    return section, _VARIANCES.get(variance_type, "fixed_large"), scheduler.get("clip_sample", True)
