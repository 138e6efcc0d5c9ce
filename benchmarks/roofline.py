"""How near is each part of a training step to what the machine can do at most, and where does the rest of its time go?

    python benchmarks/roofline.py [--batch N] [--rounds N] [--threads N] [--precision bf16|fp32] [--config NAME]

The Trainer's whole step, not compiled and with nothing computed twice, operation by operation as autograd hands them to
the device: time, floating-point operations (by torch's formulas: matrix products and convolutions only), and the bytes
of inputs and outputs, once each. No operation can take less than its FLOPs at the machine's peak rate, nor than its
bytes at the peak bandwidth; the larger is its floor. The peaks are the best of large products and convolutions in the
same precision and of large copies and sums, taken in turns with the steps. So a part can lie below its floor: where
bytes come from a cache, and where a convolution leaves out the zeros of its padding, which the formulas count.

Time is that of the kernels on a GPU, and of the calls on a CPU. What is left of the step, when nobody watches it, is
Python, autograd and dispatch; on a GPU, only as far as the device waits for them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import config_of, ours_alone
from turns import Turns

from pipeline.training.memory_estimate import FLOPS

POINTWISE = "SiLU, sums, dropout, joints, resizing"
REST = "noise, loss, embedding, views"
GROUPS = {
    "attention products": ("bmm", "softmax", "attention"),
    "1x1 convolutions, projections": ("mm", "linear"),
    "GroupNorm": ("group_norm",),
    "clipping, optimizer, average": ("_foreach", "_fused", "vector_norm"),
    "casts, copies": ("copy", "clone"),
    POINTWISE: ("silu", "add", "mul", "div", "sum", "cat", "dropout", "rand", "ge", "upsample", "pad"),
}
"""Parts of the names of operations; the first group that fits counts."""
WRITE_ONLY = ("copy_", "fill_", "zero_", "random_")


class Operation(NamedTuple):
    """One call: its group, floating-point operations, and bytes that have to move."""

    group: str
    flops: int
    bytes: int


class Watch(TorchDispatchMode):
    """Sees each operation of some work.

    Args:
        device: where it is done.
        batch: images in it.

    Attributes:
        operations: in order.
        seconds: by group.
        shortest: seconds of a call that does next to nothing, so that they are those of watching.
    """

    def __init__(self, device: torch.device, batch: int) -> None:
        super().__init__()
        self._batch = batch
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.process_time if alone else time.perf_counter  # as Turns
        self.operations: list[Operation] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.shortest = float("inf")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        group = group_of(func, args, self._batch)
        with record_function(group):
            started = self._clock()
            result = func(*args, **kwargs)
            spent = self._clock() - started
        self.seconds[group] += spent
        self.shortest = min(self.shortest, spent)
        count = FLOPS.get(func.overloadpacket)
        flops = int(count(*args, **kwargs, out_val=result)) if count else 0
        self.operations.append(Operation(group, flops, bytes_of(func, args, kwargs, result)))
        return result


def group_of(func: Any, args: tuple[Any, ...], batch: int) -> str:
    name = func.overloadpacket.__name__
    backward = ", backward" if name.endswith("backward") else ""
    if name.startswith("convolution"):
        x, weight, stride, transposed = (args[i + bool(backward)] for i in (0, 1, 3, 6))
        if weight.shape[2:] == (1, 1):
            return "1x1 convolutions, projections"
        pixels = x.shape[3] * stride[0] if transposed else x.shape[3] // stride[0]
        return f"convolutions, {pixels} px{backward}"
    group = next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), REST)
    features = any(x.dim() == 4 and len(x) == batch and x.shape[3] > 3 for x in tensors(args))
    if group == POINTWISE and not (features or "rand" in name):
        return REST
    if group == "casts, copies":
        return f"{group}: {'features' if features else 'weights, gradients'}"
    return group + backward if group == "GroupNorm" else group


def bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Each input read once and each output written once; views move nothing."""
    name, arguments = func.overloadpacket.__name__, func._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args)} | kwargs
    # The schema of fused Adam would let it change gradients too.
    changed = [a.name for a in arguments if a.alias_info and a.alias_info.is_write and a.name != "grads"]
    read = tensors([value for key, value in values.items() if not (key in changed and name in WRITE_ONLY)])
    known = {x.untyped_storage()._cdata for x in tensors(values)}
    written = tensors([values[key] for key in changed if key in values])
    written += [x for x in tensors(result) if x.untyped_storage()._cdata not in known]
    if not written or name.startswith(("empty", "new_empty")):
        return 0
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in read + written)


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def watched(step: Callable[[], object], device: torch.device, batch: int) -> Watch:
    """A step, seen."""
    watch = Watch(device, batch)
    if device.type != "cuda":
        with watch:
            step()
        for operation in watch.operations:
            watch.seconds[operation.group] -= watch.shortest
        return watch
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with watch:
            step()
        torch.cuda.synchronize()
    watch.seconds = dict.fromkeys(watch.seconds, 0.0)
    for event in profiler.events():
        if event.name in watch.seconds and event.device_type == DeviceType.CPU:
            watch.seconds[event.name] += sum(child.device_time_total for child in event.cpu_children) / 1e6
    return watch


def extremes(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], float]]:
    """What a machine does fastest: work, and its FLOPs or bytes."""
    cuda = device.type == "cuda"
    side, batch, channels, px, numbers = (16384, 256, 512, 64, 2**28) if cuda else (2048, 16, 256, 32, 2**26)
    a, b, product = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    x, weight = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((batch, channels, px, px), (channels, channels, 3, 3))
    )
    one, other, total = (torch.ones(numbers, device=device) for _ in range(3))
    return {
        "product": (lambda: torch.mm(a, b, out=product), 2 * side**3),
        "convolution": (lambda: F.conv2d(x, weight, padding=1), 2 * batch * px**2 * channels**2 * 9),
        "copy": (lambda: other.copy_(one), 2 * one.nbytes),
        "sum": (lambda: torch.add(one, other, out=total), 3 * one.nbytes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=0, help="default: 128 on a GPU, 16 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: all cores")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--config", default="cifar10.yaml", metavar="NAME", help="a file of configs/")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, batch = torch.device("cuda" if cuda else "cpu"), options.batch or (128 if cuda else 16)
    turns = Turns(device, options.threads)
    torch.manual_seed(0)
    step = ours_alone(config_of(options.config, batch, options.precision))
    most = extremes(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    watches: list[Watch] = []
    works = {"step": step, "watched": lambda: watches.append(watched(step, device, batch))}
    turns.take(works | {name: work for name, (work, _) in most.items()}, options.rounds)
    best = {name: amount / min(turns.seconds[name]) for name, (_, amount) in most.items()}
    table(watches[1:], turns.median("step"), max(best["product"], best["convolution"]), max(best["copy"], best["sum"]))
    units = {"product": "GFLOP", "convolution": "GFLOP", "copy": "GB", "sum": "GB"}
    print("peaks: " + ", ".join(f"{name} {rate / 1e9:.1f} {units[name]}/s" for name, rate in best.items()))
    print(f"{turns.where()}, {options.config}, {options.precision}, batch {batch}; medians of {options.rounds} rounds")


def table(watches: list[Watch], step: float, flop_per_s: float, bytes_per_s: float) -> None:
    """Prints a line a group, slowest first.

    Args:
        watches: the same step, some times.
        step: seconds of one that is not watched.
        flop_per_s: the machine's peak.
        bytes_per_s: the same.
    """
    rows: dict[str, list[float]] = {}
    for group in watches[0].seconds:
        seconds = statistics.median(watch.seconds[group] for watch in watches)
        mine = [operation for operation in watches[0].operations if operation.group == group]
        flops, moved = sum(each.flops for each in mine), sum(each.bytes for each in mine)
        floor = sum(max(each.flops / flop_per_s, each.bytes / bytes_per_s) for each in mine)
        rows[group] = [len(mine), seconds, flops, moved, flops / flop_per_s, moved / bytes_per_s, floor]
    rows = dict(sorted(rows.items(), key=lambda row: -row[1][1]))
    rows["all operations"] = [sum(column) for column in zip(*rows.values())]
    floors = f"{'floors, ms: FLOPs':>19}{'bytes':>8}{'x floor':>9}"
    print(f"{'':42}{'calls':>6}{'ms':>9}{'of step':>9}{'GFLOP':>9}{'GB':>8}{floors}")
    for group, (calls, seconds, flops, moved, by_flops, by_bytes, floor) in rows.items():
        measured = f"{calls:>6}{seconds * 1e3:>9.1f}{seconds / step:>9.1%}{flops / 1e9:>9.1f}{moved / 1e9:>8.2f}"
        times = f"{seconds / floor:>9.2f}" if floor else ""
        print(f"{group:42}{measured}{by_flops * 1e3:>19.1f}{by_bytes * 1e3:>8.1f}{times}")
    rest = step - rows["all operations"][1]
    print(f"{'Python, autograd, dispatch':42}{'':6}{rest * 1e3:>9.1f}{rest / step:>9.1%}")
    print(f"{'step':42}{'':6}{step * 1e3:>9.1f}{1:>9.1%}")


if __name__ == "__main__":
    main()
