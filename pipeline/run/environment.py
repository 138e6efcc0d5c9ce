"""What the bits of a result depend on besides settings, inputs and seeds; written down beside it."""

from __future__ import annotations

import platform

import torch


def environment(device: torch.device) -> dict[str, str]:
    """Software and hardware that computes."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }
