"""The `ddpm` command: parse, call one job, map errors to exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer

from pipeline.errors import ConfigError, DataError, PipelineError, Stopped
from pipeline.run.interrupt import signals_to

_INTERRUPTED = 130

# Jobs are imported where they are called, so that `ddpm --help` does not wait for torch.

app = typer.Typer(
    help="DDPM at cluster scale: images → shards → run → samples.\n\nExit codes: 0 done, 2 usage or configuration, "
    "3 data refused, 4 no valid checkpoint, 75 stopped on request and resumable, 130 interrupted twice, 1 a bug.",
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

Quiet = Annotated[bool, typer.Option("--quiet", help="Show warnings and errors only.")]
MaxBadFraction = Annotated[
    float, typer.Option(min=0, max=1, help="More unusable inputs than this share end with exit code 3.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def shard(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Folders (recursive), zip, tar, parquet, npz, npy, CIFAR batches, pictures; paths, fsspec URLs, globs.",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="SHARDSET", help="Directory or URL of the shard set to write.")],
    size: Annotated[str, typer.Option(metavar="PX|HxW", help="Size of the pictures in pixels.")],
    labels: Annotated[
        str,
        typer.Option(
            metavar="folder|none|FILE.csv",
            help="Class of a picture: its folder's name or what the source says, none, or as a CSV file has it.",
        ),
    ] = "folder",
    crop: Annotated[
        Literal["center", "none", "random"],
        typer.Option(
            help="Cut to the target's shape in the middle, at a keyed random place, or not (refuses other shapes)."
        ),
    ] = "center",
    pad: Annotated[
        bool,
        typer.Option("--pad", help="With --crop none: keep pictures whole, on the background; never enlarge them."),
    ] = False,
    channels: Annotated[int, typer.Option(min=1, max=3, help="3 for colour, 1 for grey.")] = 3,
    format: Annotated[Literal["png", "jpeg", "webp"], typer.Option(help="How pictures are stored.")] = "png",
    shard_samples: Annotated[int, typer.Option(min=1, help="Inputs to a shard.")] = 1000,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes; 0: one for each core. The result does not depend on it.")
    ] = 0,
    max_bad_fraction: MaxBadFraction = 0.05,
    min_size: Annotated[int, typer.Option(min=1, help="Reject pictures whose short side has fewer pixels.")] = 1,
    background: Annotated[str, typer.Option(help="Colour behind transparent and around padded ones.")] = "#ffffff",
    dedupe: Annotated[
        Literal["exact", "near"] | None,
        typer.Option(help="Reject pictures that repeat an earlier one: its very pixels, or nearly. Default: off."),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="Make only the I-th of N equal parts, from 0; the last to end makes the index."
        ),
    ] = "0/1",
    preview: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Also a sheet of 100 pictures spread over the finished set.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also reference statistics of these features, for `ddpm evaluate`."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a shard set made from other sources or settings.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write images into a shard set. Run again, it goes on where it stopped."""
    from pipeline.shard import shard as job

    summary = job(
        sources, out, size=_size(size), labels=labels, crop=crop, pad=pad, channels=channels, format=format,
        shard_samples=shard_samples, workers=workers, max_bad_fraction=max_bad_fraction, min_size=min_size,
        background=background, dedupe=dedupe or "none", part=part, preview=preview, features=features,
        overwrite=overwrite, quiet=quiet,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(summary.as_dict()))
    elif not quiet:
        typer.echo(summary.as_text())


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="SHARDSET|SAMPLES|RUN|CHECKPOINT", help="What to check.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte against index, manifests and hashes; name what is wrong."""
    from pipeline.verify import verify as job

    findings = job(path, quiet=quiet)
    if as_json:
        typer.echo(json.dumps({"path": path, "sound": not findings, "findings": findings}))
    elif findings:
        typer.echo("\n".join(findings))
    elif not quiet:
        typer.echo(f"{path}: sound")
    if findings:
        raise DataError(
            f"{path}: {len(findings)} finding{'s' * (len(findings) > 1)}, see above: restore these files, or make them again"
        )


@app.command()
def index(
    tars: Annotated[
        list[str],
        typer.Argument(metavar="TARS...", help="Tars, or folders of them: paths, fsspec URLs, globs, lists in braces."),
    ],
    out: Annotated[str, typer.Option(metavar="SHARDSET", help="Directory or URL of the set; may be that of the tars.")],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PX|HxW", help="Bring each picture to this size when it is read. Default: as they all are."
        ),
    ] = None,
    channels: Annotated[int | None, typer.Option(min=1, max=3, help="3 for colour, 1 for grey. Default: 3.")] = None,
    labels: Annotated[
        Literal["auto", "none"],
        typer.Option(help="Class of a picture: the number in its .cls, else its .json; or none."),
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Tars read side by side; 0: one for each core. The result does not depend on it.")
    ] = 0,
    max_bad_fraction: MaxBadFraction = 0.05,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make tars that are there, a webdataset or the parts of a shard set, a shard set without copying them."""
    from pipeline.index import index as job

    summary = job(
        tars, out, size=_size(size) if size else None, channels=channels, labels=labels, workers=workers,
        max_bad_fraction=max_bad_fraction, quiet=quiet,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(summary.as_dict()))
    elif not quiet:
        typer.echo(summary.as_text())


@app.command()
def train(
    config: Annotated[str, typer.Option(metavar="C.yaml", help="The run's configuration.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value...]", help="Settings that replace those of the file, such as train.lr=1e-4."
        ),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Change this key of a run although it is frozen.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train, or go on with the run in run.dir. Many processes: accelerate launch -m pipeline.train --config C.yaml."""
    from pipeline import configfile
    from pipeline.train import train as job

    job(configfile.load(config, settings or (), _read_text), insist=override or (), quiet=quiet)


@app.command()
def sample(
    source: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT|DIFFUSERS_DIR", help="The trained model.")],
    seeds: Annotated[
        str, typer.Option(metavar="A-B|A|LIST", help="One picture for each seed: A-B inclusive, A, or a comma list.")
    ],
    out: Annotated[str | None, typer.Option(metavar="SAMPLES", help="Directory or URL of the sample set.")] = None,
    sampler: Annotated[
        Literal["ddpm", "ddim", "dpmpp", "heun"] | None, typer.Option(help="Default: the run's sample.sampler.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps. Default: the run's; else all for ddpm, 50 for others.")
    ] = None,
    eta: Annotated[float | None, typer.Option(min=0, max=1, help="DDIM's noise, 0 to 1.")] = None,
    spacing: Annotated[
        Literal["uniform", "quadratic", "trailing", "leading"] | None,
        typer.Option(help="Which timesteps a short sampler visits."),
    ] = None,
    variance: Annotated[
        Literal["fixed_large", "fixed_small"] | None, typer.Option(help="Of a ddpm step: β, or the posterior's.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures drawn together; bits are equal only for equal batch.")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the network first, which pays in large sets.")
    ] = None,
    shard_samples: Annotated[
        int | None, typer.Option(min=1, help="Seeds in a shard, a multiple of batch. Default: 1 to 4 batches.")
    ] = None,
    format: Annotated[
        Literal["tar", "png", "npz"], typer.Option(help="Tars of PNGs (a shard set), loose PNGs, or one npz a shard.")
    ] = "tar",
    label: Annotated[
        int | None, typer.Option(min=0, help="Class of all pictures. Default: all classes in turn, by seed.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Also a sheet of the first 100 pictures.")
    ] = None,
    video: Annotated[
        str | None, typer.Option(metavar="FILE.mp4", help="Also a video of the denoising of the first ones.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema/--no-ema", help="Averaged weights, or those of the last step.")] = True,
    precision: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of the network. Default: as trained.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="PX|HxW", help="Size of the pictures. Default: as trained.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw samples. Any number of processes share the work; run again, only what is missing is drawn."""
    from pipeline import sample as job

    flags = {"sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing,
             "variance": variance, "batch": batch, "compile": compile, "guidance": guidance}  # fmt: skip
    result = job.from_flags(
        source, {key: value for key, value in flags.items() if value is not None}, seeds=seeds, out=out, format=format,
        shard_samples=shard_samples, label=label, grid=grid, video=video, ema=ema, precision=precision,
        size=_size(size) if size else None, quiet=quiet,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))


@app.command()
def plan(
    config: Annotated[str, typer.Option(metavar="C.yaml", help="The run's configuration.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value...]", help="Settings that replace those of the file."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Pictures in the shard set: lengths in epochs are shown in steps.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="24GiB", help="Memory of a GPU: what fits it is shown.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="h100, a100, 4090, …: images/s at 40 % of its peak rate in bf16 are shown."),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(metavar="400e12", min=1, help="FLOP/s as measured while training: replaces the rate of --gpu."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a configuration means before it runs: memory and time on a GPU, numbers of processes, sizes on disk."""
    memory_bytes = _bytes(memory) if memory else None
    from pipeline import configfile
    from pipeline import plan as job

    loaded = configfile.load(config, settings or (), _read_text)
    result = job.plan(loaded, samples) | job.on_a_gpu(loaded, memory_bytes=memory_bytes, gpu=gpu, flops=flops)
    typer.echo(json.dumps(result) if as_json else job.as_text(result))


@app.command()
def doctor(
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Say also where this run stands.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, what a run here would do, and what is missing. Exit code 3: something necessary is."""
    from pipeline import doctor as job

    report = job.examine(run)
    typer.echo(json.dumps(report) if as_json else job.as_text(report))
    if not report["ok"]:
        raise DataError("no run can be made here: mend what is listed as missing above")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit code."""
    with signals_to(_stop):  # until a job looks for stop requests itself there is nothing to bring to an end first
        try:
            code = app(
                sys.argv[1:] or ["--help"] if arguments is None else arguments, prog_name="ddpm", standalone_mode=False
            )  # an exit code where the parser ends it
        except PipelineError as error:
            _leave(str(error), error.exit_code)
        except typer.Abort as error:  # what the parser makes of an EOFError
            _leave(f"a file ends too early ({error.__cause__}): copy or make it again", DataError.exit_code)
        except Exception as error:
            if not hasattr(error, "format_message"):  # not one of the parser's own: a bug, so the traceback is wanted
                raise
            _leave(
                f"{' '.join(error.format_message().split())} `ddpm --help` and `ddpm JOB --help` list what there is.", 2
            )
    if code == _INTERRUPTED:
        _leave("interrupted: finished parts stay, the same command goes on from there", _INTERRUPTED)
    sys.exit(code or 0)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _leave(f"stopped by {signal.Signals(number).name}: the same command goes on from there", Stopped.exit_code)


def _leave(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    for line in message.splitlines():
        sys.stderr.write(f"ddpm{'' if rank == '0' else f' (rank {rank})'}: {line}\n")
    sys.exit(code)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise ConfigError(f"--size {text}: write a number of pixels, or height x width as in 96x64")
    return int(match[1]), int(match[2] or match[1])


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MiB|GiB|GB)", text)
    if not match or not float(match[1]):
        raise ConfigError(f"--memory {text}: write a number and MiB, GiB or GB, as in 24GiB")
    return int(float(match[1]) * {"MiB": 2**20, "GiB": 2**30, "GB": 10**9}[match[2]])


def _read_text(name: str) -> str:
    from pipeline import storage

    try:
        return storage.read_bytes(name).decode()
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such configuration file") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ConfigError(f"{name} is not a YAML file") from None
