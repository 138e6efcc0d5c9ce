"""Adapts a network for the diffusion process: autocast, channels-last memory, valid labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Denoiser:
    """(noisy images, timesteps, labels) → raw output of a network.

    Attributes:
        network: a `UNet`, or a wrapper of one such as DDP.
        precision: bf16 uses autocast, fp32 does not.
        num_classes: number of classes, which is also the null label; 0: the network takes no labels.
    """

    network: nn.Module
    precision: str
    num_classes: int

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W) float32, (B,) int64 and (B,) int64, below 0 for images without a class → output."""
        x = x.contiguous(memory_format=torch.channels_last)
        if labels is not None:
            labels = torch.where(labels < 0, self.num_classes, labels) if self.num_classes else None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output: Tensor = self.network(x, t, labels)
        return output

    def with_labels(self, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser with fixed labels."""
        return lambda x, t: self(x, t, labels)
