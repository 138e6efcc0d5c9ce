"""Floating-point operations of a step, and the peak rate of a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOP_PER_S = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Part of a CUDA device name → dense bfloat16 TFLOP/s with float32 sums, from the data sheets of the vendors."""


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and convolutions of a call; a multiply-add counts as two."""
    # Attention as plain matrix products: torch does not count the fused kernels of some devices.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def peak_flop_per_s(device: torch.device) -> float | None:
    """Peak bfloat16 rate of a device; None if it is unknown."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Peak bfloat16 rate of a device by its name; None if it is unknown, as for parts of a device (MIG)."""
    words = f" {name.replace('-', ' ')} "
    known = (peak for part, peak in PEAK_TFLOP_PER_S.items() if f" {part} " in words and " MIG " not in words)
    return next((peak * 1e12 for peak in known), None)
