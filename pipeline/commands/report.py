"""The command `ddpm report`: a page about a run for people who have no access to it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline import arguments, messages
from pipeline.commands.options import AsJson, Quiet, path


def report(
    run: Annotated[str, typer.Argument(callback=arguments.expand_homes, metavar="RUN", help="The run, finished or not.")],
    out: Annotated[str | None, path("FILE.html", "HTML file to write. Default: report.html in RUN.")] = None,
    samples: Annotated[str | None, path("SAMPLES", "Also show images of this sample set (in tars), and the figures and nearest images that `ddpm evaluate SAMPLES` found.")] = None,
    nearest: Annotated[str | None, path("FILE.png", "Image that `ddpm evaluate --nearest` wrote. Default: its newest image for SAMPLES.")] = None,
    previews: Annotated[int, typer.Option(min=1, max=200, help="Largest number of previews in the page, spread evenly over the run.")] = 24,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write one HTML page about a run.

    It shows curves, previews, samples, figures, data, restarts and the configuration.

    You can send the page as it is: it needs no other file and no network. It shows paths and host names of the run.
    """
    from pipeline import report as job

    result = job.report(job.ReportRequest(run, out, samples, nearest, previews))
    if as_json:
        messages.result(json.dumps(result))
    elif not quiet:
        messages.summary(
            f"{'replaced ' * result['replaced']}{result['out']}: {result['bytes'] / 1e6:.1f} MB, open it in a browser"
        )
