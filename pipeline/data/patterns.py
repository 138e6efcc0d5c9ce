"""Names with wildcards and lists, `train-{000000..000099}.tar` or `photos/**/*.jpg` → what they stand for."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

import braceexpand

from pipeline import storage
from pipeline.errors import ConfigError

_SPECIAL = re.compile(r"[*?\[{]")
_WILD = re.compile(r"[*?\[]")


def is_pattern(url: str) -> bool:
    """Whether a name is to be looked up as a pattern; a file or folder that has just this name comes first."""
    return bool(_SPECIAL.search(url)) and not storage.exists(url)


def matches(pattern: str) -> dict[str, dict[str, Any]]:
    """The files and folders that a pattern stands for, sorted; with `**` only the files.

    Returns:
        Name or URL → what the store says of it, `type` in any case.

    Raises:
        ConfigError: it, or one name of a list, stands for nothing.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        parts = list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError as error:
        raise ConfigError(f"{pattern}: {error}: correct the braces") from error
    for part in parts:
        places = _wild(part) if _WILD.search(part) and not storage.exists(part) else _one(part)
        if not places:
            # fsspec says of a web server that is out of reach, too, that there is no file.
            server = ", and that its server answers" if storage.is_remote(part) else ""
            raise ConfigError(f"{part}: nothing matches: check the name{server}")
        found |= places
    if "**" in pattern:
        found = {place: info for place, info in found.items() if info["type"] != "directory"}
    return found


def root(pattern: str) -> str:
    """The folder down to which a pattern says the names in full."""
    return _SPECIAL.split(pattern, maxsplit=1)[0].rpartition("/")[0]


def _one(url: str) -> dict[str, dict[str, Any]]:
    if storage.is_remote(url):
        return {url: storage.info(url)} if storage.exists(url) else {}
    return {url: _local_info(url)} if storage.exists(url) else {}


def _wild(url: str) -> dict[str, dict[str, Any]]:
    if storage.is_remote(url):
        return dict(sorted(storage.glob(url).items()))
    return {place: _local_info(place) for place in sorted(glob.glob(str(storage.local(url)), recursive=True))}


def _local_info(place: str) -> dict[str, Any]:
    return {"type": "directory" if os.path.isdir(place) else "file"}
