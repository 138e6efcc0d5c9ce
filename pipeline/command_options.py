"""Options that several commands of `ddpm` share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline import arguments

Quiet = Annotated[bool, typer.Option("--quiet", help="Show warnings and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def path(metavar: str, help: str) -> Any:
    """An option that is a path or URL."""
    return typer.Option(callback=arguments.expand_homes, metavar=metavar, help=help)
