"""Commands of trained models: sample, evaluate."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

from pipeline import arguments, messages
from pipeline.commands.options import AsJson, DryRun, Quiet, path, report_forecast
from pipeline.config import FixedVariance, SamplingOptions
from pipeline.errors import ConfigError
from pipeline.solvers import SamplerName, Spacing

_STRENGTH = (
    "With --from: share of the noise schedule to add: near 0 keeps the image, 1 draws a new image. Default: 0.5."
)
_INTERPOLATE = (
    "With --seeds A,B: draw N images from seed A to seed B, all of the class of A, into --grid (one row) or --video. "
    "Only for samplers that add no noise."
)
_EMA_LENGTH = (
    "Use averaged weights of another length: the width of the average relative to the run, such as 0.08 (σ_rel). Only "
    "for runs with run.ema_snapshot_every."
)


def _sampling(key: str, *names: str, **options: Any) -> Any:
    """An option that is a key of the configuration's section `sample`; its help is the description there."""
    return typer.Option(*names, help=SamplingOptions.model_fields[key].description, **options)


def sample(
    source: Annotated[
        str,
        typer.Argument(
            callback=arguments.expand_homes,
            metavar="RUN|CHECKPOINT|DIFFUSERS_DIR",
            help="The trained model: a run, one of its checkpoints, or a diffusers directory.",
        ),
    ],
    seeds: Annotated[
        str,
        typer.Option(
            metavar="A-B|A|LIST", help="Seeds, one for each image: A-B (B included), A, or a list such as 0-9,42."
        ),
    ],
    out: Annotated[str | None, path("SAMPLES", "Sample set to write or extend: directory or URL.")] = None,
    sampler: Annotated[SamplerName | None, _sampling("sampler")] = None,
    steps: Annotated[int | None, _sampling("steps", min=1)] = None,
    eta: Annotated[float | None, _sampling("eta", min=0, max=1)] = None,
    spacing: Annotated[Spacing | None, _sampling("spacing")] = None,
    variance: Annotated[FixedVariance | None, _sampling("variance")] = None,
    batch: Annotated[int | None, _sampling("batch", min=1)] = None,
    compile: Annotated[bool | None, _sampling("compile", "--compile/--no-compile")] = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="Class of all images: its name, or its number from 0. Default: seed modulo the number of classes.",
        ),
    ] = None,
    guidance: Annotated[float | None, _sampling("guidance", min=0)] = None,
    guidance_interval: Annotated[str | None, _sampling("guidance_interval", metavar="FIRST-LAST")] = None,
    dynamic_threshold: Annotated[float | None, _sampling("dynamic_threshold", min=0, max=1)] = None,
    precision: Annotated[Literal["bf16", "fp32"] | None, _sampling("precision")] = None,
    size: Annotated[str | None, _sampling("size", metavar="PX|HxW")] = None,
    guide: Annotated[
        str | None, path("RUN|CHECKPOINT", "Weaker model for autoguidance, such as an earlier checkpoint of the run.")
    ] = None,
    shard_samples: Annotated[
        int | None, typer.Option(min=1, help="Seeds in a shard, a multiple of --batch. Default: 1 to 4 batches.")
    ] = None,
    format: Annotated[
        Literal["tar", "png", "npz"],
        typer.Option(help="tar: PNGs in tars, a shard set; png: a PNG for each seed; npz: an array for each shard."),
    ] = "tar",
    grid: Annotated[str | None, path("FILE.png", "Also write a grid of the first 100 images.")] = None,
    video: Annotated[
        str | None, path("FILE.mp4", "Also write a video of the first images, from noise to image.")
    ] = None,
    trajectory: Annotated[
        str | None, path("FILE.png", "Also write a grid of the first 8 seeds, one row each, from noise to image.")
    ] = None,
    from_image: Annotated[
        str | None,
        path("IMAGE", "Start from this image with added noise (SDEdit); each seed draws a variation.", "--from"),
    ] = None,
    strength: Annotated[float | None, typer.Option(metavar="S", help=_STRENGTH)] = None,
    interpolate: Annotated[int | None, typer.Option(min=2, metavar="N", help=_INTERPOLATE)] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best", help="Use the checkpoint of RUN with the lowest Fréchet distance; needs run.evaluate_every."
        ),
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Use the averaged weights, or those of the last training step.")
    ] = True,
    ema_length: Annotated[float | None, typer.Option(metavar="LENGTH", help=_EMA_LENGTH)] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw samples; the same command again draws only missing images. Several processes can share the work.

    Default of the options from --sampler to --size: the value of the sample set, if it exists; else that of the run.
    """
    from pipeline import sample as job
    from pipeline.checkpoints.checkpoint import best_checkpoint
    from pipeline.data.shards.seeds import parse_seeds
    from pipeline.sampling.options import SamplingRequest

    options = {"sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing,
               "variance": variance, "batch": batch, "compile": compile, "guidance": guidance,
               "guidance_interval": arguments.interval(guidance_interval) if guidance_interval else None,
               "dynamic_threshold": dynamic_threshold, "precision": precision, "label": label,
               "size": arguments.size(size) if size else None}  # fmt: skip
    request = SamplingRequest(
        best_checkpoint(source) if best else source, parse_seeds(seeds), {key: value for key, value in options.items() if value is not None}, out=out,
        format=format, shard_samples=shard_samples, grid=grid, video=video, trajectory=trajectory,
        from_image=from_image, strength=strength, interpolate=interpolate, ema=ema, ema_length=ema_length,
        guide=guide,
    )  # fmt: skip
    if dry_run:
        report_forecast(job.forecast(request), as_json=as_json)
        return
    result = job.sample(request, quiet=quiet)
    if as_json:
        messages.summary(json.dumps(result))


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            callback=arguments.expand_homes,
            metavar="SAMPLES|RUN",
            help="Sample set or any shard set; with --likelihood: a run, a checkpoint or a diffusers directory.",
        ),
    ],
    against: Annotated[str | None, path("SHARDSET", "Shard set to compare the samples with.")] = None,
    features: Annotated[
        str | None,
        path(
            "FILE|inception",
            "Network that computes the features: .npz of a CIFAR ResNet, TorchScript, or .pt2 of torch.export; inception: "
            "the standard network of FID, downloaded once. TorchScript runs code: use only files that you trust.",
        ),
    ] = None,
    likelihood: Annotated[
        str | None,
        path("SHARDSET", "Compute bits per dimension of this set instead; one network pass for each timestep."),
    ] = None,
    cache: Annotated[
        str | None, path("DIR", "Directory of the features, 4 bytes a feature and image. Default: beside each set.")
    ] = None,
    nearest: Annotated[
        str | None, path("FILE.png", "Also write a grid of samples beside their nearest images of --against.")
    ] = None,
    log: Annotated[
        str | None, path("RUN", "Also write the figures to TensorBoard, for the run that drew the samples.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema/--no-ema", help="With --likelihood: use the averaged weights.")] = True,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare samples with a shard set: FID and other figures.

    Each figure has a 95 % interval. Several processes can share the work.
    Features of each shard are computed once and stored; the same command again computes only missing features.
    """
    from pipeline import evaluate as job

    if likelihood:
        if against or features or nearest or log:
            raise ConfigError(
                "--likelihood goes with --cache only: leave --against, --features, --nearest and --log out"
            )
        if dry_run:
            report_forecast(job.forecast_likelihood(source, likelihood, cache=cache, ema=ema), as_json=as_json)
            return
        result = job.likelihood(source, likelihood, cache=cache, ema=ema, quiet=quiet)
    elif not (against and features):
        raise ConfigError("give --against SHARDSET and --features FILE|inception, or --likelihood SHARDSET")
    else:
        request = job.EvaluationRequest(source, against, features, cache=cache, nearest=nearest, log=log)
        if dry_run:
            report_forecast(job.forecast(request), as_json=as_json)
            return
        result = job.evaluate(request, quiet=quiet)
    messages.result(json.dumps(result) if as_json else job.as_table(result))
