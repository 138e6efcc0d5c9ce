"""The layers of the U-Net: residual blocks, attention, up- and downsampling.

Shapes: B images, C channels, H and W pixels, N = H·W tokens, E features of the embedding of time and class. Under
autocast the convolutions run in 16 bits; the embedding and the statistics of GroupNorm and softmax are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from torch import Tensor, nn

from pipeline.model import kernels
from pipeline.model.recompute import RecomputeConv2d

_NEAR_ZERO = 1e-10  # scale of the last layer of a residual branch, which then starts as the identity


_Layer = TypeVar("_Layer", bound=nn.Conv2d | nn.Linear)


class Float32Linear(nn.Linear):
    """A linear layer that stays float32 under autocast, because embeddings of neighbouring timesteps differ little."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out) in the dtype of the weights."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """Group normalisation that stays in the dtype of its input.

    The kernels compute statistics of 16-bit input in float32. Autocast would also store the whole result in float32.

    Attributes:
        fused: computes norm, scale, shift and SiLU in one operation, as `fused_norm.group_norm_silu`; None: one by one.
    """

    fused: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(B, C, H, W) → the same shape and dtype; weight and bias, (C,), replace the layer's own if given."""
        weight, bias = self.weight if weight is None else weight, self.bias if bias is None else bias
        with torch.autocast(x.device.type, enabled=False):
            return kernels.group_norm(x, self.num_groups, weight, bias, self.eps)

    def activated(self, x: Tensor, weight: Tensor, bias: Tensor, *affine: Tensor) -> Tensor:
        """Norm, scale and shift if given, (B, C, 1, 1), and SiLU: (B, C, H, W) → the same shape and dtype."""
        if self.fused is not None:
            return self.fused(x, self.num_groups, weight, bias, self.eps, *affine)
        x = self(x, weight, bias)
        if affine:
            scale, shift = affine
            x = x * scale + shift
        return F.silu(x)


class Dropout(nn.Dropout):
    """Dropout, with the random generator that is fastest on the device."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same."""
        return kernels.dropout(x, self.p) if self.training else x


class ResidualBlock(nn.Module):
    """Two convolutions with normalization and a shortcut; the embedding is added between the convolutions.

    With `resample` the images are halved or doubled before the first convolution and in the shortcut (Brock et al.
    2019, arXiv:1809.11096, figure 15).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding: int,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = glorot(RecomputeConv2d(in_channels, out_channels, 3, padding=1))
        self.embed = glorot(Float32Linear(embedding, 2 * out_channels if scale_shift else out_channels))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = Dropout(dropout)
        self.conv2 = glorot(RecomputeConv2d(out_channels, out_channels, 3, padding=1), _NEAR_ZERO)
        self.shortcut = (
            glorot(RecomputeConv2d(in_channels, out_channels, 1)) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, embedding: Tensor, *parts: Tensor) -> Tensor:
        """Embedding (B, E) and features (B, C, H, W), in two parts on the way up, → (B, C', H, W)."""
        if not self.conv1.recompute:
            parts = (_join(*parts),)  # otherwise autograd would store two copies
        # Computed first, so that its gradient, as wide as the parts, is computed last, when less is alive.
        if isinstance(self.shortcut, RecomputeConv2d):
            shortcut: Tensor = self.shortcut(*parts, prepare=_join if len(parts) > 1 else None)
        else:
            shortcut = _join(*parts)
        shortcut = _resampled(shortcut, self.resample)
        h = _activated(self.conv1, self.norm1, *parts, resample=self.resample)
        condition: Tensor = self.embed(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            affine: tuple[Tensor, ...] = ((1 + scale).to(h.dtype), shift.to(h.dtype))
        else:
            h, affine = h + condition.to(h.dtype), ()
        return shortcut + _activated(self.conv2, self.norm2, h, affine=affine, dropout=self.dropout)


def _activated(
    conv: RecomputeConv2d,
    norm: GroupNorm,
    *parts: Tensor,
    affine: tuple[Tensor, ...] = (),
    dropout: Callable[[Tensor], Tensor] | None = None,
    resample: Literal["down", "up"] | None = None,
) -> Tensor:
    """Concatenation, normalization, scale and shift, SiLU, resampling, dropout (each if given), convolution."""
    count = len(parts)

    def prepare(*inputs: Tensor) -> Tensor:
        weight, bias, *affine = inputs[count:]
        x = _resampled(norm.activated(_join(*inputs[:count]), weight, bias, *affine), resample)
        return dropout(x) if dropout else x

    convolved: Tensor = conv(*parts, norm.weight, norm.bias, *affine, prepare=prepare)
    return convolved


def _resampled(x: Tensor, how: Literal["down", "up"] | None) -> Tensor:
    """(B, C, H, W) → H/2 and W/2 by averages, 2H and 2W by repetition, or as it is."""
    if how is None:
        return x
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class Attention(nn.Module):
    """Self-attention over all pixels, with a shortcut."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps)
        self.qkv = glorot(nn.Linear(channels, 3 * channels), parts=3)
        self.out = glorot(nn.Linear(channels, channels), _NEAR_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        tokens = kernels.project(self.norm(x), self.qkv).flatten(2).transpose(1, 2)  # (B, N, 3C)
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in tokens.chunk(3, dim=2))
        attended = kernels.attend(q, k, v).transpose(1, 2).flatten(2)  # (B, heads, N, C/heads) → (B, N, C)
        return x + kernels.project(attended.transpose(1, 2).reshape(x.shape), self.out)


class Downsample(nn.Module):
    """A convolution of stride 2.

    Padding 0 pads only on the right and at the bottom, like TensorFlow's SAME; padding 1 on all sides.
    """

    def __init__(self, channels: int, padding: int = 0) -> None:
        super().__init__()
        self.conv = glorot(RecomputeConv2d(channels, channels, 3, stride=2, padding=padding))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H/2, W/2)."""
        pad = None if self.conv.padding[0] else lambda x: F.pad(x, (0, 1, 0, 1))
        halved: Tensor = self.conv(x, prepare=pad)
        return halved


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = glorot(RecomputeConv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 2H, 2W)."""
        return kernels.convolve_doubled(x, self.conv)


class Head(nn.Module):
    """The output layer: features → prediction."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps)
        self.conv = glorot(RecomputeConv2d(channels, out_channels, 3, padding=1), _NEAR_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H, W)."""
        return _activated(self.conv, self.norm, x)


def glorot(layer: _Layer, scale: float = 1.0, parts: int = 1) -> _Layer:
    """Initialize: uniform weights of variance scale / mean(fan-in, fan-out), as in the original code; zero bias.

    `parts` layers may be stored as one, along the outputs; each part has its own fan-out.
    """
    assert layer.bias is not None
    for part in layer.weight.chunk(parts):
        nn.init.xavier_uniform_(part, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer
