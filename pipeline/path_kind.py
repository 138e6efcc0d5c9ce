"""What a path is, by the names of its files; and the message for a path of another kind than a command needs.

Only names are read, and config.yaml where no name shows whether a directory is a run. So all commands agree about what
a path is, and files that are unfinished or damaged do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum

from pipeline.checkpoints.run_dir import RunDir, step_of
from pipeline.data.sources.inputs import is_image_name
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files

SOURCE = re.compile(r"(?i).+\.(zip|tar|tar\.gz|tgz|tar\.zst|parquet|npz|npy)")
"""Files that `ddpm shard` reads many images from."""
FEATURES = re.compile(r"(features|likelihood)-[0-9a-f]{12}")
"""Directories that `ddpm evaluate` writes."""
SAMPLE_RECORD = re.compile(r"shard_(\d{6,})\.json")
SHARD_RECORD = re.compile(r"(.+[-_]\d{6,})\.json")
"""Of a shard set or of a sample set."""

_SAMPLES = re.compile(r"shard_\d{6,}\.")
_WEIGHTS = re.compile(r"(?i).+\.(pt|pth|ckpt|bin)")
_NO_RUNS = re.compile(r"\..*|.*\.(tar|zip|json|jsonl|png|yaml|safetensors|log|out)|checkpoints|tensorboard|previews")
_DEPTH, _MOST_DIRECTORIES = 3, 50
"""How deep, and into how many directories, `of` looks for a run or an image."""


class Kind(StrEnum):
    """The kinds of paths, as messages call them."""

    NOTHING = "nothing"
    RUN = "a run"
    CHECKPOINT = "a checkpoint"
    SHARD_SET = "a shard set"
    SAMPLE_SET = "a sample set"
    DIFFUSERS = "a diffusers model"
    FEATURES = "a directory of features"
    RUNS = "a directory of runs"
    IMAGES = "a directory of images"
    TARS = "a directory of tars"
    SOURCES = "a directory of archives or tables"
    IMAGE = "an image"
    SOURCE = "an archive or a table"
    WEIGHTS = "a file of weights"
    CONFIGURATION = "a configuration"
    FILE = "a file"
    DIRECTORY = "a directory"


_SETS = (Kind.SHARD_SET, Kind.SAMPLE_SET)
_MODELS = (Kind.RUN, Kind.CHECKPOINT, Kind.DIFFUSERS)


def of(path: str) -> Kind:
    """The kind of a file or directory, local or remote."""
    if files.is_dir(path):
        return next(_of_directory(path, files.listdir(path)), Kind.DIRECTORY)
    return _of_file(path) if files.exists(path) else Kind.NOTHING


def is_run(path: str) -> bool:
    """Whether a directory is a run: it has the checkpoints, the lease or the resolved configuration of a run."""
    run = RunDir(path)
    if files.exists(run.checkpoints) or run.lease_generations():
        return True
    from pipeline import config_file  # slow to import

    with suppress(OSError, UnicodeDecodeError, DataError, ConfigError):
        return config_file.is_stored(files.read_bytes(run.config).decode())
    return False


def find_runs(path: str, depth: int = _DEPTH, most_directories: int | None = None) -> Iterator[str]:
    """The runs in a directory and in its subdirectories, sorted by path; the directory itself may be one.

    Args:
        path: a path or URL.
        depth: of the deepest run: 1 for those directly in the directory.
        most_directories: number of directories after which the search ends; None: no limit.
    """
    left = [most_directories or -1]

    def search(path: str, depth: int) -> Iterator[str]:
        left[0] -= 1
        if is_run(path):
            yield path
        elif depth:
            for name in [name for name in files.listdir(path) if not _NO_RUNS.fullmatch(name)][:most_directories]:
                if left[0] and files.is_dir(files.join(path, name)):
                    yield from search(files.join(path, name), depth - 1)

    return search(path, depth)


def walk(path: str, depth: int, most_directories: int | None = None) -> Iterator[str]:
    """Images and sources in a directory and its subdirectories: names relative to it, those of a directory first."""
    left = [most_directories or -1]

    def search(path: str, below: str, depth: int) -> Iterator[str]:
        left[0] -= 1
        others = []
        for name in files.listdir(path):
            if is_image_name(name) or SOURCE.fullmatch(name):
                yield below + name
            elif depth and not name.startswith("."):
                others.append(name)
        for name in others[:most_directories]:
            if left[0] and files.is_dir(files.join(path, name)):
                yield from search(files.join(path, name), f"{below}{name}/", depth - 1)

    return search(path, "", depth)


def not_a_set(path: str) -> str:
    """The message for a path that has no index of a shard set: what it is, and what to do."""
    kind = of(path)
    if kind is Kind.NOTHING:
        return f"{path}: no such directory: give the directory that `ddpm shard --out` wrote"
    if not files.is_dir(path):
        return _file_for_a_set(path)
    remedies = {
        Kind.RUN: f"draw samples with `ddpm sample {path} --seeds 0-9999 --out SAMPLES` and give SAMPLES, or give a "
        f"shard set, such as data.shards in {files.join(path, 'config.yaml')}",
        Kind.CHECKPOINT: f"draw samples with `ddpm sample {path} --seeds 0-9999 --out SAMPLES` and give SAMPLES",
        Kind.IMAGES: f"run {_shard_command(path)} first, and give SHARDSET",
        Kind.SOURCES: f"run {_shard_command(path)} first, and give SHARDSET",
        Kind.DIRECTORY: "give the directory that `ddpm shard --out` wrote",
    }
    if kind is Kind.SAMPLE_SET:
        return _unfinished_samples(path)
    if kind is Kind.SHARD_SET:
        return f"{path} is an unfinished shard set (no index.json): run the same `ddpm shard` command again"
    if kind is Kind.TARS:
        return (
            f"{path} holds tars without an index: run `ddpm index {path} --out SHARDSET` and give SHARDSET; if `ddpm "
            "shard` was stopped here, run the same command again"
        )
    first = f" ({_first_input(path)})" if kind in (Kind.IMAGES, Kind.SOURCES) else ""
    return f"{path} is {kind}{first}, not a shard set: {remedies.get(kind, remedies[Kind.DIRECTORY])}"


def not_a_model(path: str) -> str | None:
    """The message for a path that is known not to be a run, a checkpoint or a diffusers directory; else None."""
    kind = of(path)
    if kind in _MODELS or kind in (Kind.NOTHING, Kind.DIRECTORY):
        return None
    remedies = {
        Kind.SHARD_SET: f"train on it with `ddpm train --config C.yaml data.shards={path} run.dir=RUN`, and give RUN",
        Kind.SAMPLE_SET: "give the run or the checkpoint that drew it",
        Kind.RUNS: f"give one of these runs, such as {next(find_runs(path), path)}",
        Kind.IMAGES: "run `ddpm shard` and `ddpm train` first, and give the run",
        Kind.WEIGHTS: f"run `ddpm import {path} --out RUN`, and give RUN",
    }
    return f"{path} is {kind}, not a model: {remedies.get(kind, 'give a run, a checkpoint or a diffusers directory')}"


def not_a_run(path: str) -> str:
    """What a directory without the configuration of a run is, to be followed by what to do."""
    kind = of(path)
    if kind in (Kind.RUN, Kind.DIRECTORY):
        return f"{path} exists and is not a run (no config.yaml)"
    return f"{path} is {kind}, not a run"


def _of_directory(path: str, names: list[str]) -> Iterator[Kind]:
    """What a directory may be; the first kind is the best."""
    if step_of(path) is not None or "manifest.json" in names:
        yield Kind.CHECKPOINT
    if is_run(path):
        yield Kind.RUN
    is_begun = "set.json" in names  # and perhaps without a record yet
    if any(map(SAMPLE_RECORD.fullmatch, names)) or (is_begun and any(map(_SAMPLES.match, names))):
        yield Kind.SAMPLE_SET
    if "index.json" in names or is_begun or _has_records(names):
        yield Kind.SHARD_SET
    if _is_diffusers(path, names):
        yield Kind.DIFFUSERS
    if any(map(FEATURES.fullmatch, [_name(path), *names])):
        yield Kind.FEATURES
    if any(map(is_image_name, names)):
        yield Kind.IMAGES
    if any(name.endswith(".tar") for name in names):
        yield Kind.TARS
    yield from (Kind.RUNS for _ in find_runs(path, most_directories=_MOST_DIRECTORIES))
    if inner := _first_input(path):
        yield Kind.IMAGES if is_image_name(inner) else Kind.TARS if inner.endswith(".tar") else Kind.SOURCES


def _of_file(path: str) -> Kind:
    name = _name(path)
    kinds = {SOURCE: Kind.SOURCE, _WEIGHTS: Kind.WEIGHTS, re.compile(r"(?i).+\.ya?ml"): Kind.CONFIGURATION}
    if is_image_name(name):
        return Kind.IMAGE
    return next((kind for pattern, kind in kinds.items() if pattern.fullmatch(name)), Kind.FILE)


def _has_records(names: list[str]) -> bool:
    """Whether a shard has its record and its sidecar: other tools write .json files beside images, too."""
    records = (match[1] for name in names if (match := SHARD_RECORD.fullmatch(name)))
    return any(f"{stem}.npy" in names for stem in records)


def _is_diffusers(path: str, names: list[str]) -> bool:
    has_weights = any(name.startswith("diffusion_pytorch_model") for name in names)
    has_parts = "unet" in names and files.exists(files.join(path, "unet", "config.json"))
    return "model_index.json" in names or has_parts or ("config.json" in names and has_weights)


def _first_input(path: str) -> str | None:
    """An image, else a file of many images, in a directory or one of its first subdirectories."""
    other = None
    for name in walk(path, _DEPTH, _MOST_DIRECTORIES):
        if is_image_name(name):
            return name
        other = other or name
    return other


def _file_for_a_set(path: str) -> str:
    directory = path.rpartition("/")[0]
    if _name(path) == "index.json" or (directory and files.exists(files.join(directory, "index.json"))):
        return f"{path} is a file of a shard set: give its directory, {directory or '.'}"
    return f"{path} is a file, not a shard set: run {_shard_command(path)} first, and give SHARDSET"


def _unfinished_samples(path: str) -> str:
    if any(name.endswith((".png", ".npz")) for name in files.listdir(path)):
        return (
            f"{path} holds samples as single files, not in tars: draw them with --format tar, or run "
            f"{_shard_command(path)} and give SHARDSET"
        )
    return f"{path} is an unfinished sample set (no index.json): run the same `ddpm sample` command again"


def _shard_command(path: str) -> str:
    return f"`ddpm shard {path} --out SHARDSET --size PIXELS`"


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
