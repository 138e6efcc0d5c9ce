"""The `ddpm` command: parse, call one job, map errors to exit codes."""

from __future__ import annotations

import json
import signal
import sys
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer

from pipeline import arguments, cli_interchange, messages
from pipeline.cluster.interrupt import signals_to
from pipeline.cluster.launch_environment import count
from pipeline.command_options import AsJson, Quiet
from pipeline.command_options import path as _path
from pipeline.config import FixedVariance, SamplingOptions
from pipeline.errors import DataError, PipelineError, Stopped
from pipeline.solvers import SamplerName, Spacing

_INTERRUPTED = 130

# Jobs are imported where they are called, so that `ddpm --help` does not wait for torch.

app = typer.Typer(
    help="DDPM at cluster scale: images → shards → run → samples.\n\nExit codes: 0 done, 2 usage or configuration, "
    "3 data refused, 4 no valid checkpoint, 75 stopped on request and resumable, 130 interrupted twice, 1 a bug.",
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

MaxBadFraction = Annotated[float, typer.Option(min=0, max=1, help="Largest share of inputs, 0 to 1, that may be rejected; with more, the command fails with exit code 3.")]  # fmt: skip
ImageExt = Annotated[str | None, typer.Option(metavar="EXT[,EXT...]", help="Extensions of the images in tars, such as jpg. Default: any image format; of several images of a sample the one with the simplest extension (jpg before seg.png).")]  # fmt: skip
ConfigFile = Annotated[str, typer.Option(metavar="C.yaml", help="Configuration of the run, a YAML file.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[key=value...]", help="Settings that replace those of the file, such as train.lr=1e-4.")]  # fmt: skip
Workers = Annotated[int, typer.Option(min=0, help="Worker processes; 0: one for each CPU core. The result does not depend on it.")]  # fmt: skip


def _sampling(key: str, *names: str, **options: Any) -> Any:
    """An option that is a key of the configuration's section `sample`; its help is the description there."""
    return typer.Option(*names, help=SamplingOptions.model_fields[key].description, **options)


@app.command()
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
    out: Annotated[str, _path("SHARDSET", "Directory or URL of the shard set to write.")],
    size: Annotated[
        str, typer.Option(metavar="PX|HxW", help="Size of the images in pixels: the side, or height x width.")
    ],
    labels: Annotated[
        str,
        _path(
            "folder|none|FILE.csv",
            "Where the class of an image comes from. folder: the name of its directory, or the label in the source; "
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
    min_size: Annotated[
        int, typer.Option(min=1, help="Reject images whose shorter side is below this, in pixels.")
    ] = 1,
    background: Annotated[str, typer.Option(help="Color of transparent areas and of the padding.")] = "#ffffff",
    dedupe: Annotated[
        Literal["exact", "near"] | None,
        typer.Option(help="Reject repeated images. exact: equal pixels; near: almost equal. Default: keep."),
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Write part I of N; the first is 0. The last job writes the index.")
    ] = "0/1",
    preview: Annotated[
        str | None, _path("FILE.png", "Also write a sheet of 100 images from all over the finished shard set.")
    ] = None,
    features: Annotated[
        str | None,
        _path("FILE", "Also write statistics of the images under this feature network, for `ddpm evaluate`."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a shard set of other sources or settings.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write images into a shard set. After an interruption, the same command continues."""
    from pipeline.data.shards.settings import ShardSettings
    from pipeline.shard import shard as job

    settings = ShardSettings(
        size=arguments.size(size), channels=channels, crop=crop, pad=pad, format=format, labels=labels,
        background=background, min_size=min_size, dedupe=dedupe or "none", shard_samples=shard_samples,
    )  # fmt: skip
    summary = job(
        sources, out, settings, image_ext=image_ext, workers=workers, max_bad_fraction=max_bad_fraction, part=part,
        overwrite=overwrite, preview=preview, features=features, quiet=quiet,
    )  # fmt: skip
    if as_json:
        messages.summary(json.dumps(summary.as_dict()))
    elif not quiet:
        messages.summary(summary.as_text())


@app.command()
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
    """Read every file, compare it with its index or manifest, and list what is damaged or missing."""
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


@app.command()
def index(
    tars: Annotated[
        list[str],
        typer.Argument(
            callback=arguments.expand_homes,
            metavar="TARS...",
            help="Tars, or directories with tars: paths, fsspec URLs, globs, braces such as a-{000..099}.tar.",
        ),
    ],
    out: Annotated[str, _path("SHARDSET", "Directory or URL for the index; may be the directory of the tars.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="PX|HxW", help="Resize images to this size when they are read. Default: their own."),
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
    """Turn existing tars (a webdataset, or parts of a shard set) into a shard set: write an index, copy nothing."""
    from pipeline.data.shards.settings import IndexSettings
    from pipeline.index import index as job

    given = {"size": arguments.size(size) if size else None, "channels": channels, "image_ext": image_ext}
    settings = IndexSettings(labels=labels, **{name: value for name, value in given.items() if value is not None})
    summary = job(tars, out, settings, workers=workers, max_bad_fraction=max_bad_fraction, quiet=quiet)
    if as_json:
        messages.summary(json.dumps(summary.as_dict()))
    elif not quiet:
        messages.summary(summary.as_text())


@app.command()
def train(
    config: ConfigFile,
    settings: Settings = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Allow a resumed run to change this key, such as train.lr, which it otherwise keeps."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train, or resume the run in run.dir. With many processes: accelerate launch -m pipeline.train --config C.yaml."""
    from pipeline.cluster.launch_environment import process_rank
    from pipeline.config_file import check_keys
    from pipeline.train import train as job

    check_keys(override or ())
    loaded = arguments.configuration(config, settings or (), processes=process_rank().size)
    job(loaded, overrides=override or (), quiet=quiet)


@app.command()
def sample(
    source: Annotated[
        str,
        typer.Argument(
            callback=arguments.expand_homes,
            metavar="RUN|CHECKPOINT|DIFFUSERS_DIR",
            help="The trained model: a run, one of its checkpoints, or a directory of diffusers.",
        ),
    ],
    seeds: Annotated[
        str,
        typer.Option(
            metavar="A-B|A|LIST", help="Draw one image for each seed: A-B (both included), A, or a comma list of both."
        ),
    ],
    out: Annotated[str | None, _path("SAMPLES", "Directory or URL of the sample set to write or to extend.")] = None,
    sampler: Annotated[SamplerName | None, _sampling("sampler")] = None,
    steps: Annotated[int | None, _sampling("steps", min=1)] = None,
    eta: Annotated[float | None, _sampling("eta", min=0, max=1)] = None,
    spacing: Annotated[Spacing | None, _sampling("spacing")] = None,
    variance: Annotated[FixedVariance | None, _sampling("variance")] = None,
    batch: Annotated[int | None, _sampling("batch", min=1)] = None,
    compile: Annotated[bool | None, _sampling("compile", "--compile/--no-compile")] = None,
    label: Annotated[int | None, _sampling("label", min=0)] = None,
    guidance: Annotated[float | None, _sampling("guidance", min=0)] = None,
    guidance_interval: Annotated[str | None, _sampling("guidance_interval", metavar="FIRST-LAST")] = None,
    dynamic_threshold: Annotated[float | None, _sampling("dynamic_threshold", min=0, max=1)] = None,
    precision: Annotated[Literal["bf16", "fp32"] | None, _sampling("precision")] = None,
    size: Annotated[str | None, _sampling("size", metavar="PX|HxW")] = None,
    guide: Annotated[
        str | None, _path("RUN|CHECKPOINT", "Worse model for autoguidance, such as an earlier checkpoint of the run.")
    ] = None,
    shard_samples: Annotated[
        int | None, typer.Option(min=1, help="Seeds in a shard, a multiple of --batch. Default: 1 to 4 batches.")
    ] = None,
    format: Annotated[
        Literal["tar", "png", "npz"],
        typer.Option(help="tar: tars of PNGs, a shard set; png: a PNG for each seed; npz: an array for each shard."),
    ] = "tar",
    grid: Annotated[str | None, _path("FILE.png", "Also write a sheet of the first 100 images.")] = None,
    video: Annotated[
        str | None, _path("FILE.mp4", "Also write a video of how the first images emerge from noise.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Use the averaged weights, or those of the last training step.")
    ] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw samples. Any number of processes share the work; the same command again draws only missing images.

    Options from --sampler to --size that are not given are those of the sample set if it was begun, else of the run.
    """
    from pipeline import sample as job
    from pipeline.data.shards.sample_set import parse_seeds
    from pipeline.sampling.options import SamplingRequest

    options = {"sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing,
               "variance": variance, "batch": batch, "compile": compile, "guidance": guidance,
               "guidance_interval": arguments.interval(guidance_interval) if guidance_interval else None,
               "dynamic_threshold": dynamic_threshold, "precision": precision, "label": label,
               "size": arguments.size(size) if size else None}  # fmt: skip
    request = SamplingRequest(
        source, parse_seeds(seeds), {key: value for key, value in options.items() if value is not None}, out=out,
        format=format, shard_samples=shard_samples, grid=grid, video=video, ema=ema, guide=guide,
    )  # fmt: skip
    result = job.sample(request, quiet=quiet)
    if as_json:
        messages.summary(json.dumps(result))


app.command()(cli_interchange.export)
app.command("import")(cli_interchange.import_model)


@app.command()
def plan(
    config: ConfigFile,
    settings: Settings = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Images in the shard set, to show epochs in steps.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="24GiB", help="Memory of the GPU: marks what fits.")] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="h100, a100, 4090, …: shows images/s at 40 % of its bf16 peak.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(metavar="400e12", min=1, help="FLOP/s measured in training, instead of --gpu.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a configuration needs before it runs: memory and time on a GPU, numbers of processes, sizes on disk."""
    memory_bytes = arguments.memory(memory) if memory else None
    from pipeline import plan as job

    loaded = arguments.configuration(config, settings or ())
    result = job.plan(loaded, samples) | job.on_a_gpu(loaded, memory_bytes=memory_bytes, gpu=gpu, flops=flops)
    messages.result(json.dumps(result) if as_json else job.as_text(result))


@app.command()
def doctor(
    run: Annotated[str | None, _path("RUN", "Also show the state of this run.")] = None, as_json: AsJson = False
) -> None:
    """Show what this machine has, how a run here would work, and what is missing. Exit code 3: a run is impossible."""
    from pipeline import doctor as job

    report = job.examine(run)
    messages.result(json.dumps(report) if as_json else job.as_text(report))
    if not report["ok"]:
        raise DataError("no run can be made here: mend what is listed as missing above")


def main(words: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its exit code."""
    messages.prepare_streams()
    words = (sys.argv[1:] if words is None else words) or ["--help"]
    with signals_to(_exit_on_signal):  # until a job handles stop requests itself, nothing needs to be finished first
        try:
            code = app(words, prog_name="ddpm", standalone_mode=False)  # an exit code where the parser ends it
        except PipelineError as error:
            _exit(str(error), error.exit_code)
        except typer.Abort as error:  # typer raises it for an EOFError
            _exit(f"a file ends too early ({error.__cause__}): copy or make it again", DataError.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and "--help" in words:
                _exit(f"the help cannot be written: {error.strerror}", DataError.exit_code)
            if not hasattr(error, "format_message"):  # not an error of the parser but a bug: show the traceback
                raise
            _exit(
                f"{' '.join(error.format_message().split())} `ddpm --help` and `ddpm JOB --help` list what there is.", 2
            )
    if code == _INTERRUPTED:
        _exit("interrupted: finished parts stay, the same command continues from there", _INTERRUPTED)
    sys.exit(code or 0)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    _exit(f"stopped by {signal.Signals(number).name}: the same command continues from there", Stopped.exit_code)


def _exit(message: str, code: int) -> NoReturn:
    rank = count("RANK", 0)
    for line in message.splitlines():
        messages.error(f"ddpm{f' (rank {rank})' if rank else ''}: {line}")
    sys.exit(code)
