"""Adam, whose step the device itself skips if it is bad, and its state as tensors named after their parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam as in Ho et al. 2020 (β 0.9, 0.999; ε 1e-8), with its state in place from the start.

    State that exists before the first step lets ranks restore a checkpoint by overwriting tensors.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in _MOMENTS},
        }
    return optimizer


def step_unless(bad: Tensor, optimizer: torch.optim.Adam, lr: float) -> None:
    """Take a step of Adam, unless `bad`, a number on the device that the host does not read, is 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]  # as GradScaler tells fused optimizers
    optimizer.step()


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """`exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` → the live tensor."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in sorted(optimizer.state[parameter].items())
    }
