"""Text of the command line → values: paths, sizes, ranges, amounts of memory, and the configuration."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.units import parse_bytes

if TYPE_CHECKING:
    from pipeline.config import Config

_MAX_BYTES = 1 << 20


def expand_home(path: str) -> str:
    """The path with a leading `~` or `~user` expanded; shells do not expand it after `=`.

    Raises:
        ConfigError: the home directory is not known.
    """
    scheme = "file://" if path.startswith("file://~") else ""
    local = path.removeprefix(scheme)
    expanded = os.path.expanduser(local) if local.startswith("~") else local
    if expanded.partition("/")[0] == "~":
        raise ConfigError(f"{path}: HOME is not set, and this user has no entry that says where ~ is: write it out")
    return scheme + expanded


def expand_homes(value: str | list[str] | None) -> str | list[str] | None:
    """`expand_home` for the value of an option or argument; a typer callback."""
    if value is None:
        return None
    return expand_home(value) if isinstance(value, str) else [expand_home(path) for path in value]


def size(text: str) -> tuple[int, int]:
    """(height, width) in pixels, from `64` or `96x64`."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text, re.ASCII)
    if not match:
        raise ConfigError(f"--size {text}: write a number of pixels, or height x width as in 96x64")
    return int(match[1]), int(match[2] or match[1])


def interval(text: str) -> tuple[int, int]:
    """(first, last) timestep, from `100-600`."""
    match = re.fullmatch(r"(\d+)-(\d+)", text, re.ASCII)
    if not match:
        raise ConfigError(f"--guidance-interval {text}: write FIRST-LAST in timesteps, as in 100-600")
    return int(match[1]), int(match[2])


def memory(text: str) -> int:
    """Bytes, from `24GiB`."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--memory {text}: write {error}") from error


def configuration(file: str, settings: Iterable[str], *, processes: int = 1) -> Config:
    """The configuration of a run.

    Args:
        file: name or URL of a YAML file, or of a pipe.
        settings: `key=value` arguments, which replace values of the file.
        processes: number of processes that read this file; a pipe can be read by one only.

    Raises:
        ConfigError: one line for each problem.
    """
    from pipeline import config_file

    def read(name: str) -> str:
        return _read_text(expand_home(name), processes)

    return config_file.load(file, settings, read, expand_home)


def _read_text(name: str, processes: int) -> str:
    from pipeline.storage import files

    try:
        if not files.is_remote(name) and not _is_regular(files.local(name)):
            if processes > 1:
                raise ConfigError(
                    f"{name} can be read once, and each of {processes} processes needs it: name a file, such as one "
                    "that `cat` has written"
                )
            with open(files.local(name), "rb") as pipe:
                data = pipe.read(_MAX_BYTES + 1)
        else:
            with files.open_read(name) as file:
                data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{name} has more than {_MAX_BYTES:,} bytes: it is no configuration")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such configuration file{_similar(name)}") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ConfigError(f"{name} is not a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}: name a file that can") from error


def _similar(name: str) -> str:
    """The configuration beside a missing local one that was probably meant."""
    from pipeline.storage import files

    directory, slash, own = name.rpartition("/")
    there = [] if files.is_remote(name) else files.listdir(directory + slash or ".")
    near = difflib.get_close_matches(own, [file for file in there if file.endswith((".yaml", ".yml"))], n=1)
    return f": did you mean {directory}{slash}{near[0]}?" if near else ""


def _is_regular(path: os.PathLike[str]) -> bool:
    return stat.S_ISREG(os.stat(path).st_mode)
