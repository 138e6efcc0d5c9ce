"""The switches that torch has once in a process, set in one place."""

from __future__ import annotations

import os

import torch


def set_torch_flags(*, deterministic: bool = False, benchmark: bool = False) -> None:
    """Set them before the first operation of a job.

    Args:
        deterministic: take only kernels that give the same bits in every run, where torch has them.
        benchmark: let cuDNN try its kernels at each new shape and take the fastest, which may differ between runs.
    """
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.backends.cudnn.benchmark = benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
    torch.use_deterministic_algorithms(deterministic)
