"""A moving average (EMA) of the weights: `ema-pytorch`, in float32, updated after every step, also on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from ema_pytorch import EMA
from torch import Tensor, nn

from pipeline.model.posthoc_ema import PowerAverages


class Average(EMA):  # type: ignore[misc]
    """An average that starts at the weights of the first update and whose decay grows to `decay`.

    Update n = 1, 2, … has the decay min(decay, 1 - n^(-3/4)): after 10 000 updates the average covers about the last
    thousand and no longer the random initial weights. Run each optimizer step inside `track_step`, then call `update`
    before the next one, unless the step was skipped. Do not move the average to a GPU: its counters stay on the CPU,
    where reading them does not stall the GPU.

    On the host the average takes no GPU memory; the weights are copied to page-locked memory after each step.

    Args:
        model: the bare module on its device, not wrapped by DDP or `torch.compile`, whose other parameter names
            would silently stop the average from changing.
        decay: the largest decay, in [0, 1).
        on_host: store and compute the average on the host instead of on the model's device.
        lengths: of power-function averages to track beside it; see `posthoc_ema`.

    Raises:
        TypeError: the model is wrapped, or has 16-bit weights, which are too coarse for an average.
    """

    def __init__(self, model: nn.Module, decay: float, *, on_host: bool = False, lengths: Sequence[float] = ()) -> None:
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
        self.powers = PowerAverages(self.model, lengths)
        self._on_host, self._weights = on_host, list(model.parameters())
        self._device, self._stream = self._weights[0].device, None
        if on_host and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None
        self._has_pending_update = False

    @contextmanager
    def track_step(self) -> Iterator[None]:
        """Around an optimizer step: send the new weights to the host, if the average is there.

        A GPU copies them beside what is queued after the step. The host waits for the copy when it computes the
        average; the GPU waits for it before the next step, which must not change weights that are being copied.
        """
        self.flush()
        if self._copied:
            self._copied.wait(torch.cuda.current_stream(self._device))
        yield
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._on_host:
            # `stream(None)` would initialize CUDA.
            with torch.cuda.stream(self._stream) if self._stream else nullcontext(), torch.no_grad():
                for parameter, weights in zip(self.model.parameters(), self._weights, strict=True):
                    parameter.copy_(weights, non_blocking=True)
        if self._stream:
            self._copied = self._stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Take in the weights of the last optimizer step.

        On the host this is done when the average is asked for or the next step begins: a GPU computes the next gradient
        meanwhile.
        """
        if self._on_host:
            self._has_pending_update = True
        else:
            self._take_in()

    def flush(self) -> None:
        """Compute the update that `update` has put off."""
        if self._has_pending_update:
            self._has_pending_update = False
            if self._copied:
                self._copied.synchronize()
            self._take_in()

    def _take_in(self) -> None:
        super().update()
        self.powers.update(self.model.parameters(), int(self.step))

    def network(self) -> Any:
        """The averaged network, of the model's class and on its device: from the host, a copy not to be kept."""
        self.flush()
        return copy.deepcopy(self.ema_model).to(self._device) if self._on_host else self.ema_model


def _host_copy(model: nn.Module) -> nn.Module:
    """A copy of the network in host memory; page-locked if the model is on a GPU, so that copies are asynchronous."""
    host = copy.deepcopy(model).cpu()
    for parameter, original in zip(host.parameters(), model.parameters(), strict=True):
        if original.is_cuda:
            parameter.data = parameter.data.pin_memory()
    return host


def ema_state(ema: Average) -> tuple[dict[str, Tensor], int]:
    """The average under the model's own parameter names (not copied), and the number of updates."""
    ema.flush()
    return ema.ema_model.state_dict(), int(ema.step)


def set_updates(ema: EMA, updates: int) -> None:
    """Set the number of updates, after loading averaged weights from a checkpoint."""
    ema.step.fill_(updates)
    ema.initted.fill_(updates > 0)
