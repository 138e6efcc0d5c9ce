"""The forms for a CPU mean what torch's own operations mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model import kernels
from pipeline.model.recompute import RecomputeConv2d

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def images(dtype: torch.dtype, channels: int = 8) -> Tensor:
    x = noise(2, channels, 6, 4, dtype=dtype).detach()
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def same(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], *inputs: Tensor) -> None:
    """In value, dtype, memory format and gradients; 16 bits are measured against float32, to their rounding."""
    got, expected = ours(), theirs()
    assert got.dtype == inputs[0].dtype and got.shape == expected.shape
    weights = noise(*expected.shape, dtype=expected.dtype, seed=9).detach()
    gradients = [torch.autograd.grad((y * weights.to(y.dtype)).sum(), inputs) for y in (got, expected)]
    tolerance = ROUNDING[inputs[0].dtype]
    for tensors in zip([got, *gradients[0]], [expected, *gradients[1]]):
        a, b = (tensor.detach().double() for tensor in tensors)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm(dtype: torch.dtype) -> None:
    x, weight, bias = images(dtype), *(noise(8, dtype=torch.float32, seed=i) for i in (1, 2))
    wide = torch.promote_types(dtype, torch.float32)
    same(
        lambda: kernels.group_norm(x, 4, weight, bias, 1e-6),
        lambda: F.group_norm(x.to(wide), 4, weight.to(wide), bias.to(wide), 1e-6),
        x, weight, bias,
    )  # fmt: skip
    assert kernels.group_norm(x, 4, weight, bias, 1e-6).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 8), (16, 4), (2, 3)])
def test_a_convolution_of_doubled_pixels(dtype: torch.dtype, size: tuple[int, int]) -> None:
    x = noise(2, 5, *size, dtype=dtype).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    conv = RecomputeConv2d(5, 7, 3, padding=1).to(dtype)
    same(
        lambda: kernels.convolve_doubled(x, conv),
        lambda: F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=1),
        x, conv.weight, conv.bias,
    )  # fmt: skip
    assert kernels.convolve_doubled(x, conv).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_over_the_channels(dtype: torch.dtype) -> None:
    x, layer = images(dtype), nn.Linear(8, 12).to(dtype)
    same(
        lambda: kernels.project(x, layer),
        lambda: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        x, layer.weight, layer.bias,
    )  # fmt: skip
    assert kernels.project(x, layer).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype) -> None:
    q, k, v = (noise(2, 3, 24, 16, dtype=dtype, seed=seed) for seed in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    same(
        lambda: kernels.attend(q, k, v),
        lambda: F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide)),
        q, k, v,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["group_norm", "convolve_doubled", "project", "attend"])
def test_other_devices_take_another_form_with_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer, conv = images(torch.float32), nn.Linear(8, 12), RecomputeConv2d(8, 8, 3, padding=1)
    wide = x.repeat(1, 1, 2, 2)
    q = noise(2, 3, 24, 16, dtype=torch.float32)
    weight, bias = torch.ones(8), torch.zeros(8)
    call: Callable[[], Tensor] = {
        "group_norm": lambda: kernels.group_norm(x, 4, weight, bias, 1e-6),
        "convolve_doubled": lambda: kernels.convolve_doubled(wide, conv),
        "project": lambda: kernels.project(x, layer),
        "attend": lambda: kernels.attend(q, q, q),
    }[name]
    here = call()
    monkeypatch.setattr(kernels, "on_cpu", lambda x: False)
    torch.testing.assert_close(call(), here)


def test_attention_to_many_tokens_does_not_hold_the_scores_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest: taken.append(q.shape[2]) or fused(q, *rest))
    for heads, tokens in ((1, 1024), (1, 1025), (4, 256), (4, 257)):
        q = torch.zeros(1, heads, tokens, 4, dtype=torch.bfloat16)
        kernels.attend(q, q, q)
    assert taken == [1025, 257]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_the_share(dtype: torch.dtype, p: float) -> None:
    x = torch.ones(3, 5, 111, 131, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(0)
    y = kernels.dropout(x, p)
    dropped = (y == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)  # five standard deviations
    assert y.dtype == dtype and y.stride() == x.stride()
    torch.testing.assert_close(y[y != 0].detach(), torch.full_like(y[y != 0].detach(), 1 / (1 - p)))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())


def test_dropout_is_independent_for_each_element_and_repeats_with_the_seed() -> None:
    x = torch.ones(64, 64, 8, 8)
    torch.manual_seed(3)
    first, second = kernels.dropout(x, 0.5), kernels.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, kernels.dropout(x, 0.5)) and not torch.equal(first, second)
    kept = (first != 0).double().flatten() - 0.5
    for distance in (1, 2, 3, 4, 8, 64, 4096):  # four places share a random number
        assert abs((kept[distance:] * kept[:-distance]).mean().item()) < 5 * 0.25 / x.numel() ** 0.5


def test_dropout_of_nearly_all() -> None:
    assert (kernels.dropout(torch.ones(2, 3, 64, 64), 1 - 1e-6) == 0).double().mean() > 0.999


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p: float) -> None:
    x = torch.ones(2, 3, 4, 4)
    assert torch.equal(kernels.dropout(x, p), x * (1 - p))
