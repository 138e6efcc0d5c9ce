"""Networks of other projects: which project wrote a file of weights, its network's settings by shapes, our names.

- w86763777/pytorch-ddpm: `ckpt.pt` with `net_model`, `ema_model` and more.
- OpenAI's improved-diffusion and guided-diffusion: a dict of weights alone.

Both number the blocks of all levels on, R to a level, and count the layers between two levels as one. R and the number
of levels follow from where these layers are; that all other names and shapes fit the network so found is checked by
loading them. What shapes cannot tell is in `Told`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import ConfigError, DataError
from pipeline.untrusted import printable

Kind = Literal["w86763777", "openai"]
_PYTORCH = {"norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0, "norm_groups": 32}
_MODULES = {
    "w86763777": {"block1.0": "norm1", "block1.2": "conv1", "temb_proj.1": "embed", "block2.0": "norm2",
                  "block2.3": "conv2", "shortcut": "shortcut"},
    "openai": {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "embed", "out_layers.0": "norm2",
               "out_layers.3": "conv2", "skip_connection": "shortcut"},
}  # fmt: skip
"""Layers of a residual block, there → here."""
_ENDS = {
    "w86763777": {"time_embedding.timembedding.1": "time_mlp.0", "time_embedding.timembedding.3": "time_mlp.2",
                  "head": "conv_in", "tail.0": "head.norm", "tail.2": "head.conv"},
    "openai": {"time_embed.0": "time_mlp.0", "time_embed.2": "time_mlp.2", "label_emb": "class_embedding",
               "input_blocks.0.0": "conv_in", "out.0": "head.norm", "out.2": "head.conv"},
}  # fmt: skip
_TABLE = "time_embedding.timembedding.0.weight"


@dataclass(frozen=True)
class Told:
    """What the shapes of OpenAI's weights do not tell: how attention is divided."""

    num_heads: int | None = None
    head_channels: int | None = None
    attention_order: Literal["legacy", "new"] = "legacy"
    """Order of the rows of a projection to queries, keys and values: by head first, or by these three first."""


class Network(NamedTuple):
    """A network of another project."""

    section: dict[str, Any]
    """Keys of `ModelSection` that the weights determine, but `attention_sizes`."""
    attending: list[int]
    """The levels with attention, 0 the finest."""
    channels: int
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Weights under their names → under ours."""


def kind_of(names: Iterable[Any]) -> Kind | None:
    """Which project wrote weights of these names."""
    names = set(names)
    if {_TABLE, "head.weight", "tail.2.weight"} <= names:
        return "w86763777"
    return "openai" if {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= names else None


def refuse_lucidrains(content: Any, url: str) -> None:
    """Refuse a checkpoint of lucidrains' denoising-diffusion-pytorch with the reason.

    Raises:
        ConfigError: `content`, the value in a file, is one.
    """
    model = content.get("model") if isinstance(content, dict) else None
    names = {*content, *(model if isinstance(model, dict) else ())} if isinstance(content, dict) else set()
    if any(str(name).removeprefix("model.").startswith(("init_conv.", "time_mlp.", "init_")) for name in names):
        raise ConfigError(
            f"{url} is a checkpoint of lucidrains' denoising-diffusion-pytorch: its network has RMSNorm, linear "
            "attention and memory keys, which the U-Net of Ho et al. 2020 does not have: sample with that package"
        )


def network(kind: Kind, weights: Mapping[str, Tensor], told: Told, url: str) -> Network:
    """The network that these weights are of.

    Args:
        kind: from `kind_of`.
        weights: under the names of the project.
        told: for OpenAI.
        url: of the file, for messages.

    Raises:
        ConfigError: our network cannot be that one, or `told` does not fit it.
        DataError: the weights are not those of a network of this project.
    """
    try:
        return _w86763777(weights) if kind == "w86763777" else _openai(weights, told)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise DataError(
            f"{url}: not the weights of a whole network ({printable(' '.join(str(error).split()), 200)}): copy it again"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{url}: {error}") from None


def timesteps(weights: Mapping[str, Tensor]) -> int | None:
    """T of a network of w86763777, which has a row for each in its table; None for one of OpenAI."""
    return weights[_TABLE].shape[0] if _TABLE in weights and weights[_TABLE].ndim else None


def _w86763777(weights: Mapping[str, Tensor]) -> Network:
    base = weights["head.weight"].shape[0]
    _check_table(weights[_TABLE], base)
    down, up = _numbered(weights, "downblocks"), _numbered(weights, "upblocks")
    halving = [number for number in range(down) if f"downblocks.{number}.main.weight" in weights]
    blocks = halving[0] if halving else down
    levels = len(halving) + 1
    _check_count(down, levels * blocks + levels - 1)
    _check_count(up, levels * (blocks + 1) + levels - 1)
    first = [f"downblocks.{level * (blocks + 1)}" for level in range(levels)]
    attending = [level for level in range(levels) if f"{first[level]}.attn.proj_q.weight" in weights]
    modules = dict(_ENDS["w86763777"])
    for level in range(levels):
        for j in range(blocks):
            modules |= _block(f"downblocks.{level * (blocks + 1) + j}", f"down.{level}", j)
        for j in range(blocks + 1):
            modules |= _block(f"upblocks.{level * (blocks + 2) + j}", f"up.{level}", j)
        if level < levels - 1:
            modules[f"downblocks.{level * (blocks + 1) + blocks}.main"] = f"down.{level}.resample.conv"
            modules[f"upblocks.{level * (blocks + 2) + blocks + 1}.main"] = f"up.{level}.resample.conv"
    for j in (0, 1):
        modules |= _block(f"middleblocks.{j}", "middle", j)

    def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = _renamed(weights, modules, ignored=(_TABLE,))
        first = renamed["time_mlp.0.weight"]  # their embedding is sin, cos, sin, cos, …, ours has all sines first
        renamed["time_mlp.0.weight"] = torch.cat((first[:, 0::2], first[:, 1::2]), dim=1)
        for name in [name for name in renamed if ".q." in name]:
            parts = [renamed.pop(name.replace(".q.", part)) for part in (".q.", ".k.", ".v.")]
            renamed[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        return {name: _flat(name, tensor) for name, tensor in renamed.items()}

    widths = [weights[f"{name}.block1.2.weight"].shape[0] for name in first]
    section = {**_PYTORCH, "base_channels": base, "channel_mults": _mults(widths, base), "blocks_per_level": blocks}
    return Network(section, attending, weights["head.weight"].shape[1], convert)


def _block(theirs: str, level: str, j: int) -> dict[str, str]:
    """Modules of a residual block of w86763777, which contains its attention."""
    attention = {"group_norm": "norm", "proj_q": "q", "proj_k": "k", "proj_v": "v", "proj": "out"}
    return {f"{theirs}.{part}": f"{level}.blocks.{j}.{ours}" for part, ours in _MODULES["w86763777"].items()} | {
        f"{theirs}.attn.{part}": f"{level}.attentions.{j}.{ours}" for part, ours in attention.items()
    }


def _check_table(table: Tensor, base: int) -> None:
    """Refuse a table of time embeddings that is not the usual one, as after fine-tuning it."""
    angles = torch.arange(len(table))[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, base, 2) / base)
    usual = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)
    if table.shape != usual.shape or (table - usual).abs().max() > 1e-2:
        raise ConfigError("its table of time embeddings is not that of sines and cosines, which this package needs")


def _openai(weights: Mapping[str, Tensor], told: Told) -> Network:
    base, channels = weights["time_embed.0.weight"].shape[1], weights["input_blocks.0.0.weight"].shape[1]
    down, up = _numbered(weights, "input_blocks"), _numbered(weights, "output_blocks")
    by_blocks = any(f"output_blocks.{k}.{j}.in_layers.0.weight" in weights for k in range(up) for j in (1, 2))
    layer = "in_layers.0" if by_blocks else "conv"
    doubling = [k for k in range(up) if any(f"output_blocks.{k}.{j}.{layer}.weight" in weights for j in (1, 2))]
    blocks = doubling[0] if doubling else up - 1
    levels = up // (blocks + 1)
    _check_count(up, levels * (blocks + 1))
    _check_count(down, levels * (blocks + 1))
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    attending = [level for level in range(levels) if f"{first[level]}.1.qkv.weight" in weights]
    modules = _openai_modules(blocks, levels, attending, by_blocks)

    def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = {name: _flat(name, tensor) for name, tensor in _renamed(weights, modules).items()}
        if told.attention_order == "legacy":
            flat |= {name: _by_head_last(tensor, told) for name, tensor in flat.items() if ".qkv." in name}
        return flat

    widths = [weights[f"{name}.0.out_layers.3.weight"].shape[0] for name in first]
    rows = weights[f"{first[0]}.0.emb_layers.1.weight"].shape[0]
    section = _PYTORCH | {
        "base_channels": base, "channel_mults": _mults(widths, base), "blocks_per_level": blocks,
        "flip_sin_to_cos": True, "scale_shift": rows == 2 * widths[0], "num_heads": told.num_heads,
        "head_channels": told.head_channels, "resample_blocks": by_blocks,
        "learned_variance": weights["out.2.weight"].shape[0] == 2 * channels,
    }  # fmt: skip
    if "label_emb.weight" in weights:  # no row of which means no class
        section |= {"num_classes": len(weights["label_emb.weight"]), "label_dropout": 0.0}
    return Network(section, attending, channels, convert)


def _openai_modules(blocks: int, levels: int, attending: list[int], by_blocks: bool) -> dict[str, str]:
    """Modules of OpenAI's networks, there → here."""
    attention = {"norm": "norm", "qkv": "qkv", "proj_out": "out"}

    def block(theirs: str, ours: str) -> dict[str, str]:
        return {f"{theirs}.{part}": f"{ours}.{our}" for part, our in _MODULES["openai"].items()}

    def level_block(theirs: str, level: str, j: int, attends: bool) -> dict[str, str]:
        parts = {f"{theirs}.1.{part}": f"{level}.attentions.{j}.{our}" for part, our in attention.items()}
        return block(f"{theirs}.0", f"{level}.blocks.{j}") | (parts if attends else {})

    modules = dict(_ENDS["openai"]) | level_block("middle_block", "middle", 0, True)
    modules |= block("middle_block.2", "middle.blocks.1")
    for level in range(levels):
        for j in range(blocks):
            number = 1 + level * (blocks + 1) + j
            modules |= level_block(f"input_blocks.{number}", f"down.{level}", j, level in attending)
        if level < levels - 1:
            layer, ours = f"input_blocks.{(level + 1) * (blocks + 1)}.0", f"down.{level}.resample"
            modules |= block(layer, ours) if by_blocks else {f"{layer}.op": f"{ours}.conv"}
    for i, level in enumerate(reversed(range(levels))):  # the coarsest first
        for j in range(blocks + 1):
            number = i * (blocks + 1) + j
            modules |= level_block(f"output_blocks.{number}", f"up.{i}", j, level in attending)
        if level:
            layer, ours = f"output_blocks.{number}.{1 + (level in attending)}", f"up.{i}.resample"
            modules |= block(layer, ours) if by_blocks else {f"{layer}.conv": f"{ours}.conv"}
    return modules


def _by_head_last(rows: Tensor, told: Told) -> Tensor:
    """Rows of a projection to [head][query, key, value] → [query, key, value][head]."""
    width = len(rows) // 3
    heads = told.num_heads or width // (told.head_channels or width)
    if not heads or width % heads or (told.head_channels and width % told.head_channels):
        flag = f"--num-heads {told.num_heads}" if told.num_heads else f"--head-channels {told.head_channels}"
        raise ConfigError(
            f"{flag} does not divide the {width} channels of its attention: give the value of its training"
        )
    return rows.reshape(heads, 3, width // heads, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _flat(name: str, tensor: Tensor) -> Tensor:
    """Projections of attention are convolutions there, of (C', C, 1) or (C', C, 1, 1)."""
    return tensor.flatten(1) if name.endswith((".qkv.weight", ".out.weight")) else tensor


def _renamed(
    weights: Mapping[str, Tensor], modules: Mapping[str, str], ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        if name not in ignored:
            renamed[f"{modules[module]}.{leaf}"] = tensor
    return renamed


def _numbered(weights: Mapping[str, Tensor], stem: str) -> int:
    """How many blocks `stem.0`, `stem.1`, … there are."""
    numbers = {int(name.split(".")[1]) for name in weights if name.startswith(f"{stem}.")}
    _check_count(len(numbers), max(numbers) + 1)
    return len(numbers)


def _check_count(there: int, wanted: int) -> None:
    if there != wanted:
        raise ValueError(f"{there} blocks in place of {wanted}")


def _mults(widths: list[int], base: int) -> tuple[int, ...]:
    if any(width % base for width in widths):
        raise ConfigError(f"its levels have {widths} channels, which are no multiples of the first layer's {base}")
    return tuple(width // base for width in widths)
