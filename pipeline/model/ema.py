"""A moving average of the weights: `ema-pytorch` with settings under which it moves, in float32, at every update."""

from __future__ import annotations

import torch
from ema_pytorch import EMA
from torch import Tensor, nn


def make_ema(model: nn.Module, decay: float) -> EMA:
    """An average that begins at the weights of the first update and then forgets ever more slowly.

    Update n = 1, 2, … keeps a share of min(decay, 1 - n^(-3/4)) of the average, so that after 10 000 updates it spans
    the last thousand instead of the random weights of the beginning. Call `ema.update()` after each optimizer step.
    Its counters stay on the CPU, where reading them does not stall a GPU: never move the EMA itself.

    Args:
        model: the bare module on its device, not wrapped by DDP or `torch.compile`, whose other parameter names
            would leave the average still without a word.
        decay: in [0, 1), the largest share kept.

    Raises:
        TypeError: a wrapped model, or 16-bit weights, in which the average would not move either.
    """
    if any(name.startswith(("module.", "_orig_mod.")) for name, _ in model.named_parameters()):
        raise TypeError("the average is made of the bare module: unwrap it from DDP or torch.compile first")
    if any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
        raise TypeError("the average is made of float32 weights: use autocast, not a 16-bit module")
    ema = EMA(
        model,
        beta=decay,
        update_every=1,
        update_after_step=0,
        power=3 / 4,
        include_online_model=False,
        use_foreach=True,
    )
    ema.ema_model.eval().requires_grad_(False)
    return ema


def ema_state(ema: EMA) -> tuple[dict[str, Tensor], int]:
    """The average under the model's own parameter names (not copied), and the number of updates."""
    return ema.ema_model.state_dict(), int(ema.step)


def set_updates(ema: EMA, updates: int) -> None:
    """Makes `ema` go on as after so many updates, from the weights that were put into it."""
    ema.step.fill_(updates)
    ema.initted.fill_(updates > 0)
