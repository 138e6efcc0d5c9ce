"""The ranks of a training job and their collectives. No other module communicates between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline import messages
from pipeline.cluster import launch_environment
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.storage.mapped_file import PIECE_BYTES, FileReference

T = TypeVar("T")

_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@dataclass(frozen=True)
class PendingVote:
    """The result of `all_reduce_max_async`: usable on the device at once, and on the host when the device is done."""

    values: Tensor
    """int32, on the device."""
    _copy: Tensor
    _copied: torch.cuda.Event | None

    def read(self) -> list[int]:
        """Wait for the values. The device continues with work that was queued after them."""
        if self._copied is not None:
            self._copied.synchronize()
        return [int(value) for value in self._copy.tolist()]


@dataclass(frozen=True)
class World:
    """The ranks of one job."""

    accelerator: Accelerator
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes messages, curves and checkpoints for all ranks."""
        return self.rank == 0

    def all_reduce_max(self, *values: int | bool | Tensor) -> list[int]:
        """The maximum of each value over the ranks, in one all-reduce that all ranks must call."""
        return self.all_reduce_max_async(*values).read()

    def all_reduce_max_async(self, *values: int | bool | Tensor) -> PendingVote:
        """As `all_reduce_max`, without waiting for the device before the values are read."""
        maxima = torch.stack([self._as_int32(value) for value in values])
        if self.size > 1:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        copy, copied = maxima.to("cpu", non_blocking=True), None  # torch allocates page-locked memory for the copy
        if maxima.is_cuda:
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record()
        return PendingVote(maxima, copy, copied)

    def _as_int32(self, value: int | bool | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self.device, torch.int32)
        return torch.full(
            (), int(value), dtype=torch.int32, device=self.device
        )  # a kernel: a copy from the host would block

    def data_parallel(self, model: nn.Module, compression: Literal["none", "bf16"]) -> nn.Module:
        """Wrap a module so that its gradients are averaged over the ranks, in float32 or compressed to bfloat16."""
        wrapped: DistributedDataParallel = self.accelerator.prepare_model(model)
        if compression == "bf16":
            # DDP refuses the hook by its name on gloo, although gloo sums bfloat16: a lambda hides the name.
            wrapped.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))  # noqa: PLW0108
        return wrapped

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate tensors of equal shape from all ranks, in rank order."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def broadcast_object(self, value: Any) -> Any:
        """Send rank 0's value to all ranks."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0; return its result, or raise its error, on all ranks."""
        result: T | PipelineError | None = None
        if self.is_main:
            try:
                result = function()
            except PipelineError as error:
                result = error
            except OSError as error:
                result = DataError(f"{error}: check this file or directory, then run the same command again")
        result = self.broadcast_object(result)
        if isinstance(result, PipelineError):
            result.is_told_elsewhere = not self.is_main
            raise result
        return cast(T, result)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, in place. All ranks pass the same shapes in the same order."""
        if self.size > 1:
            for tensor in tensors:
                staged = tensor.to(self.device).contiguous()  # NCCL refuses channels-last tensors
                dist.broadcast(staged, src=0)
                tensor.copy_(staged)

    def copy_to_nodes(self, file: FileReference) -> None:
        """Send a remote file from rank 0's node to all nodes that lack it, so that its store is read once.

        A node that has no room for it goes without: its ranks read the store then, and report the error.
        """
        lacks = file.is_remote and not file.is_on_node()
        if not self.all_reduce_max(lacks)[0]:
            return
        received = self._pieces(file)
        if lacks and launch_environment.count("LOCAL_RANK", 0) == 0:
            with suppress(PipelineError):
                file.store(received)
        for _ in received:  # a collective: all ranks take part in it to its end
            pass
        self.all_reduce_max(False)  # the file is there before another rank of its node looks for it

    def _pieces(self, file: FileReference) -> Iterator[bytes]:
        """The bytes of a file that rank 0 reads, a few MiB at a time."""
        sent = file.pieces() if self.is_main else None
        left = file.size
        while left:
            data = torch.empty(min(left, PIECE_BYTES), dtype=torch.uint8)
            if sent:
                data = torch.frombuffer(bytearray(next(sent)), dtype=torch.uint8)
            self.broadcast_([data])
            left -= len(data)
            yield data.numpy().tobytes()

    def shutdown(self) -> None:
        """Leave the process group together with the other ranks, so that none of them loses contact."""
        self.accelerator.end_training()


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective has failed because another rank is gone, silent or out of reach."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _accelerator(on_cpu: bool, timeout_s: float) -> Accelerator:
    """Create the accelerator from these arguments alone, whatever the environment says.

    Raises:
        ConfigError: accelerate refuses a variable of the environment.
    """
    launch_environment.clear_settings()
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no",  # the trainer enters autocast itself
            dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),  # train.compile decides
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"accelerate cannot start here: {reason}: check the environment variables") from error


def init_distributed(device: str, timeout_s: float) -> World:
    """Join the ranks that the launcher has started, or run as the only rank.

    Args:
        device: auto, cpu or cuda.
        timeout_s: seconds that a collective waits for a rank.

    Raises:
        ConfigError: there is no CUDA device, or fewer ranks run than were launched.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device=cuda, but torch sees no CUDA device here: set it to auto or cpu; `nvidia-smi` shows the GPUs"
        )
    process = launch_environment.prepare_training()
    if process.rank == 0 and (backend := launch_environment.dynamo_backend()):
        messages.warning(f"accelerate's dynamo_backend {backend} is not used: train.compile=true compiles the network")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    on_cpu = on_cpu or (device == "auto" and launch_environment.is_on("ACCELERATE_USE_CPU"))
    accelerator = _accelerator(on_cpu, timeout_s)
    if accelerator.num_processes != process.size:
        raise ConfigError(
            f"{process.size} processes were launched, but accelerate runs {accelerator.num_processes}: launch with "
            "--multi_gpu (also on CPU), and --num_machines, --machine_rank, --main_process_ip on several nodes"
        )
    if accelerator.distributed_type not in _DATA_PARALLEL:
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}, this trainer is plain data-parallel: "
            "launch with --multi_gpu, or with a file of launch/accelerate"
        )
    return World(accelerator, accelerator.process_index, process.size, accelerator.device)
