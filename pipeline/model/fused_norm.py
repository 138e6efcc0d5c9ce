"""GroupNorm, scale, shift and SiLU in one operation, as Triton kernels for features in channels-last layout.

With x̂ = (x - mean) / sqrt(variance + eps) of a group of channels of one image, y = SiLU(x̂ · scale + shift). The forward
pass reads x twice and writes y. The backward pass keeps x and the statistics, computes the rest again, reads x and the
gradient of y twice, and writes the gradient of x.

Shapes: B images, C channels, P = H·W pixels, G groups of D = C / G channels. A tile is a part of the pixels of one
image and a part of the channels; K tiles cover the pixels. The kernels compute in float32. Each sum has a fixed order
(first in a tile, then over the tiles), so the same input gives the same bits. For autograd and the compiler each pass
is one operator, so the compiler takes it into its graph and does not look inside.

This module needs the package triton; import it only where `train.fused_norm` is on. With `TRITON_INTERPRET=1`, set
before the import, the kernels also run on a CPU, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements: 32 for each thread of 4 warps, so that a tile stays in registers
_TILE_CHANNELS = 64  # a row of a tile in 16 bits is 128 bytes, a cache line


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """SiLU(GroupNorm(x) · scale + shift), with gradients of all tensors.

    Args:
        x: (B, C, H, W), float32 or 16 bits; another layout than channels-last is copied.
        groups: G, which divides C.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
        scale: (B, C, 1, 1), one value for each image and channel; None: no scale and no shift.
        shift: as scale.

    Returns:
        The shape and dtype of x, channels-last.
    """
    with torch.autocast(x.device.type, enabled=False):
        # Norm and condition are one product and one sum for each image and channel, computed in float32.
        scale_of_all, shift_of_all = (row.float().expand(x.shape[0], -1) for row in (weight, bias))
        if scale is not None and shift is not None:
            scale, shift = scale.flatten(1).float(), shift.flatten(1).float()
            scale_of_all, shift_of_all = scale_of_all * scale, torch.addcmul(shift, shift_of_all, scale)
        y: Tensor = _forward(_channels_last(x), scale_of_all, shift_of_all, groups, eps)[0]
    return y


@torch.library.custom_op("ddpm::group_norm_silu", mutates_args=())
def _forward(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """From x in channels-last, scale and shift, (B, C) float32: y, and mean and 1 / sqrt(variance + eps), (B, G)."""
    batch, channels, pixels, tiles, blocks, grid = _layout(x)
    partial = torch.empty((2, batch, tiles, channels), device=x.device)
    mean, inverse_std = (torch.empty((batch, groups), device=x.device) for _ in range(2))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    sizes = (channels, pixels, channels // groups)
    _tile_statistics[grid](x, partial[0], partial[1], channels, pixels, **blocks)
    _group_statistics[(groups, batch)](
        partial[0], partial[1], mean, inverse_std, *sizes, eps, blocks["tile_p"], **_group_blocks(sizes[2])
    )
    _normalize[grid](x, mean, inverse_std, scale, scale.stride(0), shift, shift.stride(0), y, *sizes, **blocks)
    return y, mean, inverse_std


@_forward.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), mean, torch.empty_like(mean)


@torch.library.custom_op("ddpm::group_norm_silu_backward", mutates_args=())
def _backward(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of y, and what the forward pass kept → the gradients of x, and of scale and shift, (B, C)."""
    batch, channels, pixels, tiles, blocks, grid = _layout(x)
    groups = mean.shape[1]
    partial = torch.empty((2, batch, tiles, channels), device=x.device)
    to_scale, to_shift = (torch.empty((batch, channels), device=x.device) for _ in range(2))
    mean_product, mean_gradient = torch.empty_like(mean), torch.empty_like(mean)
    to_x = torch.empty_like(x, memory_format=torch.channels_last)
    sizes = (channels, pixels, channels // groups)
    inputs = (gradient, x, mean, inverse_std, scale, scale.stride(0), shift, shift.stride(0))
    _tile_gradients[grid](*inputs, partial[0], partial[1], *sizes, **blocks)
    _group_gradients[(groups, batch)](
        partial[0], partial[1], scale, scale.stride(0), to_scale, to_shift, mean_product, mean_gradient, *sizes, tiles,
        **_group_blocks(sizes[2]),
    )  # fmt: skip
    _input_gradient[grid](*inputs, mean_product, mean_gradient, to_x, *sizes, **blocks)
    return to_x, to_scale, to_shift


@_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    to_scale = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), to_scale, torch.empty_like(to_scale)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, shift, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], scale, shift)


def _gradients(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(_channels_last(gradient), *ctx.saved_tensors), None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _layout(x: Tensor) -> tuple[int, int, int, int, dict[str, int], tuple[int, int, int]]:
    """B, C, P, K, and the size of a tile and the grid of all tiles."""
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    tile_channels = min(triton.next_power_of_2(channels), _TILE_CHANNELS)
    tile_pixels = min(triton.next_power_of_2(pixels), _TILE // tile_channels)
    tiles = triton.cdiv(pixels, tile_pixels)
    grid = (tiles, triton.cdiv(channels, tile_channels), batch)
    return batch, channels, pixels, tiles, {"tile_p": tile_pixels, "tile_c": tile_channels}, grid


def _group_blocks(group_channels: int) -> dict[str, int]:
    """How many tiles and channels of a group the second stage of a sum reads at once."""
    block = triton.next_power_of_2(group_channels)
    return {"block_k": max(1, _TILE // 4 // block), "block_d": block}


# --- kernels ---
# "row" arguments are the strides of (B, C) arguments over images; 0 if all images share a row.


@triton.jit
def _tile(channels, pixels, tile_p: tl.constexpr, tile_c: tl.constexpr):
    """This program's image and channels, and the offsets and mask of its elements of x, (tile_p, tile_c)."""
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * tile_c + tl.arange(0, tile_c)
    pixel = tl.program_id(0) * tile_p + tl.arange(0, tile_p)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    return image, channel, (image * pixels + pixel)[:, None] * channels + channel[None, :], mask


@triton.jit
def _tile_statistics(x, means, squares, channels, pixels, tile_p: tl.constexpr, tile_c: tl.constexpr):
    """Of each channel of a tile: its mean, and the sum of its squared distances from it; (B, K, C)."""
    image, channel, offset, mask = _tile(channels, pixels, tile_p, tile_c)
    value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
    count = tl.minimum(tile_p, pixels - tl.program_id(0) * tile_p)
    mean = tl.sum(value, 0) / count
    distance = tl.where(mask, value - mean[None, :], 0.0)
    to = (image * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(means + to, mean, channel < channels)
    tl.store(squares + to, tl.sum(distance * distance, 0), channel < channels)


@triton.jit
def _group_statistics(
    means, squares, mean, inverse_std, channels, pixels, group_channels, eps, tile_p,
    block_k: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Join the statistics of a group's tiles and channels, with the counts of their pixels (Chan et al. 1979)."""
    group, image, groups = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    tiles, count = tl.cdiv(pixels, tile_p), pixels * group_channels * 1.0
    d = tl.arange(0, block_d)[None, :]
    start = image * tiles * channels + group * group_channels
    total = tl.zeros((block_k, block_d), tl.float32)
    for first in range(0, tiles, block_k):
        k = first + tl.arange(0, block_k)[:, None]
        mask = (k < tiles) & (d < group_channels)
        total += tl.load(means + start + k * channels + d, mask, other=0.0) * tl.minimum(tile_p, pixels - k * tile_p)
    center = tl.sum(total) / count
    total = tl.zeros((block_k, block_d), tl.float32)
    for first in range(0, tiles, block_k):
        k = first + tl.arange(0, block_k)[:, None]
        mask = (k < tiles) & (d < group_channels)
        distance = tl.load(means + start + k * channels + d, mask, other=0.0) - center
        inside = tl.load(squares + start + k * channels + d, mask, other=0.0)
        total += tl.where(mask, inside + distance * distance * tl.minimum(tile_p, pixels - k * tile_p), 0.0)
    tl.store(mean + image * groups + group, center)
    tl.store(inverse_std + image * groups + group, 1.0 / tl.sqrt(tl.sum(total) / count + eps))


@triton.jit
def _rows(image, channel, mean, inverse_std, scale, scale_row, shift, shift_row, channels, group_channels):
    """Mean, 1 / standard deviation, scale and shift of the channels of a tile, (1, tile_c) each."""
    present, group = channel < channels, image * (channels // group_channels) + channel // group_channels
    return (
        tl.load(mean + group, present, other=0.0)[None, :],
        tl.load(inverse_std + group, present, other=0.0)[None, :],
        tl.load(scale + image * scale_row + channel, present, other=0.0)[None, :],
        tl.load(shift + image * shift_row + channel, present, other=0.0)[None, :],
    )


@triton.jit
def _normalize(
    x, mean, inverse_std, scale, scale_row, shift, shift_row, y, channels, pixels, group_channels,
    tile_p: tl.constexpr, tile_c: tl.constexpr,
):  # fmt: skip
    image, channel, offset, mask = _tile(channels, pixels, tile_p, tile_c)
    center, inverse, by, plus = _rows(
        image, channel, mean, inverse_std, scale, scale_row, shift, shift_row, channels, group_channels
    )
    z = (tl.load(x + offset, mask, other=0.0).to(tl.float32) - center) * inverse * by + plus
    tl.store(y + offset, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask)


@triton.jit
def _before_silu(
    gradient, x, mean, inverse_std, scale, scale_row, shift, shift_row, channels, pixels, group_channels,
    tile_p: tl.constexpr, tile_c: tl.constexpr,
):  # fmt: skip
    """The gradient of SiLU's input, the normalised values, 1 / standard deviation and scale; all of a tile."""
    image, channel, offset, mask = _tile(channels, pixels, tile_p, tile_c)
    center, inverse, by, plus = _rows(
        image, channel, mean, inverse_std, scale, scale_row, shift, shift_row, channels, group_channels
    )
    normalised = (tl.load(x + offset, mask, other=0.0).to(tl.float32) - center) * inverse
    z = normalised * by + plus
    sigmoid = tl.sigmoid(z)
    slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    return tl.load(gradient + offset, mask, other=0.0).to(tl.float32) * slope, normalised, inverse, by


@triton.jit
def _tile_gradients(
    gradient, x, mean, inverse_std, scale, scale_row, shift, shift_row, to_scale, to_shift,
    channels, pixels, group_channels, tile_p: tl.constexpr, tile_c: tl.constexpr,
):  # fmt: skip
    """Of each channel of a tile: its part of the gradients of scale and shift; (B, K, C)."""
    slope, normalised, _inverse, _by = _before_silu(
        gradient, x, mean, inverse_std, scale, scale_row, shift, shift_row, channels, pixels, group_channels,
        tile_p, tile_c,
    )  # fmt: skip
    image, channel, _offset, _mask = _tile(channels, pixels, tile_p, tile_c)
    to = (image * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(to_scale + to, tl.sum(slope * normalised, 0), channel < channels)
    tl.store(to_shift + to, tl.sum(slope, 0), channel < channels)


@triton.jit
def _group_gradients(
    by_tile, sums, scale, scale_row, to_scale, to_shift, mean_product, mean_gradient,
    channels, pixels, group_channels, tiles, block_k: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Sum over tiles; then the means over a group of the gradient of x̂, times x̂ and alone."""
    group, image, groups = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    d = tl.arange(0, block_d)
    start = image * tiles * channels + group * group_channels
    product = tl.zeros((block_k, block_d), tl.float32)
    plain = tl.zeros((block_k, block_d), tl.float32)
    for first in range(0, tiles, block_k):
        k = first + tl.arange(0, block_k)[:, None]
        mask = (k < tiles) & (d < group_channels)[None, :]
        product += tl.load(by_tile + start + k * channels + d[None, :], mask, other=0.0)
        plain += tl.load(sums + start + k * channels + d[None, :], mask, other=0.0)
    of_scale, of_shift, channel = tl.sum(product, 0), tl.sum(plain, 0), group * group_channels + d
    tl.store(to_scale + image * channels + channel, of_scale, d < group_channels)
    tl.store(to_shift + image * channels + channel, of_shift, d < group_channels)
    by = tl.load(scale + image * scale_row + channel, d < group_channels, other=0.0)
    count = pixels * group_channels * 1.0
    tl.store(mean_product + image * groups + group, tl.sum(of_scale * by) / count)
    tl.store(mean_gradient + image * groups + group, tl.sum(of_shift * by) / count)


@triton.jit
def _input_gradient(
    gradient, x, mean, inverse_std, scale, scale_row, shift, shift_row, mean_product, mean_gradient, to_x,
    channels, pixels, group_channels, tile_p: tl.constexpr, tile_c: tl.constexpr,
):  # fmt: skip
    slope, normalised, inverse, by = _before_silu(
        gradient, x, mean, inverse_std, scale, scale_row, shift, shift_row, channels, pixels, group_channels,
        tile_p, tile_c,
    )  # fmt: skip
    image, channel, offset, mask = _tile(channels, pixels, tile_p, tile_c)
    group, present = image * (channels // group_channels) + channel // group_channels, channel < channels
    product = tl.load(mean_product + group, present, other=0.0)[None, :]
    plain = tl.load(mean_gradient + group, present, other=0.0)[None, :]
    result = inverse * (slope * by - plain - normalised * product)
    tl.store(to_x + offset, result.to(to_x.dtype.element_ty), mask)
