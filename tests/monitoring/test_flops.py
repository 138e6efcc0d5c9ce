"""Arithmetic counted by what it is, and what devices can do, by the names that CUDA gives them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.monitoring.flops import flops_of, peak_flop_per_s, peak_of


def test_a_convolution_and_its_two_gradients_are_counted() -> None:
    conv, x = nn.Conv2d(4, 8, 3, padding=1), torch.zeros(2, 4, 6, 6, requires_grad=True)
    forward = 2 * (2 * 6 * 6) * 8 * (4 * 3 * 3)
    assert flops_of(lambda: conv(x)) == forward
    assert flops_of(lambda: conv(x).sum().backward()) == 3 * forward


def test_attention_is_counted_whatever_its_kernel() -> None:
    q = torch.zeros(1, 2, 16, 8)
    assert flops_of(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 16 * 16 * 8)


@pytest.mark.parametrize(("name", "tflop_per_s"), [
    ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250),
])  # fmt: skip
def test_known_devices_have_their_makers_figure(name: str, tflop_per_s: float) -> None:
    assert peak_of(name) == tflop_per_s * 1e12


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "A1000"])
def test_other_devices_have_none_rather_than_a_wrong_one(name: str) -> None:
    assert peak_of(name) is None
    assert peak_flop_per_s(torch.device("cpu")) is None
