"""Job: what a path is (a run, a checkpoint, a set, a model, images), how far it is, and what to do with it next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline import path_kind, untrusted
from pipeline.checkpoints.run_dir import RunDir
from pipeline.data.shards import set_status
from pipeline.data.shards.set_status import SetStatus
from pipeline.data.shards.summary import train_command
from pipeline.data.sources.inputs import is_image_name
from pipeline.errors import ConfigError, DataError
from pipeline.path_kind import FEATURES, Kind
from pipeline.storage import files
from pipeline.training import run_status
from pipeline.training.run_status import RunStatus
from pipeline.units import bytes_text, duration_text

_SHEET = 100
_MOST_FILES, _DEPTH = 20_000, 4
_CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Shown:
    """What a path is."""

    path: str
    kind: str
    """run, checkpoint, shard set, sample set, diffusers model, features, images, tars, runs, source, weights."""
    state: str
    """How far it is, in a word or a line."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Name → value; None: unknown."""
    next: str = ""
    """The command to use it with."""


def show(path: str, preview: str | None = None) -> Shown:
    """Say what a path is and how far it is. Reads indexes, records and manifests, and no image.

    Args:
        path: path or URL of a file or directory.
        preview: PNG file to write: of a run its newest preview, of a set a sheet of its first images.

    Raises:
        ConfigError: there is nothing, or nothing that is known here; or it has no preview.
        DataError: it is damaged, or the preview cannot be written.
    """
    if preview and not preview.lower().endswith(".png"):
        raise ConfigError(f"--preview {preview}: the image is a PNG: give a name that ends in .png")
    if not files.exists(path):
        raise ConfigError(f"{path}: no such file or directory: give a run, a set, a model or a directory of images")
    shown = _directory(path) if files.is_dir(path) else _file(path)
    if preview:
        _write_preview(shown, preview)
    return shown


def as_json(shown: Shown) -> dict[str, Any]:
    """The result as JSON values."""
    return {"path": shown.path, "kind": shown.kind, "state": shown.state, **shown.facts, "next": shown.next}


def as_text(shown: Shown) -> str:
    """The result as lines for people."""
    rows = [(name.removesuffix("_s").replace("_", " "), _as_text(name, value)) for name, value in shown.facts.items()]
    rows = [(name, text) for name, text in rows if text] + ([("next", shown.next)] if shown.next else [])
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([f"{shown.path}: {shown.kind}, {shown.state}", *(f"  {n:{width}}  {text}" for n, text in rows)])


def _as_text(name: str, value: Any) -> str:
    special: dict[str, Callable[[Any], str]] = {
        "bytes": bytes_text,
        "age_s": lambda seconds: f"{duration_text(seconds)} since the last line of the log",
        "size": lambda size: f"{size[0]}x{size[1]} px",
    }
    if value is None or value == {}:
        return ""
    if name in special:
        return special[name](value)
    if isinstance(value, dict):
        counts = [f"{ascii(key)[1:-1]}{'' if count is None else f' {count:,}'}" for key, count in value.items()]
        more = f" and {len(counts) - _CLASSES_SHOWN} more" if len(counts) > _CLASSES_SHOWN else ""
        return ", ".join(counts[:_CLASSES_SHOWN]) + more
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _directory(path: str) -> Shown:
    """What a directory is."""
    kind = path_kind.of(path)
    if kind in (Kind.SHARD_SET, Kind.SAMPLE_SET) and (found := set_status.read(path)):
        return _set(path, found)
    show_it: dict[Kind, Callable[[str], Shown]] = {
        Kind.CHECKPOINT: _checkpoint, Kind.RUN: _run, Kind.DIFFUSERS: _diffusers, Kind.FEATURES: _features,
        Kind.RUNS: _runs, Kind.IMAGES: _inputs, Kind.TARS: _inputs, Kind.SOURCES: _inputs,
    }  # fmt: skip
    if kind in show_it:
        return show_it[kind](path)
    raise ConfigError(
        f"{path} is neither a run, a set, a model nor a directory of images: give one of these, or make a set with "
        "`ddpm shard`"
    )


def _run(path: str) -> Shown:
    (status,) = run_status.statuses([path])
    config = run_status.stored_config(path)
    facts: dict[str, Any] = {
        "step": status.step,
        "steps": status.steps,
        "loss": status.loss,
        "checkpoint": status.checkpoint,
        "best": status.best,
        "checkpoints": len(RunDir(path).checkpoint_steps()),
        "previews": len([name for name in files.listdir(RunDir(path).previews) if name.endswith(".png")]),
        "age_s": status.age_s,
    }
    if config:
        facts |= {
            "data": config.data.shards or None,
            "size": config.data.height_width,
            "classes": config.model.num_classes,
            "precision": config.train.precision,
        }
    if files.exists(RunDir(path).imported):
        source = files.read_json(RunDir(path).imported)
        facts["imported_from"] = f"{source.get('from')}, {source.get('source')}"
    state = f"{status.state}: {status.reason}" if status.reason else status.state
    return Shown(path, "run", state, facts, _after_run(path, status))


def _after_run(path: str, status: RunStatus) -> str:
    if status.state in (run_status.DONE, run_status.IMPORTED):
        return f"ddpm sample {path} --seeds 0-99 --out SAMPLES --grid samples.png"
    if status.state == run_status.RUNNING:
        return f"tensorboard --logdir {RunDir(path).tensorboard}"
    if status.state == run_status.FAILED:
        return f"see {RunDir(path).failed}, then ddpm train --config {RunDir(path).config}"
    return f"ddpm train --config {RunDir(path).config}"


def _checkpoint(path: str) -> Shown:
    try:
        manifest = files.read_json(files.join(path, "manifest.json"))
    except FileNotFoundError:
        return Shown(path, "checkpoint", "unfinished: its save was killed", next="the run resumes from the one before")
    try:
        listed = {untrusted.name_inside(name, "manifest.json"): entry for name, entry in manifest["files"].items()}
        sizes = {name: int(entry["bytes"]) for name, entry in listed.items()}
        facts = {"step": int(manifest["step"]), "bytes": sum(sizes.values()), "files": ", ".join(sizes)}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path}/manifest.json is damaged: give another checkpoint of the run") from None
    wrong = [name for name, size in sizes.items() if _size_of(files.join(path, name)) != size]
    state = f"damaged: {wrong[0]} is missing or has another size" if wrong else "finished"
    return Shown(path, "checkpoint", state, facts, f"ddpm sample {path} --seeds 0-99 --out SAMPLES")


def _size_of(url: str) -> int | None:
    try:
        return files.size(url)
    except (FileNotFoundError, DataError):
        return None


def _set(path: str, status: SetStatus) -> Shown:
    facts = {
        "images": status.images,
        "asked": None if status.finished else status.asked,
        "shards": status.shards,
        "size": status.size,
        "channels": status.channels,
        "classes": status.classes,
        "rejected": status.rejected,
        "bytes": status.bytes,
        "format": status.format if status.kind == "sample set" else None,
        "made_from": status.made_from,
        "features": ", ".join(name for name in files.listdir(path) if FEATURES.fullmatch(name)) or None,
    }
    size = status.size or (64, 64)
    if not status.finished:
        next_command = f"run the same `ddpm {status.kind.partition(' ')[0]}` command again: it makes what is missing"
    elif status.kind == "sample set":
        next_command = f"ddpm evaluate {path} --against SHARDSET --features inception"
    else:
        next_command = train_command(path, size, status.channels or 3, len(status.classes or ()))
    state = "finished" if status.finished else "unfinished"
    if not status.finished and status.asked:
        unit = "inputs" if status.kind == "shard set" else "seeds"
        state += f": {status.images + sum(status.rejected.values()):,} of {status.asked:,} {unit}"
    return Shown(path, status.kind, state, facts, next_command)


def _diffusers(path: str) -> Shown:
    from pipeline.model import diffusers_directory

    directory = diffusers_directory.find(path) or path
    unet = files.read_json(files.join(directory, "config.json"))
    kind = unet.get("_class_name")
    facts = {
        "network": kind,
        "size": None if isinstance(unet.get("sample_size"), list | None) else [unet["sample_size"]] * 2,
        "channels": unet.get("in_channels"),
        "bytes": sum(_size_of(files.join(directory, n)) or 0 for n in files.listdir(directory) if "model" in n),
    }
    return Shown(path, "diffusers model", "finished", facts, f"ddpm sample {path} --seeds 0-99 --out SAMPLES")


def _features(path: str) -> Shown:
    """The features that an evaluation keeps: the directory of one network, or of several."""
    name = path.rstrip("/").rpartition("/")[2]
    directories = {name: path} if FEATURES.fullmatch(name) else {}
    directories |= {name: files.join(path, name) for name in files.listdir(path) if FEATURES.fullmatch(name)}
    counts = {
        name: len([file for file in files.listdir(directory) if file.endswith(".safetensors")])
        for name, directory in directories.items()
    }
    usage = "give it to ddpm evaluate as --cache; it may be deleted: the next evaluation makes it again"
    state = f"{sum(counts.values())} shards computed"
    return Shown(path, "features", state, {"shards_by_network": counts}, usage)


def _runs(path: str) -> Shown:
    found = list(path_kind.find_runs(path))
    return Shown(path, "runs", f"{len(found)} runs", {}, f"ddpm runs {path}")


def _inputs(path: str) -> Shown:
    """Images, tars, or other files that `ddpm shard` reads: what there is most of."""
    names = list(islice(path_kind.walk(path, _DEPTH), _MOST_FILES))
    kinds = Counter(
        "images" if is_image_name(name) else "tars" if name.endswith(".tar") else "sources" for name in names
    )
    kind, count = kinds.most_common(1)[0]
    least = "at least " if len(names) >= _MOST_FILES else ""
    by_class = Counter(name.partition("/")[0] for name in names if "/" in name and is_image_name(name))
    state = f"{least}{count:,} of them"
    if kind == "images":
        facts = {"directories": dict(by_class)} if by_class else {}
        return Shown(path, "images", state, facts, f"ddpm shard {path} --out SHARDSET --size 64")
    if kind == "tars":
        made_here = f"an unfinished set, or tars made elsewhere: ddpm index {path} --out SHARDSET"
        return Shown(path, "tars", f"{state}, without an index", {}, made_here)
    return Shown(path, "sources", state, {}, f"ddpm shard {path.rstrip('/')}/* --out SHARDSET --size 64")


def _file(path: str) -> Shown:
    """What a single file is, by its name."""
    facts, kind = {"bytes": _size_of(path)}, path_kind.of(path)
    if kind is Kind.SOURCE:
        return Shown(path, "source", "images for a shard set", facts, f"ddpm shard {path} --out SHARDSET --size 64")
    if kind is Kind.IMAGE:
        return Shown(path, "image", "one image", facts, f"ddpm shard {path} --out SHARDSET --size 64")
    if kind is Kind.WEIGHTS:
        return Shown(path, "weights", "of another project, perhaps", facts, f"ddpm import {path} --out RUN")
    if kind is Kind.CONFIGURATION:
        return Shown(path, "configuration", "of a run", facts, f"ddpm plan --config {path}")
    raise ConfigError(f"{path} is a file that no command here reads: give a directory, an archive or a configuration")


def _write_preview(shown: Shown, preview: str) -> None:
    if shown.kind == "run":
        newest = RunDir(shown.path).newest_preview()
        if newest is None:
            raise ConfigError(
                f"--preview: {shown.path} has no preview yet: a run makes one every run.preview_every steps"
            )
        files.write_bytes(preview, files.read_bytes(newest))
        return
    if shown.kind not in ("shard set", "sample set") or not shown.facts["images"]:
        raise ConfigError(f"--preview: {shown.path} is neither a run nor a set with images: leave it out")
    from pipeline.data.images.contact_sheet import grid
    from pipeline.data.images.preprocess import encode
    from pipeline.data.loading.first_images import first_images

    files.write_bytes(preview, encode(grid(first_images(shown.path, _SHEET)), "png"))
