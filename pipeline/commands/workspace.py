"""Commands of a working directory: init, show, runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline import arguments, messages
from pipeline.commands.options import AsJson, Quiet, path


def init(
    out: Annotated[
        str,
        typer.Argument(
            callback=arguments.expand_homes, metavar="[DIR]", help="Directory to copy into; created if missing."
        ),
    ] = ".",
    quiet: Quiet = False,
) -> None:
    """Copy configurations and launch scripts into a directory. Existing files are kept."""
    from pipeline import init as job

    result = job.init(out)
    if not quiet:
        messages.summary(job.as_text(out, result))


def show(
    source: Annotated[
        str,
        typer.Argument(callback=arguments.expand_homes, metavar="PATH", help="A file, directory or URL."),
    ],
    preview: Annotated[
        str | None,
        path("FILE.png", "Also write the newest preview of a run, or the first images of a set."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what PATH is, its progress, and the command to use next.

    PATH is a run, checkpoint, set, model or a directory of images.
    """
    from pipeline import show as job

    shown = job.show(source, preview)
    messages.result(json.dumps(job.as_json(shown)) if as_json else job.as_text(shown))


def runs(
    directory: Annotated[
        str,
        typer.Argument(callback=arguments.expand_homes, metavar="[DIR]", help="Directory or URL that contains runs."),
    ] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs in a directory.

    State, step, loss, last checkpoint, and time since the last line of the log.
    """
    from pipeline import runs as job

    found = job.runs(directory)
    messages.result(json.dumps(found) if as_json else job.as_text(found))
