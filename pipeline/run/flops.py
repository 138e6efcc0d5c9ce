"""What the arithmetic of a step amounts to, and the most that a device can do of it."""

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
"""Dense bfloat16, summed in float32, by a part of the name that CUDA gives a device; from the makers' data sheets."""


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and convolutions in some work; multiply and add are two."""
    # Attention in plain products, for fused kernels of some devices are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def peak_flop_per_s(device: torch.device) -> float | None:
    """The most that a device can do in bfloat16, if it is known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """The same by name; parts of a device (MIG) are not known."""
    words = f" {name.replace('-', ' ')} "
    known = (peak for part, peak in PEAK_TFLOP_PER_S.items() if f" {part} " in words and " MIG " not in words)
    return next((peak * 1e12 for peak in known), None)
