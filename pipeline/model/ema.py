"""A moving average of the weights: `ema-pytorch` with settings under which it moves, in float32, at every update."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from ema_pytorch import EMA
from torch import Tensor, nn


class Average(EMA):  # type: ignore[misc]
    """An average that begins at the weights of the first update and then forgets ever more slowly.

    Update n = 1, 2, … keeps a share of min(decay, 1 - n^(-3/4)) of the average, so that after 10 000 updates it spans
    the last thousand instead of the random weights of the beginning. Take each optimizer step within `following`, and
    call `update` between two of them if the last one counts. Its counters stay on the CPU, where reading them does not
    stall a GPU: never move the average itself.

    On the host it takes no memory of a GPU and follows the same weights, which come in page-locked memory.

    Args:
        model: the bare module on its device, not wrapped by DDP or `torch.compile`, whose other parameter names
            would leave the average still without a word.
        decay: in [0, 1), the largest share kept.
        on_host: keep the average in the host's memory and compute it there, instead of beside the model.

    Raises:
        TypeError: a wrapped model, or 16-bit weights, in which the average would not move either.
    """

    def __init__(self, model: nn.Module, decay: float, *, on_host: bool = False) -> None:
        if any(name.startswith(("module.", "_orig_mod.")) for name, _ in model.named_parameters()):
            raise TypeError("the average is made of the bare module: unwrap it from DDP or torch.compile first")
        if any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
            raise TypeError("the average is made of float32 weights: use autocast, not a 16-bit module")
        super().__init__(
            _host_copy(model) if on_host else model,
            beta=decay,
            update_every=1,
            update_after_step=0,
            power=3 / 4,
            include_online_model=False,
            use_foreach=True,
        )
        self.ema_model.eval().requires_grad_(False)
        self._on_host, self._weights = on_host, list(model.parameters())
        self._device, self._stream = self._weights[0].device, None
        if on_host and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Around an optimizer step: sends the new weights to the host, if the average is there.

        A GPU copies them beside what is queued after the step. Nobody waits but `update`, on the host, and the next
        step, on the GPU, which must not change weights that are still being copied.
        """
        if self._copied:
            self._copied.wait(torch.cuda.current_stream(self._device))
        yield
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._on_host:
            # `stream(None)` would begin to use a GPU.
            with torch.cuda.stream(self._stream) if self._stream else nullcontext(), torch.no_grad():
                for parameter, weights in zip(self.model.parameters(), self._weights, strict=True):
                    parameter.copy_(weights, non_blocking=True)
        if self._stream:
            self._copied = self._stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Take in the weights of the last optimizer step."""
        if self._copied:
            self._copied.synchronize()
        super().update()

    def network(self) -> Any:
        """The averaged network, of the model's class and on its device: from the host, a copy not to be kept."""
        return copy.deepcopy(self.ema_model).to(self._device) if self._on_host else self.ema_model


def _host_copy(model: nn.Module) -> nn.Module:
    """The same network in the host's memory, page-locked if it is on a GPU, for only then nobody waits for a copy."""
    host = copy.deepcopy(model).cpu()
    for parameter, original in zip(host.parameters(), model.parameters(), strict=True):
        if original.is_cuda:
            parameter.data = parameter.data.pin_memory()
    return host


def ema_state(ema: EMA) -> tuple[dict[str, Tensor], int]:
    """The average under the model's own parameter names (not copied), and the number of updates."""
    return ema.ema_model.state_dict(), int(ema.step)


def set_updates(ema: EMA, updates: int) -> None:
    """Makes `ema` go on as after so many updates, from the weights that were put into it."""
    ema.step.fill_(updates)
    ema.initted.fill_(updates > 0)
