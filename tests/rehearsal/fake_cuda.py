"""`torch.cuda` of a machine with one GPU, for `FakeGpu`: streams and events note their calls and do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.training import trainer

if TYPE_CHECKING:
    from tests.rehearsal.fake_gpu import FakeGpu

GPU = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3"
MEMORY_BYTES = 80 << 30
_MOST_FLASH_FEATURES = 256  # of a head


class _Stream:
    def __init__(self, gpu: FakeGpu, device: torch.device = GPU) -> None:
        self._gpu = gpu

    def query(self) -> bool:
        return True

    def wait_stream(self, other: _Stream) -> None:
        self._gpu.note_call("Stream.wait_stream")

    def record_event(self, event: _Event) -> _Event:
        self._gpu.note_call("Stream.record_event")
        return event


class _Event:
    def __init__(self, gpu: FakeGpu, *, blocking: bool = False) -> None:
        assert blocking, "the host would wait for this event in a busy loop"
        self._gpu = gpu

    def record(self) -> None:
        self._gpu.note_call("Event.record")

    def wait(self, stream: _Stream) -> None:
        self._gpu.note_call("Event.wait")

    def synchronize(self) -> None:
        self._gpu.note_wait("event")


def _pinned(gpu: FakeGpu, tensor: Tensor) -> Tensor:
    assert tensor.device.type == "cpu"
    gpu.note_call("pin_memory")
    return tensor


def install(gpu: FakeGpu, stack: ExitStack) -> None:
    """Replace what asks for a real device."""
    patch, current = stack.enter_context(pytest.MonkeyPatch.context()), _Stream(gpu)
    properties = SimpleNamespace(name=NAME, total_memory=MEMORY_BYTES, major=9, minor=0)
    cuda: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "set_device": lambda device: gpu.note_call(f"set_device {torch.device(device)}"),
        "Stream": partial(_Stream, gpu), "Event": partial(_Event, gpu), "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: current, "synchronize": lambda: gpu.note_wait("synchronize"),
        "default_generators": (torch.Generator(),), "manual_seed_all": lambda seed: None, "empty_cache": lambda: None,
        "get_device_name": lambda device=None: NAME, "get_device_properties": lambda device=None: properties,
        "max_memory_allocated": lambda device=None: gpu.peak,
        "reset_peak_memory_stats": lambda device=None: gpu.reset_peak(),
    }  # fmt: skip
    for name, value in cuda.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(Tensor, "pin_memory", lambda tensor: _pinned(gpu, tensor))
    patch.setattr(F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention))
    patch.setattr(nn.Module, "_apply", _move)
    patch.setattr(FakeTensorMode, "avoid_device_init", True)  # although `is_available` says that there is a device
    patch.setattr(torch._C, "_conv_determine_backend_memory_format", _layout_of_cudnn)
    # A build for CPUs has no kernel of CUDA for it, and would take it apart, which takes more memory.
    library = torch.library.Library("aten", "IMPL")
    library.impl("silu_backward", lambda gradient, x: torch.empty_like(x), "CUDA")
    stack.callback(library._destroy)
    build = trainer._network

    def unreal_network(config: Any) -> Any:
        with gpu.fake:  # its random weights would take most of the time
            return build(config)

    patch.setattr(trainer, "_network", unreal_network)


def _attention(plain: Any) -> Any:
    """The kernels that CUDA takes: flash attention in 16 bits, else the memory-efficient one; none if both are off."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type != "cuda" or not torch.backends.cuda.flash_sdp_enabled():
            return plain(q, k, v)  # type: ignore[no-any-return]
        if q.element_size() == 2 and q.shape[-1] <= _MOST_FLASH_FEATURES:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]  # type: ignore[no-any-return]
        needs_gradient = torch.is_grad_enabled() and q.requires_grad
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, None, needs_gradient)[0]  # type: ignore[no-any-return]

    return attend


def _move(module: nn.Module, move: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which has no way to move fake parameters that others refer to: here they are replaced."""
    for child in module.children():
        child._apply(move)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(move(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = move(buffer)
    return module


def _layout_of_cudnn(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """The layout of a convolution's results: channels last if the input or the weights have it, as cuDNN has."""
    has_it = any(tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1] > 1 for tensor in (x, weight))
    return torch.channels_last if has_it else torch.contiguous_format


@contextmanager
def ranks(size: int) -> Iterator[None]:
    """Context: this process is rank 0 of so many, whose collectives change nothing.

    DistributedDataParallel first compares shapes with ranks that are not there, and its own reduction asks the process
    group for a result that this one has not: the same reduction is set as its hook.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    build = parallel.DistributedDataParallel.__init__

    def reduce(_, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, which are texts here
        dist.all_reduce(bucket.buffer().div_(size))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def wrap(module: parallel.DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        build(module, *args, **kwargs)
        module.register_comm_hook(None, reduce)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, ("0", str(size), "0", "8", "localhost", "1"), strict=True):
            patch.setenv(name, value)
        patch.setattr(parallel.distributed, "_verify_param_shape_across_processes", lambda *_: True)
        patch.setattr(parallel.DistributedDataParallel, "__init__", wrap)
        patch.setattr(dist.Logger, "set_runtime_stats_and_log", lambda logger: None)  # needs a timer of CUDA
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        try:
            yield
        finally:
            dist.destroy_process_group()
