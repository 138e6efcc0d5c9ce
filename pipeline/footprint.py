"""What a training step takes on a GPU: bytes and floating-point operations, counted without a GPU, data or memory.

One real step (forward under autocast, loss, backward, clipping, Adam, moving average) runs on fake tensors, which have
shapes and no contents, while a ledger follows every storage from its allocation to its end. What lives after an
operation is a number that does not depend on the batch and a number for each picture; two runs on small batches give
both, so every micro-batch is known from them.

It runs as on a CPU, the one device whose autograd works everywhere, but with what CUDA does otherwise: GroupNorm reads
channels-first there, and convolutions turn such input round. Attention takes a fused kernel on both, which never holds
the N·N scores. Left out: cuDNN's workspaces, rounding and gaps of the allocator. With `train.compile` the compiler
chooses what is kept, which is not counted either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.config import Config
from pipeline.diffusion import objective
from pipeline.diffusion.samplers import from_uint8
from pipeline.diffusion.schedule import Schedule, make_schedule
from pipeline.model import kernels
from pipeline.model.unet import Checkpointing, UNet
from pipeline.run.optimizer import make_adam

POLICIES: tuple[Checkpointing, ...] = ("none", "attention", "blocks", "full")

_BATCHES = (2, 3)  # of one picture, strides are ambiguous
_ATEN = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""Operation → how many floating-point operations it takes, from its arguments: torch's, and attention of a CPU."""


@dataclass(frozen=True)
class Counts:
    """A forward and backward pass, counted."""

    forward_flops: int
    flops: int
    saved: int
    """Bytes that the forward pass leaves to the backward pass."""
    live: list[int]
    """Bytes alive after each operation."""
    gradients: list[int]
    """Bytes of gradients of weights that each operation makes."""


@dataclass(frozen=True)
class Footprint:
    """What a step takes under one checkpointing policy. Bytes are pairs: whatever the batch, and for a picture."""

    forward_flops: int
    """For a picture."""
    flops: int
    """For a picture: forward, backward, and what is computed twice."""
    _saved: NDArray[np.int64]
    _live: NDArray[np.int64]
    """After each operation of a first micro-batch."""
    _missing: NDArray[np.int64]
    """At the same operations: gradients that are not there yet, but are for any further micro-batch; a number each."""
    _update: int

    def saved_bytes(self, micro_batch: int) -> int:
        """What the forward pass leaves to the backward pass: activations, and 16-bit copies of weights."""
        return int(self._saved @ (1, micro_batch))

    def peak_bytes(self, micro_batch: int, *, accumulating: bool) -> int:
        """The most that is allocated at once: weights, gradients, moments, average, activations, transients.

        Args:
            micro_batch: pictures in a pass.
            accumulating: whether a step has several passes, or its gradients stay in the buckets of DDP.
        """
        live = self._live @ (1, micro_batch)
        return max(self._update, int((live + self._missing if accumulating else live).max()))


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages from their making to their end, and counts floating-point operations.

    Works alike for real and for fake tensors. What an operation needs within itself is not seen.

    Attributes:
        live: bytes alive now.
        timeline: `live` after each operation.
        flops: so far.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.flops = 0, 0
        self.timeline: list[int] = []
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        for tensor in held:
            self._hold(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # three of four calls
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._hold(tensor)
        if tensors:
            self.timeline.append(self.live + _turned_round(func, args))
            if count := FLOPS.get(func.overloadpacket):
                self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        return result

    def made_by(self, tensor: Tensor) -> int:
        """Which entry of the timeline made what a tensor lies in."""
        return self._alive[tensor.untyped_storage()._cdata][1]

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self.live += size
            self._alive[key] = weakref.ref(storage, lambda _: self._release(key, size)), len(self.timeline)

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        del self._alive[key]


def _turned_round(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of the copies in another memory format that CUDA makes within an operation, for as long as it takes."""
    inputs = {_ATEN.native_group_norm_backward: 1, _ATEN.convolution: 1, _ATEN.convolution_backward: 2}.get(
        func.overloadpacket, 0
    )
    if not inputs:
        return 0
    like = args[inputs]  # GroupNorm takes gradients as its input is, convolutions both as the weights are
    last = {"memory_format": torch.channels_last}
    wanted = last if like.is_contiguous(**last) and not like.is_contiguous() else {}
    return sum(int(tensor.nbytes) for tensor in args[:inputs] if not tensor.is_contiguous(**wanted))


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """What CUDA does otherwise than a CPU, for fake tensors on a CPU.

    GroupNorm makes a copy of channels-last input, and keeps that one; attention takes a fused kernel.
    """
    group_norm, on_cpu = F.group_norm, kernels.on_cpu
    # No TorchFunctionMode: those are off within `backward`, where a checkpoint runs forward again.
    F.group_norm = lambda x, *args, **kwargs: group_norm(x.contiguous(), *args, **kwargs)
    kernels.on_cpu = lambda x: False
    try:
        yield
    finally:
        F.group_norm, kernels.on_cpu = group_norm, on_cpu


class Step:
    """The parts of a training step: made under `FakeTensorMode`, it takes no memory.

    Args:
        config: the run.

    Raises:
        ConfigError: the network cannot be built like that.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.network = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
        for parameter in self.network.parameters():
            if parameter.dim() == 4:  # as `.to(memory_format=…)` does, which fake modules do not know
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._optimizer = make_adam(self.network, config.train.lr)
        followed = self.network.parameters() if config.train.ema_device == "same" else ()
        self._average = [torch.empty_like(parameter) for parameter in followed]
        self._schedule: Schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps)

    def held(self) -> list[Tensor]:
        """What lives as long as a run: weights, their average if it is not on the host, moments."""
        state = [value for entry in self._optimizer.state.values() for value in entry.values()]
        return [*self.network.parameters(), *self._average, *state]

    def gradients(self) -> list[Tensor]:
        """Those of the weights, as far as they are there."""
        return [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]

    def loss(self, micro_batch: int) -> Tensor:
        """The forward pass, to the loss."""
        data, model, diffusion = self._config.data, self._config.model, self._config.diffusion
        pictures = torch.empty(micro_batch, data.channels, *data.height_width, dtype=torch.uint8)
        x0 = from_uint8(pictures).contiguous(memory_format=torch.channels_last)
        t = torch.zeros(micro_batch, dtype=torch.int64)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self._config.train.precision == "bf16"):
                output: Tensor = self.network(x, t, t if model.num_classes else None)
            return output

        return objective.loss(
            denoise, x0, t, torch.empty_like(x0), self._schedule,
            prediction_type=diffusion.prediction_type, loss_weighting=diffusion.loss_weighting,
            min_snr_gamma=diffusion.min_snr_gamma, learned_variance=model.learned_variance,
        ).mean()  # fmt: skip

    def update(self) -> None:
        """What follows the last backward pass."""
        nn.utils.clip_grad_norm_(self.network.parameters(), self._config.train.clip_norm)
        self._optimizer.step()
        if self._average:
            with torch.no_grad():  # the counters of the average itself are read on the host, and fake ones cannot be
                torch._foreach_lerp_(self._average, list(self.network.parameters()), 1 - self._config.train.ema_decay)

    def forget(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)


def count(step: Step, micro_batch: int) -> Counts:
    """Take a step of one micro-batch, without its end, and count what it takes."""
    with Ledger(step.held()) as ledger:
        held = ledger.live
        loss = step.loss(micro_batch)
        saved, forward_flops = ledger.live - held, ledger.flops
        torch.autograd.backward(loss)
    gradients = [0] * len(ledger.timeline)
    for gradient in step.gradients():
        gradients[ledger.made_by(gradient)] += gradient.nbytes
    step.forget()
    return Counts(forward_flops, ledger.flops, saved, ledger.timeline, gradients)


def update_bytes(step: Step) -> int:
    """Take a step and give the most that is alive at its end: clipping, Adam, average."""
    torch.autograd.backward(step.loss(1))
    ledger = Ledger([*step.held(), *step.gradients()])
    with ledger:
        step.update()
    step.forget()
    return max(ledger.timeline)


def trace(config: Config) -> dict[Checkpointing, Footprint]:
    """The footprint of a run's step under each checkpointing policy, cheapest first.

    Raises:
        ConfigError: the network cannot be built like that.
    """
    footprints = {}
    with FakeTensorMode(), as_on_cuda():
        step = Step(config)
        update = update_bytes(step)
        for policy in POLICIES:
            step.network.checkpointing = policy
            few, more = (count(step, batch) for batch in _BATCHES)
            footprints[policy] = Footprint(
                few.forward_flops // _BATCHES[0],
                few.flops // _BATCHES[0],
                _line(few.saved, more.saved),
                _line(few.live, more.live),
                sum(few.gradients) - np.cumsum([0, *few.gradients[:-1]]),  # while one is added, it is there twice
                update,
            )
    return footprints


def _line(few: int | list[int], more: int | list[int]) -> NDArray[np.int64]:
    """Bytes (whatever the batch, for a picture) from those at the two batches."""
    low, high = np.asarray(few, np.int64), np.asarray(more, np.int64)
    each = (high - low) // (_BATCHES[1] - _BATCHES[0])
    return np.stack((low - _BATCHES[0] * each, each), axis=-1)
