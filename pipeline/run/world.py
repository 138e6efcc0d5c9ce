"""Who the ranks are and how they agree: the only place that talks between processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import ConfigError, DataError, PipelineError

T = TypeVar("T")

_KINDS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@dataclass(frozen=True)
class Agreement:
    """What the ranks have agreed on: on the device at once, on the host as soon as the device has come that far."""

    values: Tensor
    """int32, on the device."""
    _copy: Tensor
    _copied: torch.cuda.Event | None

    def read(self) -> list[int]:
        """The values, once they are there; work that was queued on the device after them goes on meanwhile."""
        if self._copied is not None:
            self._copied.synchronize()
        return [int(value) for value in self._copy.tolist()]


@dataclass(frozen=True)
class World:
    """The ranks of one job, as `accelerate launch` started them."""

    accelerator: Accelerator
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks, logs and saves for all."""
        return self.rank == 0

    def agree(self, *values: int | bool | Tensor) -> list[int]:
        """The highest of each value over the ranks. One small all-reduce; no rank may skip it."""
        return self.agree_soon(*values).read()

    def agree_soon(self, *values: int | bool | Tensor) -> Agreement:
        """The same, but nobody waits for the device before the values are read."""
        highest = torch.stack([self._as_int32(value) for value in values])
        if self.size > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        copy, copied = highest.to("cpu", non_blocking=True), None  # page-locked, as torch makes such copies
        if highest.is_cuda:
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record()
        return Agreement(highest, copy, copied)

    def _as_int32(self, value: int | bool | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self.device, torch.int32)
        return torch.full((), int(value), dtype=torch.int32, device=self.device)  # a kernel; a copy would be waited for

    def data_parallel(self, model: nn.Module, compression: Literal["none", "bf16"]) -> nn.Module:
        """The module with gradients averaged over the ranks, in float32 or sent and summed in half as many bits."""
        wrapped: DistributedDataParallel = self.accelerator.prepare_model(model)
        if compression == "bf16":
            # DDP knows the hook by its name and refuses it on gloo, which has long been able to sum bfloat16.
            wrapped.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))  # noqa: PLW0108
        return wrapped

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks, on all of them."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Equal-shaped tensors of all ranks, concatenated in rank order, on all of them."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def tell(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def ask(self, question: Callable[[], T]) -> T:
        """Rank 0's answer, on all ranks; or its error, raised on all of them."""
        answer: T | PipelineError | None = None
        if self.is_main:
            try:
                answer = question()
            except PipelineError as error:
                answer = error
            except OSError as error:
                answer = DataError(f"{error}: look at that place, then run the same command again")
        answer = self.tell(answer)
        if isinstance(answer, PipelineError):
            raise answer
        return cast(T, answer)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor with rank 0's, in place; every rank passes the same shapes in the same order."""
        if self.size > 1:
            for tensor in tensors:
                staged = tensor.to(self.device).contiguous()  # NCCL takes no channels-last tensor
                dist.broadcast(staged, src=0)
                tensor.copy_(staged)

    def leave(self) -> None:
        """Part in good order, so that no rank sees another vanish."""
        self.accelerator.end_training()


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, silent or out of reach."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def enter(device: str, timeout_s: float) -> World:
    """Join the ranks that the launcher started, or be the only one.

    Args:
        device: auto, cpu or cuda.
        timeout_s: how long a collective may wait for a rank.

    Raises:
        ConfigError: CUDA was asked for and is not there, or fewer ranks run than were launched.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device=cuda, but torch sees no CUDA device here: take auto or cpu; `nvidia-smi` tells more"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launched > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE is {launched}, but {', '.join(missing)} are not set: start with `accelerate launch`, "
            "or unset WORLD_SIZE for a single process"
        )
    accelerator = Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",  # autocast is entered where the network is called, not patched into it
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}: launch with "
            "--multi_gpu (also on CPU), and --num_machines, --machine_rank, --main_process_ip on several nodes"
        )
    if accelerator.distributed_type not in _KINDS:
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}, this trainer is plain data-parallel: "
            "launch with --multi_gpu, or with a file of launch/accelerate"
        )
    return World(accelerator, accelerator.process_index, launched, accelerator.device)
