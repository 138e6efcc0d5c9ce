"""Convert weights and architecture of our `UNet` to `diffusers.UNet2DModel` and back.

In diffusers, `num_class_embeds` is the number of rows of the embedding table, and each row is a class. Our table has
one more row, the last: the null label. Our exported configuration says so by `_label_dropout`, the share of training
images whose label was hidden; diffusers keeps this key and ignores it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.config import ModelSection
from pipeline.errors import ConfigError, DataError
from pipeline.untrusted import printable

# Parts of a parameter's name, here and in diffusers; each occurs at most once in a name.
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
# Attention in checkpoints of early versions of diffusers, such as google/ddpm-cifar10-32.
_OLD_NAMES = dict(zip((".query.", ".key.", ".value.", ".proj_attn."), (*_QKV, ".to_out.0.")))

# Keys of a diffusers configuration → (the only value that our network supports, the default in diffusers).
_FIXED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),  # also called swish
    "add_attention": (True, True),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "time_embedding_type": ("positional", "positional"),
}
# Keys of equal names and meanings here and there → the default in diffusers.
_SAME: dict[str, Any] = {"norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0, "flip_sin_to_cos": True}
_READ = {
    "attention_head_dim", "attn_norm_num_groups", "block_out_channels", "down_block_types", "downsample_type",
    "dropout", "in_channels", "layers_per_block", "norm_num_groups", "num_class_embeds", "out_channels",
    "resnet_time_scale_shift", "sample_size", "time_embedding_dim", "up_block_types", "upsample_type",
}  # fmt: skip
# Keys without effect on the output: class names, the timesteps of learned embeddings, settings of EMAModel.
_IGNORED = {
    "decay", "id2label", "inv_gamma", "label2id", "min_decay", "num_train_timesteps", "optimization_step", "power",
    "update_after_step", "use_ema_warmup",
}  # fmt: skip


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of our `UNet` for `UNet2DModel`; tensors are shared, not copied."""
    renamed: dict[str, Tensor] = {}
    for original, value in state.items():
        name = original
        for part, diffusers_part in _NAMES:
            name = name.replace(part, diffusers_part)
        name = name.replace(".resample.", _RESAMPLERS.get(name.partition(".")[0], ""))
        if ".qkv." in name:
            renamed |= {name.replace(".qkv.", part): tensor for part, tensor in zip(_QKV, value.chunk(3))}
        else:
            renamed[name] = value
    return renamed


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of a `UNet2DModel`, also from early versions of diffusers, for our `UNet`.

    Raises:
        DataError: one of query, key and value is missing.
    """
    renamed: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for original, value in state.items():
        name = original
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        for resampler in _RESAMPLERS.values():
            name = name.replace(resampler, ".resample.")
        for part, diffusers_part in _NAMES:
            name = name.replace(diffusers_part, part)
        if part := next((part for part in _QKV if part in name), ""):
            attention.setdefault(name.replace(part, ".qkv."), {})[part] = value
        else:
            renamed[name] = value
    for name, parts in attention.items():
        if len(parts) < len(_QKV):
            raise DataError(f"weights of {name}: only {', '.join(parts)} there; use the file of a whole UNet2DModel")
        renamed[name] = torch.cat([parts[part] for part in _QKV])
    return renamed


def diffusers_config(section: ModelSection, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """The `config.json` of the equivalent `UNet2DModel`.

    Args:
        section: architecture of our network.
        channels: channels of the images.
        size: (H, W) of the images, in pixels.

    Raises:
        ConfigError: diffusers cannot express the network: `channel_mults` does not start with 1, `timestep_scale` is
            not 1, or the number of heads does not give heads of one size.
    """
    groups = section.groups
    attends = [min(size) >> level in section.attention_sizes for level in range(len(section.channel_mults))]
    _check_expressible(section, attends)
    resampling = "resnet" if section.resample_blocks else "conv"
    several = section.num_heads if section.num_heads != 1 else None
    return {
        "_class_name": "UNet2DModel",
        **{key: supported for key, (supported, _) in _FIXED.items()},
        **{key: getattr(section, key) for key in _SAME},
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": section.base_channels * section.channel_mults[-1] // several
        if several
        else section.head_channels,
        "attn_norm_num_groups": groups,
        "block_out_channels": [section.base_channels * mult for mult in section.channel_mults],
        "down_block_types": _block_types("Down", resampling, attends),
        "dropout": max(section.dropout_by_level),  # diffusers has one value for all levels
        "in_channels": channels,
        "layers_per_block": section.blocks_per_level,
        "norm_num_groups": groups,
        "num_class_embeds": section.num_classes + 1 if section.num_classes else None,
        **({"_label_dropout": section.label_dropout} if section.num_classes else {}),
        "out_channels": 2 * channels if section.learned_variance else channels,
        "resnet_time_scale_shift": "scale_shift" if section.scale_shift else "default",
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "up_block_types": _block_types("Up", resampling, reversed(attends)),
    }


def _block_types(direction: Literal["Down", "Up"], resampling: str, attends: Iterable[bool]) -> list[str]:
    """Names of the levels; one with attention resamples as downsample_type and upsample_type say."""
    plain = f"Resnet{direction}sampleBlock2D" if resampling == "resnet" else f"{direction}Block2D"
    return [f"Attn{direction}Block2D" if attention else plain for attention in attends]


def _check_expressible(section: ModelSection, attends: list[bool]) -> None:
    if section.channel_mults[0] != 1:
        raise ConfigError(
            f"model.channel_mults: begins with {section.channel_mults[0]}, which diffusers cannot express: it must be 1"
        )
    if section.timestep_scale != 1:
        raise ConfigError(
            f"model.timestep_scale: {section.timestep_scale:g}, which diffusers cannot express: it must be 1"
        )
    # The middle always attends.
    attending = {mult for mult, attention in zip(section.channel_mults, attends) if attention}
    if section.num_heads not in (None, 1) and not attending <= {section.channel_mults[-1]}:
        raise ConfigError(
            f"model.num_heads: {section.num_heads} heads at levels of different widths, which diffusers cannot express:"
            " only heads of one size, as model.head_channels gives them"
        )


def section_from_diffusers(config: Mapping[str, Any]) -> tuple[ModelSection, int, tuple[int, int]]:
    """The inverse of `diffusers_config`.

    If the table of classes has no null label, our network gets an untrained one, and `label_dropout` is 0.

    Returns:
        Architecture, channels, (H, W).

    Raises:
        ConfigError: our network does not support the configuration; one line with all the reasons.
    """
    if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise ConfigError(f"this diffusers model is a {kind}: only a UNet2DModel can be read here")
    if config.get("sample_size") is None:
        raise ConfigError("sample_size is missing from the diffusers configuration: add the images' size in pixels")
    sample_size = config["sample_size"]
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    widths = config.get("block_out_channels", (224, 448, 672, 896))
    base, classes = widths[0], _classes(config)
    scale_shift = config.get("resnet_time_scale_shift", "default")
    groups = config.get("norm_num_groups", 32)
    down = list(config.get("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * 3)))
    up = list(config.get("up_block_types", (*["AttnUpBlock2D"] * 3, "UpBlock2D")))
    attends = [kind == "AttnDownBlock2D" for kind in down]

    problems = [
        f"{key} is {config.get(key, default)!r}, not {supported!r}"
        for key, (supported, default) in _FIXED.items()
        if config.get(key, default) != supported and (key, config.get(key)) != ("act_fn", "swish")
    ]
    problems += [
        f"{printable(key)} is {repr(value)[:80]}, which no UNet2DModel known here has"
        for key, value in config.items()
        if value is not None
        and not (key.startswith("_") or key in _FIXED or key in _READ or key in _SAME or key in _IGNORED)
    ]
    resampling = config.get("downsample_type", "conv")
    same = {key: config.get(key, default) for key, default in _SAME.items()}
    wanted = {
        "downsample_padding": (same["downsample_padding"], (0, 1)),
        "freq_shift": (same["freq_shift"], (0, 1)),
        "out_channels": (out_channels, (channels, 2 * channels)),
        "norm_num_groups": (base % groups, (0,)),
        "attn_norm_num_groups": (
            config.get("attn_norm_num_groups") or (groups if scale_shift == "default" else None),
            (groups,),
        ),
        "resnet_time_scale_shift": (scale_shift, ("default", "scale_shift")),
        "time_embedding_dim": (config.get("time_embedding_dim"), (None, 4 * base)),
        "block_out_channels": ([width % base for width in widths], ([0] * len(widths),)),
        "downsample_type": (resampling, ("conv", "resnet")),
        "upsample_type": (config.get("upsample_type", "conv"), (resampling,)),
        "down_block_types": (down, (_block_types("Down", resampling, attends),)),
        "up_block_types": (up, (_block_types("Up", resampling, reversed(attends)),)),
        "num_class_embeds": (classes is None, (False,)),
    }
    problems += [f"{key} is {config.get(key)!r}" for key, (value, allowed) in wanted.items() if value not in allowed]
    if problems:
        raise ConfigError(f"this diffusers model has options that this package does not support: {'; '.join(problems)}")
    section = ModelSection(
        base_channels=base,
        channel_mults=tuple(width // base for width in widths),
        blocks_per_level=config.get("layers_per_block", 2),
        norm_groups=groups,
        attention_sizes=tuple(min(height, width) >> level for level, attention in enumerate(attends) if attention),
        head_channels=config.get("attention_head_dim", 8),
        dropout=config.get("dropout", 0.0),
        **({} if classes is None else classes),
        scale_shift=scale_shift == "scale_shift",
        learned_variance=out_channels == 2 * channels,
        resample_blocks=resampling == "resnet",
        **same,
    )
    return section, channels, (height, width)


def null_row_added(weights: Mapping[str, Tensor], section: ModelSection) -> dict[str, Tensor]:
    """The weights, with a row of zeros for the null label if the table of classes has none."""
    table = weights.get("class_embedding.weight")
    if table is None or table.ndim != 2 or len(table) != section.num_classes:
        return dict(weights)
    return {**weights, "class_embedding.weight": torch.cat((table, table.new_zeros(1, table.shape[1])))}


def _classes(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keys of `ModelSection` that the table of classes determines; None if it is not supported."""
    rows, hidden = config.get("num_class_embeds"), config.get("_label_dropout")
    if rows is None:
        return {}
    # Version 0.1 wrote no `_label_dropout`; it is recognized by `attn_norm_num_groups`, which diffusers leaves empty.
    early = config.get("attn_norm_num_groups") and config.get("resnet_time_scale_shift", "default") == "default"
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1 + (hidden is not None):
        return None
    if hidden is None and early and rows > 1:
        return {"num_classes": rows - 1}
    if hidden is None:
        return {"num_classes": rows, "label_dropout": 0.0}
    return {"num_classes": rows - 1, "label_dropout": hidden}
