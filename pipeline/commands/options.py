"""Options that several commands have."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipeline import arguments, messages
from pipeline.forecast import Forecast

Quiet = Annotated[bool, typer.Option("--quiet", help="Show warnings and errors only.")]
MaxBadFraction = Annotated[float, typer.Option(min=0, max=1, help="Largest share of inputs, 0 to 1, that may be rejected. If more are rejected, the command fails with exit code 3.")]  # fmt: skip
ImageExt = Annotated[str | None, typer.Option(metavar="EXT[,EXT...]", help="Extensions of the images in tars, such as jpg. Default: any image format; if a sample has several images, the image with the plain extension (jpg, not seg.png).")]  # fmt: skip
ConfigFile = Annotated[str, typer.Option(metavar="C.yaml", help="Configuration of the run, a YAML file.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[key=value...]", help="Settings that replace values of the file, such as train.lr=1e-4.")]  # fmt: skip
Workers = Annotated[int, typer.Option(min=0, help="Worker processes; 0: one for each CPU core. The result does not depend on their number.")]  # fmt: skip
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show time and size, write nothing.")]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def path(metavar: str, help: str, *names: str) -> Any:
    """An option that is a path or URL."""
    return typer.Option(*names, callback=arguments.expand_homes, metavar=metavar, help=help)


def report_forecast(forecast: Forecast, *, as_json: bool = False) -> None:
    """Write what a command would do to standard output."""
    messages.result(json.dumps(forecast.as_json()) if as_json else forecast.as_text())
