"""Job: images → shard set."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from PIL import ImageColor

from pipeline import storage
from pipeline.data import imageset, pool
from pipeline.data.images import ImageFormat
from pipeline.data.imageset import Crop, ImageSet, Settings, make_shard
from pipeline.data.shardset import REJECTED
from pipeline.data.sources import Labels, Reader, list_inputs
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.run.interrupt import Interrupt
from pipeline.run.progress import Progress

_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Summary:
    """What a sharding job has done."""

    out: str
    inputs: int
    taken: int
    rejected: dict[str, int]
    """Inputs not taken, by reason."""
    transforms: dict[str, int]
    """Pictures taken that were rotated, enlarged, composited, …"""
    classes: dict[str, int] | None
    """Pictures taken, by class."""
    shards: int
    shards_made: int
    """By this start; 0: all were there."""
    seconds: float
    images_per_s: float
    """Inputs looked at by this start."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def as_text(self) -> str:
        """A table for people."""
        head = f"{self.out}: all {self.shards} shards are there, nothing to do"
        if self.shards_made:
            speed = f"{self.seconds:.1f} s, {self.images_per_s:.0f} images/s"
            head = f"{self.out}: {self.shards_made} of {self.shards} shards made in {speed}"
        rows = [("inputs", self.inputs), ("taken", self.taken)]
        rows += [(f"rejected, {reason}", count) for reason, count in self.rejected.items()]
        rows += self.transforms.items()
        classes = list((self.classes or {}).items())
        rows += [(f"class {ascii(name)[1:-1]}", count) for name, count in classes[:_CLASSES_SHOWN]]
        if len(classes) > _CLASSES_SHOWN:
            rows.append((f"{len(classes) - _CLASSES_SHOWN} more classes", sum(n for _, n in classes[_CLASSES_SHOWN:])))
        width = max(len(name) for name, _ in rows)
        return "\n".join([head, *(f"  {name:{width}}  {count:>9}" for name, count in rows)])


def shard(
    sources: list[str],
    out: str,
    *,
    size: int | tuple[int, int],
    labels: Labels = "folder",
    crop: Crop = "center",
    channels: int = 3,
    format: ImageFormat = "png",
    shard_samples: int = 1000,
    workers: int | None = None,
    max_bad_fraction: float = 0.05,
    min_size: int = 1,
    background: str = "#ffffff",
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Make a shard set, or the part of it that is missing.

    Args:
        sources: folders, zip and tar archives, local or fsspec URLs.
        out: directory or URL of the set; its last component names the shards.
        size: of the pictures, in pixels: a side, or (height, width).
        labels: folder: the folder that a picture lies in is its class.
        crop: center, random (keyed by position), or none, which rejects pictures of another aspect ratio.
        channels: 3 for colour, 1 for grey.
        format: png and webp are lossless.
        shard_samples: inputs in a shard.
        workers: processes; None: one a core. The result does not depend on it.
        max_bad_fraction: more rejected inputs than this share are an error, after the set is written.
        min_size: pictures with a shorter side, in pixels, are rejected.
        background: colour under transparency, as CSS writes it.
        overwrite: make it again, whatever set of this job is there.
        quiet: no progress.

    Raises:
        ConfigError: an unusable setting, a missing source, or `out` holds something else.
        DataError: no readable picture, too many bad inputs, or no space left.
        Stopped: by a signal; the same call goes on from there.
    """
    started = time.monotonic()
    settings = _settings(size, channels, crop, format, labels, background, min_size, shard_samples)
    imageset.refuse_nesting(sources, out)
    listing = list_inputs(sources, labels)
    if overwrite:
        imageset.clear(out)
    images = ImageSet(out, settings, sources, listing)
    missing = images.missing()
    looked_at = sum(len(task.inputs) for task in missing)

    with (
        Interrupt() as interrupt,
        Progress(
            len(listing.inputs), "sharding", unit="images", done=len(listing.inputs) - looked_at, quiet=quiet
        ) as progress,
        closing(
            pool.run(
                make_shard,
                missing,
                setup=partial(Reader, sources),
                workers=workers or os.cpu_count() or 1,
                stop=lambda: interrupt.requested is not None,
            )
        ) as records,
    ):
        for record in records:
            images.add(record)
            progress.advance(record.extra["counts"]["inputs"])
    if left := images.missing():
        made = len(images.tasks) - len(left)
        raise Stopped(
            f"stopped by {interrupt.requested} with {made} of {len(images.tasks)} shards made: "
            "the same command goes on from there"
        )

    images.publish()
    counts = images.counts()
    _refuse_too_many_bad(counts, max_bad_fraction, storage.join(out, REJECTED))
    seconds = time.monotonic() - started
    return Summary(
        out=out,
        **counts,
        shards=len(images.tasks),
        shards_made=len(missing),
        seconds=round(seconds, 3),
        images_per_s=round(looked_at / seconds, 1),
    )


def _settings(
    size: int | tuple[int, int],
    channels: int,
    crop: Crop,
    format: ImageFormat,
    labels: Labels,
    background: str,
    min_size: int,
    shard_samples: int,
) -> Settings:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width, shard_samples, min_size) < 1:
        raise ConfigError("--size, --shard-samples and --min-size are at least 1")
    if channels not in (1, 3):
        raise ConfigError(f"--channels {channels}: 3 for colour or 1 for grey")
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise ConfigError(f"--background {background}: write a colour as in CSS, such as '#ffffff' or white") from error
    return Settings((height, width), channels, crop, format, labels, (red, green, blue), min_size, shard_samples)


def _refuse_too_many_bad(counts: dict[str, Any], max_bad_fraction: float, place: str) -> None:
    bad = counts["inputs"] - counts["taken"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts["rejected"].items())
    if not counts["taken"]:
        raise DataError(f"not one of {bad} inputs is a readable picture ({reasons}): {place} names each")
    if bad > max_bad_fraction * counts["inputs"]:
        raise DataError(
            f"{bad} of {counts['inputs']} inputs were rejected ({reasons}), more than --max-bad-fraction "
            f"{max_bad_fraction:g} allows: {place} names each; the set is written, with the other {counts['taken']}"
        )
