"""Commands of runs: train, plan, doctor."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline import arguments, messages
from pipeline.commands.options import AsJson, ConfigFile, DryRun, Quiet, Settings, path, report_forecast
from pipeline.errors import DataError


def train(
    config: ConfigFile,
    settings: Settings = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Let a resumed run change this key, such as train.lr; otherwise the change is refused."
        ),
    ] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Train, or resume the run in run.dir. With many processes: accelerate launch -m pipeline.train --config C.yaml."""
    from pipeline.cluster.launch_environment import process_rank
    from pipeline.config_file import check_keys
    from pipeline.train import forecast
    from pipeline.train import train as job

    check_keys(override or ())
    loaded = arguments.configuration(config, settings or (), processes=process_rank().size)
    if not dry_run:
        job(loaded, overrides=override or (), quiet=quiet)
    elif found := forecast(loaded, overrides=override or ()):
        report_forecast(found)


def plan(
    config: ConfigFile,
    settings: Settings = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Number of images in the shard set; shows the steps of an epoch.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="24GiB", help="Memory of the GPU; shows what fits.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="GPU (h100, a100, 4090, …); shows images/s at 40 % of its bf16 peak."),
    ] = None,
    flops: Annotated[
        float | None, typer.Option(metavar="400e12", min=1, help="FLOP/s that you have measured, instead of --gpu.")
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(metavar="2.50", min=0, help="Price of the GPU for one hour; shows the cost of the run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a configuration needs before it runs.

    That is GPU memory, time, possible numbers of processes and disk space.
    """
    memory_bytes = arguments.memory(memory) if memory else None
    from pipeline import plan as job

    loaded = arguments.configuration(config, settings or ())
    result = job.plan(loaded, samples) | job.on_a_gpu(
        loaded, memory_bytes=memory_bytes, gpu=gpu, flops=flops, samples=samples, price=price
    )
    messages.result(json.dumps(result) if as_json else job.as_text(result))


def doctor(
    run: Annotated[str | None, path("RUN", "Also show the state of this run.")] = None, as_json: AsJson = False
) -> None:
    """Show what this machine has and what a run here lacks.

    Also shows how a run would work here. Exit code 3: no run is possible.
    """
    from pipeline import doctor as job

    report = job.examine(run)
    messages.result(json.dumps(report) if as_json else job.as_text(report))
    if not report["ok"]:
        raise DataError("no run is possible here: install or correct what is listed as missing above")
