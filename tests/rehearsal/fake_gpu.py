"""A GPU without memory or arithmetic: its tensors have shapes, types and strides, but no values.

Within `FakeGpu` torch reports one CUDA device. Tensors there are fake tensors; tensors on the host stay real. So all
code for CUDA runs, with torch's own errors for devices that do not match, but the device computes nothing: what the
host reads are small tables that it has copied there before, else 1.0, 0 and False. Streams, events and page-locked
memory are replaced by objects that only note each call.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.training.memory_estimate import layout_copy_bytes
from tests.rehearsal import fake_cuda

_PIPELINE = str(Path(__file__).parents[2] / "pipeline")
_ATEN = torch.ops.aten
_CUDA = 1  # c10::DeviceType::CUDA
_LARGEST_TABLE = 1 << 14
"""Elements of a tensor that keeps its values on the device."""
_KEEPS_VALUES = {
    _ATEN.index,
    _ATEN.select,
    _ATEN.slice,
    _ATEN.alias,
    _ATEN.detach,
    _ATEN.view,
    _ATEN.unbind,
    _ATEN.stack,
}
_WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount", "repeat_interleave"}
_WRAPPERS = ("_compile.py", "eval_frame.py", "fake_gpu.py", "_ops.py", "flop_counter.py")


class Wait(NamedTuple):
    """A wait of the host for the device."""

    site: str
    """`module.Class.function` of pipeline/ that waits."""
    what: str


class Kind(NamedTuple):
    """What is known of a tensor beside its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    is_channels_first: bool
    is_channels_last: bool


class Op(NamedTuple):
    """An operation on the device."""

    name: str
    inputs: list[Kind]
    outputs: list[Kind]


class FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which torch has one CUDA device with fake tensors.

    Attributes:
        waits: all waits of the host for the device so far.
        calls: all calls of streams, events and page-locked memory so far.
        live: bytes alive on the device.
        peak: the highest `live`, and what CUDA copies to another layout within an operation.
        ops: the operations on the device, while `records_ops` is set.

    Args:
        memory_bytes: memory of the device, above which it raises `OutOfMemoryError`.
    """

    def __init__(self, memory_bytes: int = fake_cuda.MEMORY_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[Wait] = []
        self.calls: list[str] = []
        self.ops: list[Op] = []
        self.live, self.peak, self._memory_bytes = 0, 0, memory_bytes
        self.records_ops = False
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._values: dict[int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> FakeGpu:
        self._stack.enter_context(_cuda_guard())
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(FakeTensor, "__torch_dispatch__", staticmethod(_dispatch_of_a_tensor))
        fake_cuda.install(self, self._stack)
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the engine has no such device
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return _device_of(args[0])
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if kwargs.pop("pin_memory", None):
            self.note_call("pin_memory")
        if kwargs.get("device") == _META and _asked_by_the_engine():
            kwargs["device"] = fake_cuda.GPU
        on_device = str(kwargs.get("device") or "cpu").startswith("cuda")
        if not on_device and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            return func(*args, **kwargs)
        if _is_composite(func):
            with self._active():  # in inference mode operations arrive here before they are taken apart
                return func.decompose(*args, **kwargs)
        if reason := reason_to_wait(func, args, kwargs, inputs):
            self.note_wait(reason)
        if (value := self._read(func, args, kwargs)) is not None:
            return value
        with self.fake:
            result = func(*args, **kwargs)
        self._note(func, args, kwargs, inputs, result)
        return result

    @contextmanager
    def _active(self) -> Iterator[None]:
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def note_call(self, call: str) -> None:
        """Note a call of a stream, an event or page-locked memory."""
        self.calls.append(call)

    def note_wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        frame: Any = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith(_PIPELINE):
            frame = frame.f_back
        name = frame.f_code.co_qualname.partition(".<locals>")[0] if frame else ""
        site = f"{Path(frame.f_code.co_filename).stem}.{name}" if frame else "test"
        wait = Wait(site, what)
        if what != "read" or self.waits[-1:] != [wait]:  # `tolist` reads fake tensors one number at a time
            self.waits.append(wait)

    def reset_peak(self) -> None:
        """Let `peak` count from now on."""
        self.peak = self.live

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the host reads, if this operation reads from the device: the values as far as known."""
        if func.overloadpacket is _ATEN._local_scalar_dense:
            return self._value(args[0]).item()
        if func.overloadpacket is _ATEN._to_copy and _is_to(kwargs, "cpu") and on_gpu(args[0]):
            return func(self._value(args[0]), **{key: value for key, value in kwargs.items() if key != "device"})
        if func.overloadpacket is _ATEN.copy_ and not isinstance(args[0], FakeTensor) and on_gpu(args[1]):
            return args[0].copy_(self._value(args[1]))
        return None

    def _value(self, tensor: Tensor) -> Tensor:
        known = self._values.get(id(tensor))
        if known is not None:
            return known
        return torch.full(tensor.shape, 1 if tensor.is_floating_point() else 0, dtype=tensor.dtype)

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], result: Any
    ) -> None:
        outputs = [leaf for leaf in tree_leaves(result) if on_gpu(leaf)]
        for tensor in outputs:
            self._track(tensor)
            if func._schema.is_mutable and func.namespace != "c10d":  # collectives of a fake group change nothing
                self._values.pop(id(tensor), None)
        if outputs:
            used = self.live + layout_copy_bytes(func, args)
            if used > self._memory_bytes:
                raise torch.OutOfMemoryError(f"{used:,} bytes on a device of {self._memory_bytes:,}")
            self.peak = max(self.peak, used)
            self._keep_values(func, args, kwargs, outputs)
            if self.records_ops:
                self.ops.append(
                    Op(
                        func.overloadpacket.__name__,
                        *([_kind(tensor) for tensor in group] for group in (inputs, outputs)),
                    )
                )

    def _keep_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        """Remember the values of a small tensor that comes from the host, of a constant, and of parts of both."""
        packet, values = func.overloadpacket, None
        if outputs[0].numel() > _LARGEST_TABLE:
            return
        if packet is _ATEN.full:
            values = func(*args, **kwargs | {"device": "cpu"})
        elif packet is _ATEN._to_copy and not isinstance(args[0], FakeTensor):
            values = args[0].to(kwargs.get("dtype") or args[0].dtype, copy=True)
        elif packet is _ATEN.copy_ and not isinstance(args[1], FakeTensor):
            values = args[1].to(args[0].dtype, copy=True)
        elif packet in _KEEPS_VALUES:
            known = tree_map(lambda leaf: self._values.get(id(leaf)) if on_gpu(leaf) else leaf, args)
            if len(tree_leaves(known)) == len(tree_leaves(args)) and all(
                leaf is not None for leaf in tree_leaves(known)
            ):
                values = func(*known, **kwargs)
        for output, value in zip(outputs, tree_leaves(values) if values is not None else ()):
            self._values[id(output)] = value
            weakref.finalize(output, self._values.pop, id(output), None)

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self.live += size
            self._alive[key] = weakref.ref(storage, lambda _: self._release(key, size))

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        del self._alive[key]


_META = torch.device("meta")
_TENSOR_DISPATCH = FakeTensor.__torch_dispatch__


def _is_composite(func: Any) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU")


def reason_to_wait(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> str | None:
    """Why the host waits for the device during this operation of CUDA; None if it does not."""
    packet, name = func.overloadpacket, func.overloadpacket.__name__
    if packet in (_ATEN._to_copy, _ATEN.copy_):
        return _copy_that_waits(packet, args, kwargs)
    if not any(on_gpu(tensor) for tensor in inputs):
        return None
    if name in ("index", "index_put", "index_put_"):
        indices = [index for index in args[1] if index is not None]
        if any(not on_gpu(index) for index in indices):
            return "index on the host"
        return "shape from values" if any(index.dtype in (torch.bool, torch.uint8) for index in indices) else None
    return "read" if packet is _ATEN._local_scalar_dense else "shape from values" if name in _WAITING else None


def _copy_that_waits(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The direction of a copy between host and device, unless it is asynchronous."""
    target_on_gpu, source, flags = _is_to(kwargs, "cuda"), args[0], kwargs.get("non_blocking")
    if packet is _ATEN.copy_:
        target_on_gpu, source, flags = on_gpu(args[0]), args[1], flags or args[2:3] == (True,)
    elif not kwargs.get("device"):
        return None
    if flags or target_on_gpu == on_gpu(source):
        return None
    return "copy to the device" if target_on_gpu else "copy to the host"


def _kind(tensor: Tensor) -> Kind:
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return Kind(tuple(tensor.shape), tensor.dtype, tensor.device.type, tensor.is_contiguous(), is_last)


def on_gpu(value: Any) -> bool:
    """Whether a value is a tensor on the device."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def _is_to(kwargs: dict[str, Any], device: str) -> bool:
    return str(kwargs.get("device")).startswith(device)


def _device_of(tensor: FakeTensor) -> torch.device:
    """The device that C++ code is told.

    The engine of autograd wants streams for a CUDA device, which a build for CPUs has not, so it is told another one;
    nothing but streams and threads depends on its answer.
    """
    return _META if _asked_by_the_engine() else tensor.fake_device


def _asked_by_the_engine() -> bool:
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    return frame.f_code is _engine_run_backward.__code__


def _dispatch_of_a_tensor(
    func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """`FakeTensor.__torch_dispatch__`, which is asked where a mode above `FakeGpu` does not answer."""
    if func is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:
        return _device_of(args[0])
    return _TENSOR_DISPATCH(func, types, args, kwargs or {})


@contextmanager
def _cuda_guard() -> Iterator[None]:
    """Context: torch has its own guard of CUDA devices that does nothing.

    A build for CUDA takes it without a GPU, a build for CPUs not: `_ensureCUDADeviceGuardSet` replaces only a guard
    that is there and counts no device. So one is put there whose functions all return 0.
    """
    torch.ones((), requires_grad=True).backward()  # the engine counts devices once, and must find none
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (_CUDA + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = registry[_CUDA]
    zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    functions = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(functions))
    if before is None:
        registry[_CUDA] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    only_cpu = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device="cuda")` begins on the host
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(only_cpu)
        registry[_CUDA] = before
