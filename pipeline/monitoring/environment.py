"""The software and the device that computed a result: its last bits depend on them, so they are recorded with it."""

from __future__ import annotations

import platform

import torch


def environment(device: torch.device) -> dict[str, str]:
    """Versions of the software and the name of the device."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }
