"""Job: images → shard set."""

from __future__ import annotations

import os
import re
import sys
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
_MAX_SIDE_PX = 16_383  # as webp has it


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
    """In the whole set."""
    shards_there: int
    """Fewer while other parts are at work; the figures above are about these."""
    shards_made: int
    """By this start."""
    seconds: float
    images_per_s: float
    """Inputs looked at by this start."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def as_text(self) -> str:
        """A table for people."""
        head = f"{self.out}: all {self.shards} shards are there, nothing to do"
        if self.shards_made or self.shards_there < self.shards:
            speed = f"{self.seconds:.1f} s, {self.images_per_s:.0f} images/s"
            head = f"{self.out}: {self.shards_made} of {self.shards} shards made in {speed}"
        if self.shards_there < self.shards:
            head += f"; {self.shards_there} are there, the job that makes the last one finishes the set"
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
    part: str = "0/1",
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
        part: I/N makes the I-th (from 0) of N runs of whole shards; whoever makes the last shard finishes the set.
        overwrite: make it again, whatever set of this job is there.
        quiet: no progress.

    Raises:
        ConfigError: an unusable setting, a missing source, or `out` holds something else.
        DataError: no readable picture, too many bad inputs, or no space left.
        Stopped: on request; the same call goes on from there.
    """
    started = time.monotonic()
    if not out:
        raise ConfigError("--out is empty: name the directory or URL of the set")
    number, parts = _part(part, overwrite)
    settings = _settings(size, channels, crop, format, labels, background, min_size, shard_samples)
    imageset.refuse_nesting(sources, out)
    with Interrupt() as interrupt:
        listing = list_inputs(sources, labels, lambda: _stop_if(interrupt, "before the first shard"))
        if overwrite:
            imageset.clear(out)
        images = ImageSet(out, settings, sources, listing)
        mine = images.part(number, parts)
        missing = images.missing(mine)
        share, looked_at = (sum(len(task.inputs) for task in tasks) for tasks in (mine, missing))
        with (
            Progress(share, "sharding", unit="images", done=share - looked_at, quiet=quiet) as progress,
            closing(
                pool.run(
                    make_shard,
                    missing,
                    setup=partial(Reader, sources),
                    workers=workers or len(os.sched_getaffinity(0)),
                    stop=lambda: interrupt.requested is not None,
                )
            ) as records,
        ):
            for record in records:
                progress.advance(record.extra["counts"]["inputs"])

        # Others may have made shards too: of this set or, begun at the same time, of another, which is refused.
        images.look()
        there = len(images.tasks) - len(images.missing(images.tasks))
        if left := images.missing(mine):
            _stop_if(interrupt, f"with {there} of {len(images.tasks)} shards made")
            raise DataError(f"{left[0]} was removed or changed while this job ran: run the same command again")
        counts = images.counts()
        if there == len(images.tasks):
            images.publish()
            _refuse_too_many_bad(counts, max_bad_fraction, storage.join(out, REJECTED))
            _warn_of_empty_classes(counts)
    seconds = time.monotonic() - started
    return Summary(
        out=out,
        **counts,
        shards=len(images.tasks),
        shards_there=there,
        shards_made=len(missing),
        seconds=round(seconds, 3),
        images_per_s=round(looked_at / seconds, 1),
    )


def _stop_if(interrupt: Interrupt, when: str) -> None:
    if interrupt.requested:
        raise Stopped(f"stopped by {interrupt.requested} {when}: the same command goes on from there")


def _part(text: str, overwrite: bool) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--part {text}: write I/N with I from 0 to N - 1, as in 3/16")
    if overwrite and int(match[2]) > 1:
        raise ConfigError("--overwrite: with --part each job would delete what the others made: remove the set first")
    return int(match[1]), int(match[2])


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
    if max(height, width) > _MAX_SIDE_PX:
        raise ConfigError(f"--size {height}x{width}: at most {_MAX_SIDE_PX} pixels a side")
    if channels not in (1, 3):
        raise ConfigError(f"--channels {channels}: 3 for colour or 1 for grey")
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise ConfigError(f"--background {background}: write a colour as in CSS, such as '#ffffff' or white") from error
    return Settings((height, width), channels, crop, format, labels, (red, green, blue), min_size, shard_samples)


def _warn_of_empty_classes(counts: dict[str, Any]) -> None:
    if empty := [ascii(name)[1:-1] for name, count in (counts["classes"] or {}).items() if not count]:
        sys.stderr.write(
            f"warning: {len(empty)} of {len(counts['classes'])} folders hold no picture and are empty classes: "
            f"{', '.join(empty[:_CLASSES_SHOWN])}; to have none, take these folders out of the source\n"
        )


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
