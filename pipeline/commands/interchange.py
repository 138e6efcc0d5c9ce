"""The commands `ddpm export` and `ddpm import`: models for and from other projects."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from pipeline import arguments, messages
from pipeline.commands.options import AsJson, Quiet, path


def export(
    source: Annotated[
        str,
        typer.Argument(
            callback=arguments.expand_homes, metavar="RUN|CHECKPOINT", help="The trained model: a run, or a checkpoint."
        ),
    ],
    out: Annotated[str, path("DIR", "Directory or URL to write; must be missing or empty.")],
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Export the averaged weights, or those of the last training step.")
    ] = True,
    samples: Annotated[
        str | None,
        path("SAMPLES", "Sample set of this model: its evaluation.json gives the figures of the model card."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for diffusers, with a model card.

    DDPMPipeline.from_pretrained(DIR) loads it. The card shows the newest preview.

    From the same noise, diffusers draws the same image as `ddpm sample --sampler ddpm`. `ddpm import` reads DIR again.
    """
    from pipeline.export import export as job

    result = job(source, out, ema=ema, samples=samples)
    if as_json:
        messages.summary(json.dumps(result))
    elif not quiet:
        messages.summary(
            f"{out}: {result['parameters']:,} parameters ({result['weights']}), and a model card without a licence: add "
            "the licence at the top of README.md"
        )


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            callback=arguments.expand_homes,
            metavar="DIFFUSERS_DIR|FILE.pt",
            help="A diffusers directory, ckpt.pt of w86763777/pytorch-ddpm, or model….pt or ema….pt of OpenAI's "
            "improved-diffusion or guided-diffusion.",
        ),
    ],
    out: Annotated[str, path("RUN", "Directory or URL of the run to write; must be missing or empty.")],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PX|HxW", help="FILE.pt: size of the images. Required, unless the file has noise of this size."
        ),
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="OpenAI: num_heads of training. Give this or --head-channels.")
    ] = None,
    head_channels: Annotated[
        int | None, typer.Option(min=1, help="OpenAI: num_head_channels of training, instead of --num-heads.")
    ] = None,
    attention_order: Annotated[
        Literal["legacy", "new"] | None,
        typer.Option(help="OpenAI: new if trained with use_new_attention_order. Default: legacy."),
    ] = None,
    schedule: Annotated[
        Literal["linear", "cosine"] | None, typer.Option(help="FILE.pt: noise schedule of training. Default: linear.")
    ] = None,
    timesteps: Annotated[
        int | None, typer.Option(min=2, help="OpenAI: diffusion_steps of training. Default: 1000.")
    ] = None,
    rescale_timesteps: Annotated[
        bool | None,
        typer.Option(
            "--rescale-timesteps/--no-rescale-timesteps",
            help="OpenAI: rescale_timesteps of training. Required, unless there are 1000 timesteps.",
        ),
    ] = None,
    prediction_type: Annotated[
        Literal["epsilon", "sample", "v_prediction"] | None,
        typer.Option(help="FILE.pt: what the network predicts; sample: predict_xstart, xstart. Default: epsilon."),
    ] = None,
    variance: Annotated[
        Literal["fixed_large", "fixed_small"] | None,
        typer.Option(help="FILE.pt: variance of a ddpm step, unless it is learned. Default: fixed_large."),
    ] = None,
    clip: Annotated[
        bool | None,
        typer.Option(
            "--clip/--no-clip",
            help="FILE.pt: clip estimates of the clean image when sampling. Default: as the sampler of that project: "
            "OpenAI clips, w86763777 does not.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a model of another project into a run.

    Use it with sample, verify, export, and with train.init_from of a new run.

    The new run cannot be resumed. No code in the file is executed. Options give what the weights do not show.
    """
    from pipeline.import_model import ImportSettings
    from pipeline.import_model import import_model as job

    settings = ImportSettings(
        arguments.size(size) if size else None, num_heads, head_channels, attention_order, schedule, timesteps,
        rescale_timesteps, prediction_type, variance, clip,
    )  # fmt: skip
    result = job(source, out, settings)
    if as_json:
        messages.summary(json.dumps(result))
    elif not quiet:
        taken = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["taken"].items())
        told = f"; values that no option gave: {taken}" if taken else ""
        messages.summary(f"{out}: {result['parameters']:,} parameters from {result['from']}{told}")
