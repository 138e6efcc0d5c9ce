"""Job: what a configuration needs before it runs: memory and time on a GPU, numbers of ranks, sizes on disk."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.safetensors_buffer import TensorFile
from pipeline.config import Config
from pipeline.data.loading.order import allowed_worlds, default_lanes
from pipeline.diffusion.process import DiffusionProcess
from pipeline.errors import ConfigError
from pipeline.model.posthoc_ema import PowerAverages
from pipeline.model.unet import UNet
from pipeline.monitoring.flops import PEAK_TFLOP_PER_S
from pipeline.training import micro_batch
from pipeline.training.memory_estimate import POLICIES, trace

SAMPLES = 1000
"""Number of samples whose size on disk is estimated."""

UTILISATION = 0.4
"""Share of a GPU's peak rate for the estimate of images/s: a goal at 64 px, not a measurement."""

SPARE_BYTES = 3 * 2**28
"""GPU memory reserved for CUDA's context and cuDNN's workspaces."""
SPARE_SHARE = 0.1
"""Added to the estimated peak, for its error and for fragmentation."""

GPUS = {name.lower().removeprefix("rtx ").replace(" ", "-"): rate * 1e12 for name, rate in PEAK_TFLOP_PER_S.items()}
"""FLOP/s of a GPU, in dense bfloat16."""


def plan(config: Config, samples: int | None = None) -> dict[str, Any]:
    """Parameters, allowed world sizes and sizes on disk, without a GPU, data or memory for weights.

    Args:
        config: the run; lengths may be in epochs.
        samples: images in an epoch; if given, the result has lengths in steps.

    Returns:
        `parameters`, `global_batch`, `lanes`, `world_sizes` (allowed numbers of ranks), `checkpoint_bytes`,
        `ema_snapshot_bytes` (0 if there are none), `samples_bytes_at_most` (of 1,000 samples as tars of PNGs), and
        `lengths` (key → steps) if `samples` is given.

    Raises:
        ConfigError: the network cannot be built with this configuration, or a length is 0 steps.
    """
    DiffusionProcess.of(config.diffusion)  # refuses an impossible schedule
    lanes = config.data.lanes or default_lanes(config.train.global_batch)
    with torch.device("meta"):
        network = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "global_batch": config.train.global_batch,
        "lanes": lanes,
        "world_sizes": [ranks for ranks in allowed_worlds(lanes) if _can_share(config, ranks)],
        "checkpoint_bytes": _checkpoint_bytes(network, config),
        "ema_snapshot_bytes": _averages_bytes(network, config, torch.float16),
        "samples_bytes_at_most": SAMPLES * _sample_bytes(config),
    }
    if samples is not None:
        figures["lengths"] = _lengths(config.in_steps(samples), samples)
    return figures


def on_a_gpu(
    config: Config,
    *,
    memory_bytes: int | None = None,
    gpu: str | None = None,
    flops: float | None = None,
    samples: int | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """Memory and time of a step on one GPU that processes the whole global batch, estimated without that GPU.

    Args:
        config: the run; lengths may be in epochs.
        memory_bytes: memory of the GPU; needed for `fits` and `auto`.
        gpu: one of `GPUS`; this or `flops` is needed for images/s.
        flops: FLOP/s measured in training on the GPU.
        samples: images in an epoch; needed for the hours of a run whose length is in epochs.
        price: of an hour of the GPU, in any currency; needed for `cost`.

    Returns:
        `forward_flops_per_image`; `flops_per_step`, including recomputation by the configured checkpointing (or the one
        that `auto` chooses); the assumed `memory_bytes` and `flops_per_s`; `policies`, a row for each checkpointing
        policy and micro-batch: `checkpointing`, `micro_batch`, `flops_per_step`, `saved_bytes`, `peak_bytes`, `fits`,
        `images_per_s`; `auto`, the `checkpointing` and `micro_batch` that the trainer would choose; `gpu_hours` and
        `cost` of the whole run with this checkpointing, without previews, validation and saves; `missing`, a line for
        each thing that must be given to know more. Unknown values are None.

    Raises:
        ConfigError: the network cannot be built with this configuration, or the GPU is not known.
    """
    section, rate, footprints, missing = config.train, _rate(config, gpu, flops), trace(config), []
    batch, rows = section.global_batch, []
    for policy, footprint in footprints.items():
        for size in micro_batch.sizes_to_try(batch, torch.device("cuda")):
            peak_bytes = footprint.peak_bytes(size, accumulating=size < batch)
            rows.append({
                "checkpointing": policy,
                "micro_batch": size,
                "flops_per_step": footprint.flops * batch,
                "saved_bytes": footprint.saved_bytes(size),
                "peak_bytes": peak_bytes,
                "fits": memory_bytes and peak_bytes * (1 + SPARE_SHARE) + SPARE_BYTES <= memory_bytes,
                "images_per_s": rate and rate / footprint.flops,
            })  # fmt: skip
    auto = _auto(config, rows) if memory_bytes else None
    policy = section.checkpointing if section.checkpointing != "auto" else auto["checkpointing"] if auto else "none"
    if gpu and not rate:
        missing.append(
            f"the rate of --gpu {gpu} is known in bf16 only, and train.precision is {section.precision}: give --flops "
            "as measured in training"
        )
    steps = section.steps if str(section.steps).isdecimal() else None
    if samples:
        steps = config.in_steps(samples).train.steps
    if rate and steps is None:
        missing.append(f"train.steps is {section.steps}: give --samples, the images of an epoch, to see the hours")
    hours = footprints[policy].flops * batch * steps / rate / 3600 if rate and steps else None
    return {
        "forward_flops_per_image": footprints[policy].forward_flops,
        "flops_per_step": footprints[policy].flops * batch,
        "memory_bytes": memory_bytes,
        "flops_per_s": rate,
        "policies": rows,
        "auto": auto,
        "gpu_hours": hours,
        "cost": hours and price and hours * price,
        "missing": missing,
    }


def as_text(figures: dict[str, Any]) -> str:
    """The results of `plan` and `on_a_gpu` as text tables."""
    snapshot = figures["ema_snapshot_bytes"]
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "global batch": f"{figures['global_batch']}, in {figures['lanes']} lanes",
        "processes": ", ".join(map(str, figures["world_sizes"])),
        "a checkpoint": f"{figures['checkpoint_bytes'] / 2**20:,.1f} MiB",
        **({"a snapshot of averages": f"{snapshot / 2**20:,.1f} MiB"} if snapshot else {}),
        f"{SAMPLES:,} samples": f"at most {figures['samples_bytes_at_most'] / 2**20:,.1f} MiB",
    }
    rows |= {key: f"{value:,}" for key, value in figures.get("lengths", {}).items()}
    rows |= {
        "FLOPs an image": f"{figures['forward_flops_per_image'] / 1e9:,.1f} G forward",
        "FLOPs a step": f"{figures['flops_per_step'] / 1e12:,.2f} T, forward and backward",
    }
    if (hours := figures["gpu_hours"]) is not None:
        cost = f", cost {figures['cost']:,.2f}" if figures["cost"] else "; give --price of an hour to see the cost"
        rows["the whole run"] = f"{hours:,.1f} GPU-hours of training{cost}"
    lines = [f"{name:<24} {text}" for name, text in rows.items()]
    missing = [f"missing: {line}" for line in figures["missing"]]
    return "\n".join([*lines, "", *_memory_table(figures), *missing, _advice(figures)])


def _memory_table(figures: dict[str, Any]) -> list[str]:
    """A row for each micro-batch, a column for each checkpointing policy."""
    cells: dict[int, list[str]] = {}
    for row in figures["policies"]:
        peak, saved = row["peak_bytes"] / 2**30, row["saved_bytes"] / 2**30
        cells.setdefault(row["micro_batch"], []).append(f"{peak:,.2f} ({saved:,.2f}){'*' if row['fits'] else ' '}")
    table = {"micro-batch": [f"{policy} " for policy in POLICIES]} | {str(size): texts for size, texts in cells.items()}
    if figures["flops_per_s"]:
        of_policy = {row["checkpointing"]: row["images_per_s"] for row in figures["policies"]}
        table["images/s"] = [f"{value:,.0f} " for value in of_policy.values()]
    lines = [f"{name:<12}" + "".join(f"{text:>19}" for text in texts) for name, texts in table.items()]
    return ["peak GiB of a GPU, not compiled (saved for the backward pass), by checkpointing; * fits", *lines]


def _advice(figures: dict[str, Any]) -> str:
    """The line about `train.checkpointing: auto`."""
    if figures["memory_bytes"] is None:
        return "checkpointing auto: give --memory to see what it takes"
    within = f"within {figures['memory_bytes'] / 2**30:,.1f} GiB"
    if figures["auto"] is None:
        return f"checkpointing auto: nothing fits {within}: use a smaller model or smaller images"
    return "checkpointing auto: {checkpointing}, micro-batch {micro_batch}, ".format(**figures["auto"]) + within


def _auto(config: Config, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What `train.checkpointing: auto` would choose, by the trainer's own rule; None if nothing fits."""
    fits = {(row["checkpointing"], row["micro_batch"]): row["fits"] for row in rows}
    fixed = config.train.micro_batch
    sizes = sorted({row["micro_batch"] for row in rows}, reverse=True) if fixed == "auto" else [fixed]
    try:
        policy, size = micro_batch.choose_what_fits(lambda policy, size: fits[policy, size], POLICIES, sizes)
    except ConfigError:
        return None
    return {"checkpointing": policy, "micro_batch": size}


def _rate(config: Config, gpu: str | None, flops: float | None) -> float | None:
    """FLOP/s to assume; None if not known."""
    if gpu is None or flops is not None:
        return flops
    if gpu.lower() not in GPUS:
        raise ConfigError(f"--gpu {gpu}: unknown GPU: give one of {', '.join(GPUS)}, or --flops as measured")
    if config.train.precision != "bf16":
        return None
    return GPUS[gpu.lower()] * UTILISATION


def _can_share(config: Config, ranks: int) -> bool:
    """Whether the share of a rank is a whole number of micro-batches."""
    micro = config.train.micro_batch
    return micro == "auto" or config.train.global_batch // ranks % micro == 0


def _checkpoint_bytes(network: torch.nn.Module, config: Config) -> int:
    """Bytes of the tensor files; the other files have a few kilobytes."""
    weights = network.state_dict()
    optimizer: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        optimizer |= {f"exp_avg.{name}": parameter, f"exp_avg_sq.{name}": parameter, f"step.{name}": torch.empty(())}
    # The buffer of a TensorFile is never written, so it takes address space but no memory.
    parts = (weights, weights, optimizer)
    return sum(map(_file_bytes, parts)) + _averages_bytes(network, config, torch.float32)


def _averages_bytes(network: torch.nn.Module, config: Config, dtype: torch.dtype) -> int:
    """Bytes of a file with the averages of `train.ema_lengths`; 0 if they are not tracked."""
    if not config.run.ema_snapshot_every:
        return 0
    averages = PowerAverages(network, config.train.ema_lengths).tensors()
    return _file_bytes({name: tensor.to(dtype) for name, tensor in averages.items()})


def _file_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(map(len, TensorFile(tensors).pieces()))


def _sample_bytes(config: Config) -> int:
    """Upper bound of a sample in a tar: an incompressible PNG, its JSON and class, headers and padding."""
    height, width = config.data.height_width
    raw = height * (width * config.data.channels + 1)
    deflated = raw + 5 * ceil(raw / 16_000) + 16
    png = deflated + 12 * ceil(deflated / 8192) + 64
    block, small_members = 512, 2 if config.model.num_classes else 1
    return block * (1 + ceil(png / block) + 2 * small_members)


def _lengths(config: Config, samples: int) -> dict[str, int]:
    """Steps of an epoch, and of every setting that can be given in epochs."""
    run = config.run.model_dump()
    return {
        "steps_per_epoch": ceil(samples / config.train.global_batch),
        "train.steps": config.train.steps,
        "train.warmup_steps": config.train.warmup_steps,
        **{f"run.{key}": value for key, value in run.items() if key.endswith("_every")},
    }
