"""Job: images → shard set."""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from PIL import ImageColor

from pipeline import storage
from pipeline.data import imageset, intake, pool
from pipeline.data.ahead import ahead
from pipeline.data.dedupe import Dedupe
from pipeline.data.grid import grid
from pipeline.data.images import ImageFormat, encode
from pipeline.data.imageset import ImageSet
from pipeline.data.intake import Crop, Intake, Made, Settings
from pipeline.data.parts import refuse_too_many_bad
from pipeline.data.shardset import ShardSet
from pipeline.data.sources import Reader, list_inputs
from pipeline.data.summary import Summary
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.run.interrupt import Interrupt
from pipeline.run.progress import Progress

if TYPE_CHECKING:
    from pipeline.score.features import Extractor

_CLASSES_SHOWN = 20
_PREVIEWED = 100
_MAX_SIDE_PX = 16_383  # as webp has it


def shard(
    sources: list[str],
    out: str,
    *,
    size: int | tuple[int, int],
    labels: str = "folder",
    crop: Crop = "center",
    pad: bool = False,
    channels: int = 3,
    format: ImageFormat = "png",
    shard_samples: int = 1000,
    workers: int | None = None,
    max_bad_fraction: float = 0.05,
    min_size: int = 1,
    background: str = "#ffffff",
    dedupe: Dedupe = "none",
    part: str = "0/1",
    overwrite: bool = False,
    preview: str | None = None,
    features: str | None = None,
    quiet: bool = False,
) -> Summary:
    """Make a shard set, or the part of it that is missing.

    Args:
        sources: folders, archives, tables, arrays and picture files, local or fsspec URLs, globs; see `data.sources`.
        out: directory or URL of the set; its last component names the shards.
        size: of the pictures, in pixels: a side, or (height, width).
        labels: folder: the folder that a picture lies in is its class, or what the source itself says; none; or the
            name of a .csv file with a class for each picture.
        crop: center, random (keyed by position), or none, which rejects pictures of another aspect ratio.
        pad: with `crop` none, keep such pictures whole: reduced if too large, never enlarged, on the background.
        channels: 3 for colour, 1 for grey.
        format: png and webp are lossless.
        shard_samples: inputs in a shard.
        workers: processes; None: one a core. The result does not depend on it.
        max_bad_fraction: more rejected inputs than this share are an error, after the set is written.
        min_size: pictures with a shorter side, in pixels, are rejected.
        background: colour under transparency and around padded pictures, as CSS writes it.
        dedupe: reject pictures that repeat an earlier one: exact, with the same pixels after crop and resize; near,
            with almost the same perceptual hash and colours.
        part: I/N makes the I-th (from 0) of N runs of whole shards; whoever makes the last shard finishes the set.
        overwrite: make it again, whatever set of this job is there.
        preview: file for a sheet of up to 100 pictures spread over the finished set.
        features: feature file (`score.features`); its statistics of the finished set are stored beside the index.
        quiet: no progress.

    Raises:
        ConfigError: an unusable setting or feature file, a missing source, or `out` holds something else.
        DataError: no readable picture, too many bad inputs, or no space left.
        Stopped: on request; the same call goes on from there.
    """
    started = time.monotonic()
    if not out:
        raise ConfigError("--out is empty: name the directory or URL of the set")
    workers = workers or len(os.sched_getaffinity(0))
    number, parts = _part(part, overwrite, dedupe)
    settings = _settings(size, channels, crop, pad, format, labels, background, min_size, dedupe, shard_samples)
    imageset.refuse_nesting(sources, out)
    network = _network(features, settings.size) if features else None
    with Interrupt() as interrupt:
        listing = list_inputs(sources, labels, lambda: _stop_if(interrupt, "before the first shard"))
        if overwrite:
            imageset.clear(out)
        images = ImageSet(out, settings, sources, listing)
        mine = images.part(number, parts)
        missing = images.missing(mine)
        share, looked_at = (sum(task.last - task.first for task in tasks) for tasks in (mine, missing))
        made = pool.run(
            intake.make,
            images.chunks(missing, workers),
            setup=partial(_intake, listing.sources, settings),
            workers=workers,
            stop=lambda: interrupt.requested is not None,
            bury=intake.bury,
        )
        with (
            Progress(share, "sharding", unit="images", done=share - looked_at, quiet=quiet) as progress,
            closing(ahead(made, workers)) as chunks,  # decoding goes on while a shard is flushed or uploaded
        ):
            for _ in images.write(missing, itertools.chain.from_iterable(_counted(chunks, progress))):
                pass

        seconds = time.monotonic() - started
        # Others may have made shards too: of this set or, begun at the same time, of another, which is refused.
        images.look()
        there = len(images.tasks) - len(images.missing(images.tasks))
        if left := images.missing(mine):
            _stop_if(interrupt, f"with {there} of {len(images.tasks)} shards made")
            place = storage.join(out, left[0].stem)
            raise DataError(f"{place} was removed or changed while this job ran: run the same command again")
        counts = images.counts()
        if there == len(images.tasks):
            images.publish()
            if preview and counts["taken"]:
                _write_preview(out, preview)
            if network and counts["taken"]:
                _store_reference(out, network, interrupt, quiet)
            refuse_too_many_bad(out, counts, max_bad_fraction)
            _warn_of_empty_classes(counts)
            _warn_of_idle_rows(labels, listing.rows_without_input)
    return Summary(
        out=out,
        **counts,
        shards=len(images.tasks),
        shards_there=there,
        shards_made=len(missing),
        seconds=round(seconds, 3),
        images_per_s=round(looked_at / seconds, 1),
    )


def _intake(sources: Any, settings: Settings) -> Intake:
    return Intake(Reader(sources), settings)


def _counted(chunks: Iterator[list[Made]], progress: Progress) -> Iterator[list[Made]]:
    for chunk in chunks:
        progress.advance(len(chunk))
        yield chunk


# These three import torch, for a second or two that nobody else waits for.


def _network(file: str, size: tuple[int, int]) -> Extractor:
    from pipeline import scorer

    return scorer.extractor(file, size)


def _store_reference(out: str, network: Extractor, interrupt: Interrupt, quiet: bool) -> None:
    from pipeline import scorer

    def each(batches: range) -> Iterator[int]:
        with Progress(len(batches), "measuring features", unit="batches", quiet=quiet) as progress:
            for i in batches:
                _stop_if(interrupt, "with the set complete, but not its statistics")
                yield i
                progress.advance()

    scorer.store_reference(ShardSet.open(out), network, each)


def _write_preview(out: str, file: str) -> None:
    from pipeline.data.batches import read_all

    pictures = read_all(ShardSet.open(out), _PREVIEWED).images.permute(0, 2, 3, 1).numpy()
    storage.write_bytes(file, encode(grid(pictures), "png"))


def _stop_if(interrupt: Interrupt, when: str) -> None:
    if interrupt.requested:
        raise Stopped(f"stopped by {interrupt.requested} {when}: the same command goes on from there")


def _part(text: str, overwrite: bool, dedupe: Dedupe) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--part {text}: write I/N with I from 0 to N - 1, as in 3/16")
    if overwrite and int(match[2]) > 1:
        raise ConfigError("--overwrite: with --part each job would delete what the others made: remove the set first")
    if dedupe != "none" and int(match[2]) > 1:
        raise ConfigError(f"--dedupe {dedupe} compares each picture with all before it: leave --part out")
    return int(match[1]), int(match[2])


def _settings(
    size: int | tuple[int, int],
    channels: int,
    crop: Crop,
    pad: bool,
    format: ImageFormat,
    labels: str,
    background: str,
    min_size: int,
    dedupe: Dedupe,
    shard_samples: int,
) -> Settings:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width, shard_samples, min_size) < 1:
        raise ConfigError("--size, --shard-samples and --min-size are at least 1")
    if max(height, width) > _MAX_SIDE_PX:
        raise ConfigError(f"--size {height}x{width}: at most {_MAX_SIDE_PX} pixels a side")
    if channels not in (1, 3):
        raise ConfigError(f"--channels {channels}: 3 for colour or 1 for grey")
    if pad and crop != "none":
        raise ConfigError("--pad keeps pictures whole: give --crop none with it")
    if crop == "random" and dedupe != "none":
        raise ConfigError(f"--dedupe {dedupe} compares pictures as they are cropped: --crop random hides repetitions")
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise ConfigError(f"--background {background}: write a colour as in CSS, such as '#ffffff' or white") from error
    kind: Literal["folder", "none", "csv"] = "folder" if labels == "folder" else "none" if labels == "none" else "csv"
    return Settings(
        size=(height, width),
        channels=channels,
        crop=crop,
        pad=pad,
        format=format,
        labels=kind,
        background=(red, green, blue),
        min_size=min_size,
        dedupe=dedupe,
        shard_samples=shard_samples,
    )


def _warn_of_empty_classes(counts: dict[str, Any]) -> None:
    if empty := [ascii(name)[1:-1] for name, count in (counts["classes"] or {}).items() if not count]:
        sys.stderr.write(
            f"warning: {len(empty)} of {len(counts['classes'])} folders hold no picture and are empty classes: "
            f"{', '.join(empty[:_CLASSES_SHOWN])}; to have none, take these folders out of the source\n"
        )


def _warn_of_idle_rows(file: str, rows: int) -> None:
    if rows:
        sys.stderr.write(f"warning: {rows} rows of {file} name no input: of another part of the data, or misspelt\n")
