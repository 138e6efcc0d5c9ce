"""What lies where a shard set was expected, and what to do then: messages for people."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.data.sources.inputs import is_image_name
from pipeline.storage import files

_OWN = re.compile(r".+-\d{6,}\.(tar|npy|json)")
_SAMPLES = re.compile(r"shard_\d{6,}\.(json|npz)")
_TABLES = (".parquet", ".zip", ".npz", ".npy", ".tar.gz", ".tgz")
_LOOKED_INTO = 3
"""Directories in which images are looked for."""


def explain(url: str) -> str:
    """The message about a place that has no index of a shard set: what is there, and what to do."""
    if not files.is_remote(url) and not files.exists(url):
        return f"{url}: no such directory: give the place that `ddpm shard --out` wrote"
    unfinished = (
        f"{url} has no index.json: it is unfinished or not a shard set: run `ddpm shard` again with the same "
        "arguments, or `ddpm index` on tars made elsewhere"
    )
    return next(_recognized(url) if files.is_dir(url) else _recognized_file(url), unfinished)


def _recognized_file(url: str) -> Iterator[str]:
    directory, _, name = url.rpartition("/")
    if name == "index.json" or (directory and files.exists(files.join(directory, "index.json"))):
        yield f"{url} is a file of a shard set: name its directory, {directory or '.'}"
    elif files.exists(url):
        yield f"{url} is a file, not a shard set: make one of it with {_command(url)}, and name SHARDSET"


def _recognized(url: str) -> Iterator[str]:
    """What a directory holds; the first line is the best. Nothing of what may be an unfinished shard set."""
    names = files.listdir(url)
    if {"config.yaml", "checkpoints"} <= set(names):
        yield f"{url} is a run, not a shard set: name a set, such as data.shards in {files.join(url, 'config.yaml')}"
    if any(map(_SAMPLES.fullmatch, names)):
        if any(name.endswith((".png", ".npz")) for name in names):
            yield (
                f"{url} holds samples as single files, not in tars: draw them with --format tar, or make a set of them "
                f"with {_command(url)}"
            )
        yield f"{url} is a sample set that is not finished: run the same `ddpm sample` command again"
    if any(map(_OWN.fullmatch, names)):
        return
    if any(name.endswith(".tar") for name in names):
        yield f"{url} holds tars without an index: run `ddpm index {url} --out SHARDSET`, and name SHARDSET"
    if found := _images(url, names) or next((name for name in names if name.endswith(_TABLES)), None):
        yield f"{url} holds {found}, not shards: run {_command(url)} first, and name SHARDSET"


def _images(url: str, names: list[str]) -> str | None:
    """The name of an image in a directory, or in one of its first directories."""
    for name in names:
        if is_image_name(name):
            return name
    for name in [name for name in names if not name.startswith(".")][:_LOOKED_INTO]:
        if files.is_dir(files.join(url, name)):
            for inner in files.listdir(files.join(url, name)):
                if is_image_name(inner):
                    return f"{name}/{inner}"
    return None


def _command(url: str) -> str:
    return f"`ddpm shard {url} --out SHARDSET --size PIXELS`"
