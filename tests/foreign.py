"""Networks in the layouts of other projects, from the description of their files: random weights, and the function.

A network is a dict of weights under the names of its project. Its function walks over the names, as the names of its
weights say what a layer is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
GROUPS = 32


class Layers:
    """Makes random weights that all matter, at the scale of trained ones."""

    def __init__(self) -> None:
        self.weights: Weights = {}
        self._generator = torch.Generator().manual_seed(0)

    def layer(self, name: str, *shape: int) -> None:
        """A convolution or linear layer."""
        fan = math.prod(shape[1:])
        self.weights[f"{name}.weight"] = torch.randn(shape, generator=self._generator) / math.sqrt(fan)
        self.weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=self._generator)

    def norm(self, name: str, channels: int) -> None:
        self.weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=self._generator)
        self.weights[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=self._generator)


# --- OpenAI: improved-diffusion and guided-diffusion ---


def openai(  # noqa: C901  a network in one piece
    base: int = 32,
    mults: Sequence[int] = (1, 2),
    blocks: int = 2,
    attending: Sequence[int] = (1,),
    *,
    channels: int = 3,
    classes: int = 0,
    scale_shift: bool = False,
    learn_sigma: bool = False,
    updown: bool = False,
) -> Weights:
    """Weights as model….pt and ema….pt hold them."""
    make, features = Layers(), 4 * base

    def res(name: str, before: int, after: int) -> None:
        make.norm(f"{name}.in_layers.0", before)
        make.layer(f"{name}.in_layers.2", after, before, 3, 3)
        make.layer(f"{name}.emb_layers.1", after * (1 + scale_shift), features)
        make.norm(f"{name}.out_layers.0", after)
        make.layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            make.layer(f"{name}.skip_connection", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        make.norm(f"{name}.norm", width)
        make.layer(f"{name}.qkv", 3 * width, width, 1)
        make.layer(f"{name}.proj_out", width, width, 1)

    make.layer("time_embed.0", features, base)
    make.layer("time_embed.2", features, features)
    if classes:
        make.weights["label_emb.weight"] = torch.randn(classes, features, generator=torch.Generator().manual_seed(1))
    make.layer("input_blocks.0.0", base, channels, 3, 3)
    width, skips, number = base, [base], 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            res(f"input_blocks.{number}.0", width, base * mult)
            width = base * mult
            if level in attending:
                attention(f"input_blocks.{number}.1", width)
            skips.append(width)
            number += 1
        if level < len(mults) - 1:
            if updown:
                res(f"input_blocks.{number}.0", width, width)
            else:
                make.layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    res("middle_block.0", width, width)
    attention("middle_block.1", width)
    res("middle_block.2", width, width)
    number = 0
    for level, mult in reversed(list(enumerate(mults))):
        for j in range(blocks + 1):
            res(f"output_blocks.{number}.0", width + skips.pop(), base * mult)
            width = base * mult
            if level in attending:
                attention(f"output_blocks.{number}.1", width)
            if level and j == blocks:
                name = f"output_blocks.{number}.{1 + (level in attending)}"
                res(name, width, width) if updown else make.layer(f"{name}.conv", width, width, 3, 3)
            number += 1
    make.norm("out.0", width)
    make.layer("out.2", channels * (1 + learn_sigma), width, 3, 3)
    return make.weights


def openai_output(  # noqa: C901
    w: Weights,
    x: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    *,
    num_heads: int | None = None,
    head_channels: int = 0,
    new_order: bool = False,
    timestep_scale: float = 1.0,
) -> Tensor:
    """The network's output."""
    base = w["time_embed.0.weight"].shape[1]
    e = _linear(w, "time_embed.2", F.silu(_linear(w, "time_embed.0", _waves(t * timestep_scale, base, "cos, sin"))))
    if labels is not None:
        e = e + w["label_emb.weight"][labels]

    def res(name: str, x: Tensor, resize: str = "") -> Tensor:
        h = F.silu(_norm(w, f"{name}.in_layers.0", x))
        if resize:
            h, x = (F.avg_pool2d(y, 2) if resize == "down" else F.interpolate(y, scale_factor=2.0) for y in (h, x))
        h = _conv(w, f"{name}.in_layers.2", h)
        condition = _linear(w, f"{name}.emb_layers.1", F.silu(e))[:, :, None, None]
        if condition.shape[1] == 2 * h.shape[1]:
            scale, shift = condition.chunk(2, dim=1)
            h = _norm(w, f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = _norm(w, f"{name}.out_layers.0", h + condition)
        h = _conv(w, f"{name}.out_layers.3", F.silu(h))
        return h + (_conv(w, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in w else x)

    def attention(name: str, x: Tensor) -> Tensor:
        rows = F.conv1d(_norm(w, f"{name}.norm", x).flatten(2), w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
        width = x.shape[1]
        heads = num_heads or width // head_channels
        order = (len(x), 3, heads, -1, rows.shape[2]) if new_order else (len(x), heads, 3, -1, rows.shape[2])
        q, k, v = rows.reshape(order).unbind(1 if new_order else 2)  # (B, heads, C / heads, N)
        scores = torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(width // heads)
        mixed = torch.einsum("bhij,bhcj->bhci", scores.softmax(-1), v).reshape(len(x), width, -1)
        return x + F.conv1d(mixed, w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"]).reshape(x.shape)

    def run(block: str, x: Tensor, resize: str = "") -> Tensor:
        for j in range(3):
            name = f"{block}.{j}"
            if f"{name}.in_layers.0.weight" in w:
                is_resize = resize and (j or block.startswith("input"))
                x = res(name, x, resize if is_resize else "")
            elif f"{name}.qkv.weight" in w:
                x = attention(name, x)
            elif f"{name}.op.weight" in w:
                x = _conv(w, f"{name}.op", x, stride=2)
            elif f"{name}.conv.weight" in w:
                x = _conv(w, f"{name}.conv", F.interpolate(x, scale_factor=2.0))
            elif f"{name}.weight" in w:
                x = _conv(w, name, x)
        return x

    ups = [k for k in range(99) if any(f"output_blocks.{k}.{j}.in_layers.0.weight" in w for j in (1, 2))]
    every = ups[0] + 1 if ups else 0
    skips, k = [], 0
    while any(name.startswith(f"input_blocks.{k}.") for name in w):
        x = run(f"input_blocks.{k}", x, "down" if every and k and k % every == 0 else "")
        skips.append(x)
        k += 1
    x, k = run("middle_block", x), 0
    while any(name.startswith(f"output_blocks.{k}.") for name in w):
        x = run(f"output_blocks.{k}", torch.cat((x, skips.pop()), dim=1), "up")
        k += 1
    return _conv(w, "out.2", F.silu(_norm(w, "out.0", x)))


# --- w86763777/pytorch-ddpm ---


def w86763777(  # noqa: C901
    base: int = 32,
    mults: Sequence[int] = (1, 2),
    blocks: int = 2,
    attending: Sequence[int] = (1,),
    timesteps: int = 100,
) -> Weights:
    """Weights as `net_model` of ckpt.pt holds them."""
    make, features = Layers(), 4 * base

    def res(name: str, before: int, after: int, attends: bool) -> None:
        make.norm(f"{name}.block1.0", before)
        make.layer(f"{name}.block1.2", after, before, 3, 3)
        make.layer(f"{name}.temb_proj.1", after, features)
        make.norm(f"{name}.block2.0", after)
        make.layer(f"{name}.block2.3", after, after, 3, 3)
        if before != after:
            make.layer(f"{name}.shortcut", after, before, 1, 1)
        if attends:
            make.norm(f"{name}.attn.group_norm", after)
            for part in ("proj_q", "proj_k", "proj_v", "proj"):
                make.layer(f"{name}.attn.{part}", after, after, 1, 1)

    make.weights["time_embedding.timembedding.0.weight"] = table(timesteps, base)
    make.layer("time_embedding.timembedding.1", features, base)
    make.layer("time_embedding.timembedding.3", features, features)
    make.layer("head", base, 3, 3, 3)
    width, skips, number = base, [base], 0
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            res(f"downblocks.{number}", width, base * mult, level in attending)
            width = base * mult
            skips.append(width)
            number += 1
        if level < len(mults) - 1:
            make.layer(f"downblocks.{number}.main", width, width, 3, 3)
            skips.append(width)
            number += 1
    res("middleblocks.0", width, width, True)
    res("middleblocks.1", width, width, False)
    number = 0
    for level, mult in reversed(list(enumerate(mults))):
        for _ in range(blocks + 1):
            res(f"upblocks.{number}", width + skips.pop(), base * mult, level in attending)
            width = base * mult
            number += 1
        if level:
            make.layer(f"upblocks.{number}.main", width, width, 3, 3)
            number += 1
    make.norm("tail.0", width)
    make.layer("tail.2", 3, width, 3, 3)
    return make.weights


def table(timesteps: int, features: int) -> Tensor:
    """Its embeddings of timesteps: sin, cos, sin, cos, …"""
    return _waves(torch.arange(timesteps), features, "sin, cos").unflatten(1, (2, -1)).transpose(1, 2).flatten(1)


def w86763777_output(w: Weights, x: Tensor, t: Tensor) -> Tensor:
    """The network's output."""
    time = "time_embedding.timembedding"
    e = _linear(w, f"{time}.3", F.silu(_linear(w, f"{time}.1", w[f"{time}.0.weight"][t])))

    def res(name: str, x: Tensor) -> Tensor:
        h = _conv(w, f"{name}.block1.2", F.silu(_norm(w, f"{name}.block1.0", x)))
        h = h + _linear(w, f"{name}.temb_proj.1", F.silu(e))[:, :, None, None]
        h = _conv(w, f"{name}.block2.3", F.silu(_norm(w, f"{name}.block2.0", h)))
        h = h + (_conv(w, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)
        if f"{name}.attn.proj.weight" not in w:
            return h
        normed = _norm(w, f"{name}.attn.group_norm", h)
        q, k, v = (_conv(w, f"{name}.attn.{part}", normed).flatten(2) for part in ("proj_q", "proj_k", "proj_v"))
        scores = (q.transpose(1, 2) @ k / math.sqrt(h.shape[1])).softmax(-1)
        return h + _conv(w, f"{name}.attn.proj", (v @ scores.transpose(1, 2)).reshape(h.shape))

    x = _conv(w, "head", x)
    skips, k = [x], 0
    while any(name.startswith(f"downblocks.{k}.") for name in w):
        name = f"downblocks.{k}"
        x = _conv(w, f"{name}.main", x, stride=2) if f"{name}.main.weight" in w else res(name, x)
        skips.append(x)
        k += 1
    x, k = res("middleblocks.1", res("middleblocks.0", x)), 0
    while any(name.startswith(f"upblocks.{k}.") for name in w):
        name = f"upblocks.{k}"
        if f"{name}.main.weight" in w:
            x = _conv(w, f"{name}.main", F.interpolate(x, scale_factor=2.0))
        else:
            x = res(name, torch.cat((x, skips.pop()), dim=1))
        k += 1
    return _conv(w, "tail.2", F.silu(_norm(w, "tail.0", x)))


# --- both ---


def _waves(t: Tensor, features: int, order: str) -> Tensor:
    half = features // 2
    angles = t[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    waves = {"sin": angles.sin(), "cos": angles.cos()}
    return torch.cat([waves[name] for name in order.split(", ")], dim=1)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _conv(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], stride=stride, padding=weight.shape[2] // 2)
