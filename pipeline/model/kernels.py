"""Operations of the network in the form that is fastest on the current device; results agree up to rounding.

On a CPU, some of torch's own kernels are far slower than the processor allows, mostly in 16 bits. The gains were
measured on one core of an AMD EPYC with AVX-512 (docs/performance.md).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from torch import Tensor, nn

from pipeline.model.recompute import RecomputeConv2d

_MOST_TOKENS = 1024  # of all heads; with more tokens, storing the scores of all pairs costs more than it saves
_LEAST_DOUBLED = 64  # pixels; with fewer, summing weights takes longer than the multiplications it saves


def on_cpu(x: Tensor) -> bool:
    """Whether to use the forms for a CPU."""
    return x.device.type == "cpu"


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(B, C, H, W) → the same shape and dtype, with weight and bias (C,); the statistics of 16 bits are float32."""
    # In channels-last layout, the 16-bit CPU kernel takes four times as long as the float32 one.
    dtype = _at_least_float32(x.dtype) if on_cpu(x) else x.dtype
    return F.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def convolve_doubled(x: Tensor, conv: RecomputeConv2d) -> Tensor:
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution: (B, C, H, W) → (B, C', 2H, 2W)."""
    if not on_cpu(x) or x.shape[2] * x.shape[3] < _LEAST_DOUBLED:
        return conv(x, prepare=lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]
    # At most four of the nine pixels under a kernel differ, so sums of weights need only 4/9 of the multiplications.
    weight = conv.weight.flip(2, 3).transpose(0, 1)
    weights = sum(F.pad(weight, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1))
    return F.conv_transpose2d(x, cast(Tensor, weights), conv.bias, stride=2, padding=1)


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer over the channels: (B, C, H, W) → (B, C', H, W)."""
    if on_cpu(x):  # oneDNN (convolution) uses AVX-512 on all processors, MKL (matrix product) only on some
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
    projected: Tensor = layer(x.flatten(2).transpose(1, 2))
    return projected.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, heads, N, D) over the N tokens, in the same shape."""
    # With one wide head, two matrix products take a third to two thirds of the time of the CPU's fused kernel.
    if on_cpu(q) and q.element_size() == 2 and q.shape[1] * q.shape[2] <= _MOST_TOKENS:
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        attended: Tensor = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return attended
    return F.scaled_dot_product_attention(q, k, v)


def dropout(x: Tensor, p: float) -> Tensor:
    """Set each element to 0 with probability p (on a CPU rounded to 1/65536), else divide it by 1 - p; x is dense."""
    if not on_cpu(x) or not 0 < p < 1:
        return F.dropout(x, p)
    # Four elements share one random 64-bit number; torch would draw one for each element.
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
    dropout_draw = words.view(torch.int16)[: x.numel()].as_strided(x.shape, x.stride())
    is_kept = dropout_draw >= min(round(p * 65536), 65535) - 32768
    return x * (is_kept.view(torch.uint8).to(x.dtype) / (1 - p))  # uint8: its cast to bfloat16 is vectorised


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
