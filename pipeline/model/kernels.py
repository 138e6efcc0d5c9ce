"""Operations of the network in the form that the device at hand computes fastest; the numbers mean the same.

On a CPU, torch's own kernels for some of them are far from what the processor can do, mostly in 16 bits. What they gain
was measured on one core of an AMD EPYC with AVX-512 (docs/performance.md).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from torch import Tensor, nn

from pipeline.model.lean import LeanConv2d

_MOST_TOKENS = 1024  # of all heads; beyond it, holding the scores of all pairs takes more time and memory than it saves
_LEAST_DOUBLED = 64  # pixels; below it, summing weights takes longer than the products it saves


def on_cpu(x: Tensor) -> bool:
    """Whether the forms for a CPU are wanted."""
    return x.device.type == "cpu"


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(B, C, H, W) → the same shape and dtype, with weight and bias (C,); the statistics of 16 bits are float32."""
    # Channels-last, the 16-bit kernel of a CPU takes four times as long as the other.
    dtype = _at_least_float32(x.dtype) if on_cpu(x) else x.dtype
    return F.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def convolve_doubled(x: Tensor, conv: LeanConv2d) -> Tensor:
    """Every pixel twice in each direction, then a 3x3 convolution: (B, C, H, W) → (B, C', 2H, 2W)."""
    if not on_cpu(x) or x.shape[2] * x.shape[3] < _LEAST_DOUBLED:
        return conv(x, prepare=lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]
    # Of the nine pixels under a kernel four differ at most, so sums of weights do with 4/9 of the products.
    weight = conv.weight.flip(2, 3).transpose(0, 1)
    weights = sum(F.pad(weight, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1))
    return F.conv_transpose2d(x, cast(Tensor, weights), conv.bias, stride=2, padding=1)


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer over the channels: (B, C, H, W) → (B, C', H, W)."""
    if on_cpu(x):  # oneDNN, which convolves, has AVX-512 for every maker's processors; MKL, which multiplies, has not
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
    projected: Tensor = layer(x.flatten(2).transpose(1, 2))
    return projected.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, heads, N, D) over the N tokens, in the same shape."""
    # With one wide head, oneDNN's products take a third to two thirds of the time of the CPU's fused kernel.
    if on_cpu(q) and q.element_size() == 2 and q.shape[1] * q.shape[2] <= _MOST_TOKENS:
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        attended: Tensor = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return attended
    return F.scaled_dot_product_attention(q, k, v)


def dropout(x: Tensor, p: float) -> Tensor:
    """Each element 0 with probability p, on a CPU to the nearest 1/65536, or divided by 1 - p; x without gaps."""
    if not on_cpu(x) or not 0 < p < 1:
        return F.dropout(x, p)
    # Four elements share a 64-bit number; torch draws one for each.
    drawn = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
    lot = drawn.view(torch.int16)[: x.numel()].as_strided(x.shape, x.stride())
    kept = (lot >= min(round(p * 65536), 65535) - 32768).view(torch.uint8)  # whose way to bfloat16 is vectorised
    return x * (kept.to(x.dtype) / (1 - p))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
