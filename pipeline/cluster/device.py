"""The device of a process that works without the others, for the jobs `sample` and `evaluate`."""

from __future__ import annotations

import torch

from pipeline.cluster.launch_environment import process_rank


def own_device() -> torch.device:
    """The GPU of this process's local rank, which becomes the current one; the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", process_rank().local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
