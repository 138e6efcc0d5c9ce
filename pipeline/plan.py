"""Job: what a configuration means before it runs: parameters, numbers of processes that can share it, sizes on disk."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.order import allowed_worlds, default_lanes
from pipeline.model.unet import UNet
from pipeline.run.tensorfile import TensorFile

SAMPLES = 1000
"""Samples whose size on disk is bounded."""


def plan(config: Config, samples: int | None = None) -> dict[str, Any]:
    """Figures of a run, without a GPU, data or memory for weights.

    Args:
        config: lengths may be in epochs.
        samples: pictures in an epoch; with it, lengths in steps are among the figures.

    Returns:
        `parameters`, `global_batch`, `lanes`, `world_sizes` (allowed numbers of ranks), `checkpoint_bytes`,
        `samples_bytes_at_most` (of 1,000 samples as tars of PNGs), and `lengths` (key → steps) if `samples` is given.

    Raises:
        ConfigError: the network cannot be built like that, or a length comes to no step.
    """
    lanes = config.data.lanes or default_lanes(config.train.global_batch)
    with torch.device("meta"):
        network = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "global_batch": config.train.global_batch,
        "lanes": lanes,
        "world_sizes": [ranks for ranks in allowed_worlds(lanes) if _can_share(config, ranks)],
        "checkpoint_bytes": _checkpoint_bytes(network),
        "samples_bytes_at_most": SAMPLES * _sample_bytes(config),
    }
    if samples is not None:
        figures["lengths"] = _lengths(config.in_steps(samples), samples)
    return figures


def as_text(figures: dict[str, Any]) -> str:
    """The figures as a table to read."""
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "global batch": f"{figures['global_batch']}, in {figures['lanes']} lanes",
        "processes": ", ".join(map(str, figures["world_sizes"])),
        "a checkpoint": f"{figures['checkpoint_bytes'] / 2**20:,.1f} MiB",
        f"{SAMPLES:,} samples": f"at most {figures['samples_bytes_at_most'] / 2**20:,.1f} MiB",
    }
    rows |= {key: f"{value:,}" for key, value in figures.get("lengths", {}).items()}
    return "\n".join(f"{name:<24} {text}" for name, text in rows.items())


def _can_share(config: Config, ranks: int) -> bool:
    micro = config.train.micro_batch
    return micro == "auto" or config.train.global_batch // ranks % micro == 0


def _checkpoint_bytes(network: torch.nn.Module) -> int:
    """Of the three files of tensors; what lies beside them is a few kilobytes."""
    weights = network.state_dict()
    optimizer: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        optimizer |= {f"exp_avg.{name}": parameter, f"exp_avg_sq.{name}": parameter, f"step.{name}": torch.empty(())}
    # The buffer behind a TensorFile is never written to, so it takes address space and no memory.
    return sum(len(piece) for part in (weights, weights, optimizer) for piece in TensorFile(part).pieces())


def _sample_bytes(config: Config) -> int:
    """The most that a sample takes in a tar: a PNG that does not compress, its JSON and class, headers and padding."""
    height, width = config.data.height_width
    raw = height * (width * config.data.channels + 1)
    deflated = raw + 5 * ceil(raw / 16_000) + 16
    png = deflated + 12 * ceil(deflated / 8192) + 64
    block, small_members = 512, 2 if config.model.num_classes else 1
    return block * (1 + ceil(png / block) + 2 * small_members)


def _lengths(config: Config, samples: int) -> dict[str, int]:
    """Steps of everything that can be given in epochs, and of an epoch."""
    run = config.run.model_dump()
    return {
        "steps_per_epoch": ceil(samples / config.train.global_batch),
        "train.steps": config.train.steps,
        "train.warmup_steps": config.train.warmup_steps,
        **{f"run.{key}": value for key, value in run.items() if key.endswith("_every")},
    }
