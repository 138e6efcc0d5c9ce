"""Estimate the memory and the floating-point operations of a training step on a GPU, without a GPU or data.

One real step (forward under autocast, loss, backward, clipping, Adam, moving average) runs on fake tensors, which have
shapes but no contents. A `StorageTracker` follows every storage from allocation to release. The bytes alive after an
operation are a constant plus a number for each image; two steps with small batches give both, and with them the bytes
of every micro-batch.

The step runs as on a CPU, the only device whose autograd works everywhere, but imitates CUDA where it differs:
GroupNorm reads channels-first input there, and convolutions copy such input to another layout. Attention uses a fused
kernel on both, which never stores the N·N scores. Not counted: cuDNN's workspaces, rounding and fragmentation of the
allocator, and the choices of the compiler with `train.compile`.
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
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.samplers import from_uint8
from pipeline.model import kernels
from pipeline.model.denoiser import Denoiser
from pipeline.model.unet import Checkpointing, UNet
from pipeline.training.optimizer import make_adam

POLICIES: tuple[Checkpointing, ...] = ("none", "attention", "blocks", "full")

_BATCHES = (2, 3)  # not 1: strides of a single image are ambiguous
_ATEN = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""Operation → function of its arguments that counts its FLOPs: torch's registry, and attention on a CPU."""


@dataclass(frozen=True)
class Counts:
    """FLOPs and bytes of a forward and backward pass."""

    forward_flops: int
    flops: int
    saved: int
    """Bytes that the forward pass saves for the backward pass."""
    live: list[int]
    """Bytes alive after each operation."""
    gradients: list[int]
    """Bytes of weight gradients that each operation allocates."""


@dataclass(frozen=True)
class Footprint:
    """Memory and FLOPs of a step under one checkpointing policy. Bytes are pairs: constant, and for each image."""

    forward_flops: int
    """For each image."""
    flops: int
    """For each image: forward, backward and recomputation."""
    _saved: NDArray[np.int64]
    _live: NDArray[np.int64]
    """Alive after each operation of the first micro-batch."""
    _missing: NDArray[np.int64]
    """At the same operations: weight gradients not yet allocated, which later micro-batches have from the start."""
    _update: int

    def saved_bytes(self, micro_batch: int) -> int:
        """Bytes saved for the backward pass: activations, and 16-bit copies of weights."""
        return int(self._saved @ (1, micro_batch))

    def peak_bytes(self, micro_batch: int, *, accumulating: bool) -> int:
        """Peak bytes: weights, gradients, moments, average, activations, temporary tensors.

        Args:
            micro_batch: images in a pass.
            accumulating: whether gradients exist from the start: a step of several passes, or buckets of DDP.
        """
        live = self._live @ (1, micro_batch)
        return max(self._update, int((live + self._missing if accumulating else live).max()))


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all live storages, and floating-point operations; for real and for fake tensors.

    Memory that an operation uses internally is not seen.

    Attributes:
        live: bytes alive now.
        timeline: `live` after each operation.
        flops: operations so far.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.flops = 0, 0
        self.timeline: list[int] = []
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        for tensor in existing:
            self._track(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # three quarters of all calls
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._track(tensor)
        if tensors:
            self.timeline.append(self.live + layout_copy_bytes(func, args))
            if count := FLOPS.get(func.overloadpacket):
                self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        return result

    def allocation_op(self, tensor: Tensor) -> int:
        """Index in `timeline` of the operation that allocated the tensor's storage."""
        return self._alive[tensor.untyped_storage()._cdata][1]

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self.live += size
            self._alive[key] = weakref.ref(storage, lambda _: self._release(key, size)), len(self.timeline)

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        del self._alive[key]


def layout_copy_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of the temporary copies in another memory format that CUDA makes during an operation."""
    inputs = {_ATEN.native_group_norm_backward: 1, _ATEN.convolution: 1, _ATEN.convolution_backward: 2}.get(
        func.overloadpacket, 0
    )
    if not inputs:
        return 0
    like = args[
        inputs
    ]  # GroupNorm needs gradients in the layout of its input, convolutions both in that of the weights
    last = {"memory_format": torch.channels_last}
    wanted = last if like.is_contiguous(**last) and not like.is_contiguous() else {}
    return sum(int(tensor.nbytes) for tensor in args[:inputs] if not tensor.is_contiguous(**wanted))


@contextmanager
def imitate_cuda() -> Iterator[None]:
    """Context: fake tensors on a CPU use memory as on CUDA.

    GroupNorm copies channels-last input and saves the copy; dropout saves one byte an element; attention uses a fused
    kernel.
    """
    group_norm, dropout, on_cpu = F.group_norm, F.dropout, kernels.on_cpu
    # Not a TorchFunctionMode: it would be off within `backward`, where a checkpoint runs forward again.
    F.group_norm = lambda x, *args, **kwargs: group_norm(x.contiguous(), *args, **kwargs)
    F.dropout = _dropout_of_cuda
    kernels.on_cpu = lambda x: False
    try:
        yield
    finally:
        F.group_norm, F.dropout, kernels.on_cpu = group_norm, dropout, on_cpu


def _dropout_of_cuda(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that saves a mask of one byte an element, as CUDA's kernel does; a CPU's saves 16 or 32 bits."""
    return torch.native_dropout(input, p, training)[0] if 0 < p < 1 else input


class Step:
    """The parts of a training step. Created under `FakeTensorMode`, it takes no memory.

    Args:
        config: the run.

    Raises:
        ConfigError: the network cannot be built with this configuration.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.network = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
        for parameter in self.network.parameters():
            if parameter.dim() == 4:  # `.to(memory_format=…)` does not work for fake modules
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._optimizer = make_adam(self.network, config.train.lr)
        copies = 1 + (len(config.train.ema_lengths) if config.run.ema_snapshot_every else 0)
        if config.train.ema_device == "cpu":
            copies = 0
        self._averages = [[torch.empty_like(p) for p in self.network.parameters()] for _ in range(copies)]
        # log_snr_min does not change memory, and searching fake tables for it is impossible.
        section = config.diffusion.model_copy(update={"log_snr_min": None})
        self._process = DiffusionProcess.of(section, variance=config.model.reverse_variance("fixed_large"))

    def persistent(self) -> list[Tensor]:
        """Tensors that live as long as the run: weights, their averages if not on the host, moments."""
        state = [value for entry in self._optimizer.state.values() for value in entry.values()]
        return [*self.network.parameters(), *(tensor for average in self._averages for tensor in average), *state]

    def gradients(self) -> list[Tensor]:
        """Existing gradients of the weights."""
        return [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]

    def loss(self, micro_batch: int) -> Tensor:
        """Forward pass and loss."""
        data, config = self._config.data, self._config
        images = torch.empty(micro_batch, data.channels, *data.height_width, dtype=torch.uint8)
        x0 = from_uint8(images).contiguous(memory_format=torch.channels_last)
        t = torch.zeros(micro_batch, dtype=torch.int64)
        denoise = Denoiser(self.network, config.train.precision, config.model.num_classes).with_labels(t)
        return objective.loss(denoise, x0, t, torch.empty_like(x0), self._process, config.diffusion).mean()

    def update(self) -> None:
        """Clipping, optimizer step and average, after the last backward pass."""
        nn.utils.clip_grad_norm_(self.network.parameters(), self._config.train.clip_norm)
        self._optimizer.step()
        for average in self._averages:
            with torch.no_grad():  # `Average` would read its counters on the host, which fake tensors do not allow
                torch._foreach_lerp_(average, list(self.network.parameters()), 1 - self._config.train.ema_decay)

    def drop_gradients(self) -> None:
        """Free the gradients."""
        self._optimizer.zero_grad(set_to_none=True)


def count(step: Step, micro_batch: int) -> Counts:
    """Count FLOPs and bytes of forward and backward pass for one micro-batch."""
    with StorageTracker(step.persistent()) as tracker:
        persistent = tracker.live
        loss = step.loss(micro_batch)
        saved, forward_flops = tracker.live - persistent, tracker.flops
        torch.autograd.backward(loss)
    gradients = [0] * len(tracker.timeline)
    for gradient in step.gradients():
        gradients[tracker.allocation_op(gradient)] += gradient.nbytes
    step.drop_gradients()
    return Counts(forward_flops, tracker.flops, saved, tracker.timeline, gradients)


def update_bytes(step: Step) -> int:
    """Peak bytes of the end of a step: clipping, Adam, average."""
    torch.autograd.backward(step.loss(1))
    tracker = StorageTracker([*step.persistent(), *step.gradients()])
    with tracker:
        step.update()
    step.drop_gradients()
    return max(tracker.timeline)


def trace(config: Config) -> dict[Checkpointing, Footprint]:
    """The footprint of a step under each checkpointing policy, in the order of `POLICIES`.

    Raises:
        ConfigError: the network cannot be built with this configuration.
    """
    footprints = {}
    with FakeTensorMode(), imitate_cuda():
        step = Step(config)
        update = update_bytes(step)
        for policy in POLICIES:
            step.network.checkpointing = policy
            few, more = (count(step, batch) for batch in _BATCHES)
            footprints[policy] = Footprint(
                few.forward_flops // _BATCHES[0],
                few.flops // _BATCHES[0],
                _fit(few.saved, more.saved),
                _fit(few.live, more.live),
                sum(few.gradients)
                - np.cumsum([0, *few.gradients[:-1]]),  # while a gradient is accumulated, two copies of it exist
                update,
            )
    return footprints


def _fit(few: int | list[int], more: int | list[int]) -> NDArray[np.int64]:
    """(constant bytes, bytes for each image) from the bytes with the two batches."""
    low, high = np.asarray(few, np.int64), np.asarray(more, np.int64)
    each = (high - low) // (_BATCHES[1] - _BATCHES[0])
    return np.stack((low - _BATCHES[0] * each, each), axis=-1)
