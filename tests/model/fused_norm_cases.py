"""The fused norm against torch's operations in float64. `test_fused_norm.py` runs this file in a process of its own.

Triton reads TRITON_INTERPRET once, when it is imported. DEVICE (cpu or cuda) is the device.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model import fused_norm
from pipeline.model.blocks import GroupNorm, ResidualBlock
from pipeline.model.recompute import RecomputeConv2d

DEVICE = os.environ["DEVICE"]
SUM = 32 * torch.finfo(torch.float32).eps
"""Error of a float32 sum over some hundred terms, relative to the largest value."""


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding; the interpreter cuts the last bits of bf16 off."""
    return torch.finfo(dtype).eps / (1 if DEVICE == "cpu" else 2)


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(dtype: torch.dtype, shape: tuple[int, int, int, int], affine: bool, mean: float = 1.0) -> list[Tensor]:
    """x in channels-last, weight, bias, and with `affine` scale and shift."""
    x = (2 * noise(*shape, seed=0) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    rows = [noise(shape[1], seed=seed) for seed in (1, 2)]
    rows += [noise(shape[0], shape[1], 1, 1, seed=seed, dtype=dtype) for seed in (3, 4)] if affine else []
    return [tensor.requires_grad_() for tensor in (x, *rows)]


def eager(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *affine: Tensor) -> Tensor:
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x * affine[0] + affine[1] if affine else x)


def results(form: Callable[..., Tensor], tensors: Sequence[Tensor], groups: int, eps: float = 1e-6) -> list[Tensor]:
    """y, and the gradients of all tensors."""
    x, weight, bias, *affine = tensors
    y = form(x, groups, weight, bias, eps, *affine)
    return [y.detach(), *torch.autograd.grad(y, tensors, noise(*x.shape, seed=5, dtype=x.dtype))]


def check(tensors: list[Tensor], groups: int, eps: float = 1e-6, factor: float = 1) -> None:
    got = results(fused_norm.group_norm_silu, tensors, groups, eps)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    # The same gradient of y: float64 values of what was rounded to the dtype of x.
    y = eager(exact[0], groups, exact[1], exact[2], eps, *exact[3:])
    gradient = noise(*y.shape, seed=5, dtype=tensors[0].dtype).double()
    expected = [y.detach(), *torch.autograd.grad(y, exact, gradient)]
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for a, b, like in zip(got, expected, [tensors[0], *tensors]):
        assert (a.dtype, a.shape) == (like.dtype, like.shape)
        atol = factor * SUM * max(b.abs().max().item(), 1e-6)
        torch.testing.assert_close(a.double(), b, rtol=rounding(a.dtype), atol=atol)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 72, 9, 11), 6), ((3, 12, 1, 1), 4), ((1, 8, 5, 3), 8), ((2, 1, 1, 1), 1), ((1, 3, 37, 41), 1)],
    ids=["parts of tiles", "one pixel", "one channel a group", "one value a group", "one group"],
)
def test_values_and_gradients(dtype: torch.dtype, affine: bool, shape: tuple[int, int, int, int], groups: int) -> None:
    check(inputs(dtype, shape, affine), groups, eps=1e-3)


def test_float16_has_the_same_kernels() -> None:
    check(inputs(torch.float16, (2, 6, 4, 5), True), 2)


def test_a_mean_far_from_zero_does_not_spoil_the_variance() -> None:
    """A sum of squares would lose all digits: x² is 1e8, its last bit 8, the variance 4."""
    mean = 1e4  # one rounding of x - mean loses 1e4 / 2 of the digits of float32
    check(inputs(torch.float32, (2, 4, 24, 24), False, mean), 2, factor=mean / 2 / 8)


def test_equal_values_have_no_variance() -> None:
    tensors = inputs(torch.float32, (2, 6, 5, 5), True)
    with torch.no_grad():
        tensors[0].fill_(3.0)
    y, to_x, to_weight, *others = results(fused_norm.group_norm_silu, tensors, 2)
    _, _, bias, scale, shift = tensors
    torch.testing.assert_close(y, F.silu(bias[None, :, None, None] * scale + shift).expand_as(y), rtol=SUM, atol=SUM)
    assert not to_weight.any() and all(tensor.isfinite().all() for tensor in (to_x, *others))


def test_other_layouts_are_copied() -> None:
    tensors = inputs(torch.float32, (2, 6, 4, 5), True)
    in_order = [tensor.detach().contiguous().requires_grad_() for tensor in tensors]
    for a, b in zip(*(results(fused_norm.group_norm_silu, each, 3) for each in (tensors, in_order))):
        assert torch.equal(a, b)


def test_the_same_input_gives_the_same_bits() -> None:
    tensors = inputs(torch.bfloat16, (2, 72, 9, 11), True)
    for a, b in zip(*(results(fused_norm.group_norm_silu, tensors, 6) for _ in range(2))):
        assert torch.equal(a, b)


def test_the_compiler_takes_it_into_its_graph() -> None:
    tensors = inputs(torch.float32, (2, 6, 4, 5), True)
    compiled = torch.compile(fused_norm.group_norm_silu, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(results(form, tensors, 3) for form in (compiled, fused_norm.group_norm_silu))):
        torch.testing.assert_close(a, b, rtol=SUM, atol=SUM)


def block(*, scale_shift: bool, recompute: bool, fused: bool) -> ResidualBlock:
    torch.manual_seed(0)
    made = ResidualBlock(6, 12, embedding=8, groups=3, eps=1e-6, dropout=0.0, scale_shift=scale_shift)
    nn.init.xavier_uniform_(made.conv2.weight)  # at first almost zero, which would hide the second norm
    for module in made.modules():
        if isinstance(module, GroupNorm):
            nn.init.normal_(module.weight)
            module.fused = fused_norm.group_norm_silu if fused else None
        if isinstance(module, RecomputeConv2d):
            module.recompute = recompute
    return made.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def block_results(network: ResidualBlock, dtype: torch.dtype) -> list[Tensor]:
    """Its output and all gradients; x in two parts, as on the way up."""
    first, second = (
        noise(2, channels, 6, 5, seed=channels, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for channels in (4, 2)
    )
    embedding = noise(2, 8, seed=7)
    leaves = [tensor.requires_grad_() for tensor in (embedding, first, second)]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = network(*leaves)
    gradient = noise(*y.shape, seed=8, dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *network.parameters()], gradient)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_block_is_the_same(dtype: torch.dtype, scale_shift: bool, recompute: bool) -> None:
    """Within a float32 sum and 4 roundings: a result passes two norms, which the eager form rounds four times."""
    plain, fused = (
        block_results(block(scale_shift=scale_shift, recompute=recompute, fused=fused), dtype)
        for fused in (False, True)
    )
    for a, b in zip(fused, plain):
        assert a.dtype == b.dtype and a.is_contiguous() == b.is_contiguous()
        assert (a.double() - b.double()).norm() <= (4 * torch.finfo(dtype).eps + SUM) * b.double().norm()


def test_recomputation_changes_no_bit_and_copies_keep_the_kernels() -> None:
    kept = copy.deepcopy(block(scale_shift=True, recompute=False, fused=True))
    recomputed = block(scale_shift=True, recompute=True, fused=True)
    assert kept.norm1.fused is fused_norm.group_norm_silu
    for a, b in zip(*(block_results(network, torch.float32) for network in (kept, recomputed))):
        assert torch.equal(a, b)
