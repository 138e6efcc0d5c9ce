"""Patterns with wildcards and lists, `train-{000000..000099}.tar` or `photos/**/*.jpg` → the files that match."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

import braceexpand

from pipeline.data.sources import urls
from pipeline.errors import ConfigError
from pipeline.storage import files

_SPECIAL = re.compile(r"[*?\[{]")
_WILDCARD = re.compile(r"[*?\[]")


def is_pattern(url: str) -> bool:
    """Whether a name is a pattern; a file or directory of exactly this name comes first.

    The query of a web URL, after its `?`, is no part of a pattern.
    """
    return bool(_SPECIAL.search(urls.without_query(url))) and not files.exists(url)


def matches(pattern: str) -> dict[str, dict[str, Any]]:
    """The files and directories that match a pattern, sorted; with `**` only the files.

    Returns:
        Path or URL → what the store says of it, at least its `type`.

    Raises:
        ConfigError: nothing matches the pattern, or one name of its list.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        parts = list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError as error:
        raise ConfigError(f"{pattern}: {error}: correct the braces") from error
    for part in parts:
        matching = _matches_of_part(part)
        if not matching:
            # fsspec reports a web server that is out of reach as a missing file.
            server = ", and that its server answers" if files.is_remote(part) else ""
            raise ConfigError(f"{part}: nothing matches: check the name{server}")
        found |= matching
    if "**" in pattern:
        found = {path: info for path, info in found.items() if info["type"] != "directory"}
    return found


def root(pattern: str) -> str:
    """The innermost directory above all matches of a pattern: its part before the first wildcard."""
    return _SPECIAL.split(pattern, maxsplit=1)[0].rpartition("/")[0]


def _matches_of_part(part: str) -> dict[str, dict[str, Any]]:
    """The matches of a pattern without braces."""
    if files.exists(part):
        return {part: files.info(part) if files.is_remote(part) else _local_info(part)}
    if not _WILDCARD.search(urls.without_query(part)):
        return {}
    if files.is_remote(part):
        return dict(sorted(files.glob(part).items()))
    return {path: _local_info(path) for path in sorted(glob.glob(str(files.local(part)), recursive=True))}


def _local_info(path: str) -> dict[str, Any]:
    return {"type": "directory" if os.path.isdir(path) else "file"}
