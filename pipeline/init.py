"""Job: copy the configurations and launch scripts that the package holds into a directory, to edit them there."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable

from pipeline.errors import ConfigError
from pipeline.storage import files

DIRECTORIES = ("configs", "launch")
"""In the wheel they lie in the package, in the repository a link leads there from it."""


def init(out: str) -> dict[str, list[str]]:
    """Copy configurations and launch scripts; files that exist are left as they are.

    Args:
        out: a directory, which may exist, or a URL.

    Returns:
        `written` and `kept`: names of files, relative to `out`.

    Raises:
        ConfigError: `out` is a file, or the package was installed without these files.
        DataError: a file cannot be written.
    """
    if files.exists(out) and not files.is_dir(out):
        raise ConfigError(f"{out} is a file: give a directory")
    result: dict[str, list[str]] = {"written": [], "kept": []}
    for directory in DIRECTORIES:
        source = package_files("pipeline") / directory
        if not source.is_dir():
            raise ConfigError(f"this installation has no {directory}: install ddpm-pipeline again, from its wheel")
        for name, content in _content(source, directory):
            made = files.create(files.join(out, name), content)
            result["written" if made else "kept"].append(name)
    return result


def as_text(out: str, result: dict[str, list[str]]) -> str:
    """What was copied, and the next command."""
    kept = f", {len(result['kept'])} that exist are left as they are" * bool(result["kept"])
    return (
        f"{out}: {len(result['written'])} files copied to {out}/configs and {out}/launch{kept}\n"
        f"next: ddpm plan --config {out}/configs/64px.yaml"
    )


def _content(source: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    """Every file below a directory: its name below `name`, and its bytes."""
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _content(entry, f"{name}/{entry.name}")
        else:
            yield f"{name}/{entry.name}", entry.read_bytes()
