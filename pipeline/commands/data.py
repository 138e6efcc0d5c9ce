"""Commands of shard sets: shard, verify, index."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from pipeline import arguments, messages
from pipeline.commands.options import (
    AsJson,
    DryRun,
    ImageExt,
    MaxBadFraction,
    Quiet,
    Workers,
    path,
    report_forecast,
)
from pipeline.errors import DataError


def shard(
    sources: Annotated[
        list[str],
        typer.Argument(
            callback=arguments.expand_homes,
            metavar="SOURCE...",
            help="Directories (with subdirectories), zip, tar, parquet, npz or npy files, CIFAR batches, single images: "
            "paths, fsspec URLs, globs.",
        ),
    ],
    out: Annotated[str, path("SHARDSET", "Directory or URL of the shard set to write.")],
    size: Annotated[str, typer.Option(metavar="PX|HxW", help="Size in pixels: the side, or height x width.")],
    labels: Annotated[
        str,
        path(
            "folder|none|FILE.csv",
            "Source of the classes. folder: the name of the image's directory, or the label in the source; "
            "none: no classes; FILE.csv: a table of file names and classes.",
        ),
    ] = "folder",
    crop: Annotated[
        Literal["center", "none", "random"],
        typer.Option(
            help="How to cut an image of another aspect ratio. center: keep its middle; none: reject it; random: keep a "
            "random part, the same in each run."
        ),
    ] = "center",
    pad: Annotated[
        bool, typer.Option("--pad", help="With --crop none: fit the image in and fill the rest with --background.")
    ] = False,
    channels: Annotated[int, typer.Option(min=1, max=3, help="Channels of the images: 3 for color, 1 for grey.")] = 3,
    format: Annotated[Literal["png", "jpeg", "webp"], typer.Option(help="Format of the images.")] = "png",
    shard_samples: Annotated[int, typer.Option(min=1, help="Inputs in a shard, which is one tar.")] = 1000,
    workers: Workers = 0,
    image_ext: ImageExt = None,
    max_bad_fraction: MaxBadFraction = 0.05,
    min_size: Annotated[int, typer.Option(min=1, help="Reject images whose shorter side has fewer pixels.")] = 1,
    background: Annotated[
        str, typer.Option(metavar="COLOR", help="Color of transparent areas and of the padding.")
    ] = "#ffffff",
    dedupe: Annotated[
        Literal["exact", "near"] | None,
        typer.Option(
            help="Reject repeated images. exact: equal pixels; near: almost equal pixels. Default: keep them."
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Write part I of N, counted from 0. The job that begins first lists the inputs for all of them, the job "
            "that finishes last writes the index.",
        ),
    ] = "0/1",
    preview: Annotated[
        str | None, path("FILE.png", "Also write a grid of 100 images, spread evenly over the finished shard set.")
    ] = None,
    features: Annotated[
        str | None,
        path("FILE", "Also compute the features of the images with this network, for `ddpm evaluate`."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a shard set that has other sources or settings.")
    ] = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write images into a shard set. After an interruption, the same command continues."""
    from pipeline.data.shards.settings import ShardSettings
    from pipeline.shard import forecast
    from pipeline.shard import shard as job

    settings = ShardSettings(
        size=arguments.size(size), channels=channels, crop=crop, pad=pad, format=format, labels=labels,
        background=background, min_size=min_size, dedupe=dedupe or "none", shard_samples=shard_samples,
    )  # fmt: skip
    if dry_run:
        report_forecast(
            forecast(sources, out, settings, image_ext=image_ext, workers=workers, part=part, overwrite=overwrite,
                     features=features),
            as_json=as_json,
        )  # fmt: skip
        return
    summary = job(
        sources, out, settings, image_ext=image_ext, workers=workers, max_bad_fraction=max_bad_fraction, part=part,
        overwrite=overwrite, preview=preview, features=features, quiet=quiet,
    )  # fmt: skip
    if as_json:
        messages.summary(json.dumps(summary.as_dict()))
    elif not quiet:
        messages.summary(summary.as_text())


def verify(
    path: Annotated[
        str,
        typer.Argument(
            callback=arguments.expand_homes,
            metavar="SHARDSET|SAMPLES|RUN|CHECKPOINT",
            help="Directory or URL to check.",
        ),
    ],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Read every file and list what is damaged or missing. Each is compared with its index or manifest."""
    from pipeline.verify import verify as job

    findings = job(path, quiet=quiet)
    if as_json:
        messages.result(json.dumps({"path": path, "sound": not findings, "findings": findings}))
    elif findings:
        messages.result("\n".join(findings))
    elif not quiet:
        messages.result(f"{path}: sound")
    if findings:
        raise DataError(
            f"{path}: {len(findings)} finding{'s' * (len(findings) > 1)}, see above: restore these files, or make them again"
        )


def index(
    tars: Annotated[
        list[str],
        typer.Argument(
            callback=arguments.expand_homes,
            metavar="TARS...",
            help="Tars, or directories with tars: paths, fsspec URLs, globs, braces such as a-{000..099}.tar.",
        ),
    ],
    out: Annotated[str, path("SHARDSET", "Directory or URL for the index; may be the directory of the tars.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="PX|HxW", help="Resize images to this size when they are read. Default: do not resize."),
    ] = None,
    channels: Annotated[int | None, typer.Option(min=1, max=3, help="3 for color, 1 for grey. Default: 3.")] = None,
    labels: Annotated[
        Literal["auto", "none"],
        typer.Option(help="auto: the class of an image is in its .cls file, else in its .json file; none: no classes."),
    ] = "auto",
    workers: Workers = 0,
    image_ext: ImageExt = None,
    max_bad_fraction: MaxBadFraction = 0.05,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a shard set of existing tars: write an index, copy nothing. The tars: a webdataset, or parts of a shard set."""
    from pipeline.data.shards.settings import IndexSettings
    from pipeline.index import index as job

    given = {"size": arguments.size(size) if size else None, "channels": channels, "image_ext": image_ext}
    settings = IndexSettings(labels=labels, **{name: value for name, value in given.items() if value is not None})
    summary = job(tars, out, settings, workers=workers, max_bad_fraction=max_bad_fraction, quiet=quiet)
    if as_json:
        messages.summary(json.dumps(summary.as_dict()))
    elif not quiet:
        messages.summary(summary.as_text())
