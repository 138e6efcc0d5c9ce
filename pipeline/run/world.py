"""Who the ranks are and how they agree: the only place that talks between processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from pipeline.errors import ConfigError


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

    def agree(self, *flags: bool | Tensor) -> list[bool]:
        """For each flag, whether any rank raised it. One small all-reduce; no rank may skip it."""
        raised = torch.stack([torch.as_tensor(flag, device=self.device).to(torch.float32) for flag in flags])
        if self.size > 1:
            dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

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
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}: launch with "
            "--multi_gpu (also on CPU), and --num_machines, --machine_rank, --main_process_ip on several nodes"
        )
    return World(accelerator, accelerator.process_index, launched, accelerator.device)
