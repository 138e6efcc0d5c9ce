"""Job: images → shard set."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline import messages
from pipeline.cluster.interrupt import Interrupt
from pipeline.cluster.lease import Lease
from pipeline.data.images.contact_sheet import grid
from pipeline.data.images.dedupe import Dedupe
from pipeline.data.images.preprocess import encode
from pipeline.data.shards import build, image_task, set_identity
from pipeline.data.shards.build import ShardSetBuilder, Task
from pipeline.data.shards.image_task import ImageTask, NumberedInput, Outcome
from pipeline.data.shards.index_file import INDEX
from pipeline.data.shards.join import refuse_too_many_bad
from pipeline.data.shards.settings import ShardSettings
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.shards.summary import Summary, train_command
from pipeline.data.sources import inventory
from pipeline.data.sources.inputs import Source
from pipeline.data.sources.inventory import Inventory
from pipeline.data.sources.keys import parse_extensions
from pipeline.data.sources.listing import Reader, list_inputs
from pipeline.errors import ConfigError, DataError, RunHeld, Stopped
from pipeline.forecast import Forecast
from pipeline.monitoring.progress import Progress
from pipeline.processes import pool
from pipeline.processes.prefetch import prefetch
from pipeline.storage import files
from pipeline.units import all_of

if TYPE_CHECKING:
    from pipeline.evaluation.features import Extractor

_CLASSES_SHOWN = 20
_PREVIEW_IMAGES = 100
_TRIED, _TRIED_S = 64, 5.0
"""A forecast tries so many inputs, for so many seconds at most."""


def shard(
    sources: list[str],
    out: str,
    settings: ShardSettings,
    *,
    image_ext: str | None = None,
    workers: int = 0,
    max_bad_fraction: float = 0.05,
    part: str = "0/1",
    overwrite: bool = False,
    preview: str | None = None,
    features: str | None = None,
    quiet: bool = False,
) -> Summary:
    """Make a shard set, or the shards that it still lacks.

    Args:
        sources: local paths, fsspec URLs or globs of directories, archives, tables, arrays and image files.
        out: directory or URL of the set; its last component names the shards.
        settings: how samples are made of the inputs.
        image_ext: extensions of the images in tars, separated by commas; None: by the rule of `data.sources.keys`.
        workers: processes; 0: one for each core. The result does not depend on it.
        max_bad_fraction: if a larger share of the inputs is rejected, the set is written and DataError is raised.
        part: I/N makes the I-th (from 0) of N runs of whole shards. The job that makes the last shard finishes the set.
        overwrite: delete the set that an earlier job wrote to `out`, and make it again.
        preview: file for a sheet of up to 100 images spread over the finished set.
        features: feature file (`evaluation.features`); the features of the finished set are stored beside its index.
        quiet: no progress bar.

    Raises:
        ConfigError: an unusable setting or feature file, a missing source, or `out` holds something else.
        DataError: no readable image, too many rejected inputs, or no space left.
        Stopped: on request; the same call continues from there.
    """
    started = time.monotonic()
    if not out:
        raise ConfigError("--out is empty: give the directory or URL of the set")
    part_of_set = _parse_part(part, overwrite, settings.dedupe)
    build.refuse_nesting(sources, out)
    network = _load_network(features, settings.size) if features else None
    with Interrupt("" if quiet else "finished shards stay") as interrupt:
        builder = _open_set(sources, out, settings, parse_extensions(image_ext), part_of_set, overwrite, interrupt)
        missing = builder.missing(builder.own)
        _make_shards(builder, missing, workers or pool.cores(), interrupt, quiet)
        seconds = time.monotonic() - started
        # Other jobs may have made shards too: of this set or, if begun at the same time, of another, which is refused.
        builder.refresh()
        shards, done = len(builder.tasks), len(builder.tasks) - len(builder.missing(builder.tasks))
        if lacking := builder.missing(builder.own):
            _check_stop(interrupt, f"with {done} of {shards} shards made")
            shard_path = files.join(out, lacking[0].stem)
            raise DataError(f"{shard_path} was removed or changed while this job ran: run the same command again")
        counts = builder.counts()
        if done == shards:
            builder.publish()
            if missing or part_of_set[1] > 1:
                inventory.remove(out)
            _report_set(out, counts, max_bad_fraction, preview, network, interrupt, quiet)
            listing = builder.listing
            if listing.rows_without_input:
                messages.warning(
                    f"{listing.rows_without_input} rows of {listing.labels_from} name no input: they belong to another "
                    "part of the data, or are misspelt"
                )
    inputs = sum(map(len, missing))
    command = train_command(out, settings.size, settings.channels, len(counts["classes"] or ()))
    return Summary(
        out=out,
        **counts,
        shards=shards,
        shards_there=done,
        shards_made=len(missing),
        seconds=round(seconds, 3),
        images_per_s=round(inputs / seconds, 1),
        labels_from=builder.listing.labels_from,
        next=command if done == shards else "",
    )


def forecast(
    sources: list[str],
    out: str,
    settings: ShardSettings,
    *,
    image_ext: str | None = None,
    workers: int = 0,
    part: str = "0/1",
    overwrite: bool = False,
    features: str | None = None,
) -> Forecast:
    """What `shard` with these arguments would do; writes nothing.

    Raises:
        ConfigError, DataError, Stopped: as `shard` does before its first shard.
    """
    if not out:
        raise ConfigError("--out is empty: give the directory or URL of the set")
    part_of_set = _parse_part(part, overwrite, settings.dedupe)
    build.refuse_nesting(sources, out)
    if features:
        _load_network(features, settings.size)
    with Interrupt() as interrupt:
        begun = None if overwrite else build.begun_classes(out)
        check_stop = partial(_check_stop, interrupt, "before the first shard")
        listing = list_inputs(sources, settings.labels, check_stop, parse_extensions(image_ext), begun)
        to_clear = build.files_to_clear(out) if overwrite else ()
        builder = ShardSetBuilder(out, settings, sources, listing, part_of_set, to_clear)
        missing, workers = builder.missing(builder.own), workers or pool.cores()
        inputs = sum(map(len, missing))
        tried, taken, per_s, sample_bytes = _measure(builder, missing)
        basis = f"measured on {tried} inputs in one process, of which {taken} were taken; {workers} workers assumed"
    return Forecast(
        where=out,
        work=f"{len(missing)} of {len(builder.own)} shards to make, of {inputs:,} inputs" if missing
        else f"{all_of(len(builder.own), 'shard')} there, nothing to do",
        units=inputs, unit="images", per_s=per_s and per_s * min(workers, pool.cores()), basis=basis,
        bytes=inputs * sample_bytes, free_bytes=files.free_bytes(out),
    )  # fmt: skip


def _measure(builder: ShardSetBuilder, missing: Sequence[Task]) -> tuple[int, int, float, float]:
    """Make samples of inputs from all over the missing shards: how many, how many taken, inputs/s, bytes an input."""
    tasks = [missing[i * len(missing) // _TRIED] for i in range(_TRIED)] if missing else []
    chosen = sorted({task.first + i * len(task) // _TRIED for i, task in enumerate(tasks)})
    maker, started = _image_task(builder.listing.sources, builder.settings), time.monotonic()
    tried, sizes = 0, list[int]()
    for outcome in maker.make([NumberedInput(i, *builder.listing.inputs[i : i + 1]) for i in chosen]):
        tried += 1
        sizes += [len(outcome.packed.data)] if outcome.packed else []
        if time.monotonic() - started > _TRIED_S:
            break
    return tried, len(sizes), tried / max(time.monotonic() - started, 1e-6), sum(sizes) / max(tried, 1)


def _open_set(
    sources: list[str],
    out: str,
    settings: ShardSettings,
    extensions: frozenset[str],
    part: tuple[int, int],
    overwrite: bool,
    interrupt: Interrupt,
) -> ShardSetBuilder:
    """List the inputs, and see which shards of the set exist; with `overwrite` none are left.

    Jobs with `--part` share one list of the inputs until the set is finished. A job without lists them itself.
    """
    begun = None if overwrite else build.begun_classes(out)
    check_stop = partial(_check_stop, interrupt, "before the first shard")

    def listed() -> ShardSetBuilder:
        listing = list_inputs(sources, settings.labels, check_stop, extensions, begun)
        if overwrite:
            build.clear(out)
        return ShardSetBuilder(out, settings, sources, listing, part)

    if part[1] == 1 or files.exists(files.join(out, INDEX)) or not inventory.is_possible(sources, settings.labels):
        return listed()
    build.refuse_something_else(out)
    shared = Inventory(out, sources, settings.labels)
    said = False
    while True:
        source = (set_identity.read(out) or {}).get("source") or {}
        if listing := shared.open(part, source.get("fingerprint")):
            return ShardSetBuilder(out, settings, sources, listing, part)
        try:
            with Lease(shared.directory, lambda _: None):
                if listing := shared.open(part, source.get("fingerprint")):  # made while this job waited for the lease
                    return ShardSetBuilder(out, settings, sources, listing, part)
                builder = listed()
                shared.publish(builder.listing)
                return builder
        except RunHeld:
            check_stop()
            if not said:
                messages.info("another job lists the inputs: waiting for it")
            said = True


def _make_shards(
    builder: ShardSetBuilder,
    missing: Sequence[Task],
    workers: int,
    interrupt: Interrupt,
    quiet: bool,
) -> None:
    """Make the missing shards: workers make the samples, this process writes them. A stop request ends it early."""
    outcomes = pool.run(
        ImageTask.make,
        builder.chunks(missing, workers),
        setup=partial(_image_task, builder.listing.sources, builder.settings),
        workers=workers,
        stop=lambda: interrupt.requested is not None,
        on_worker_death=image_task.on_worker_death,
    )
    inputs, inputs_to_do = sum(map(len, builder.own)), sum(map(len, missing))
    with (
        Progress(inputs, "sharding", unit="images", done=inputs - inputs_to_do, quiet=quiet) as progress,
        closing(prefetch(outcomes, workers)) as chunks,  # decoding continues while a shard is flushed or uploaded
    ):

        def counted() -> Iterator[Outcome]:
            for chunk in chunks:
                progress.advance(len(chunk))
                yield from chunk

        builder.write(missing, counted())


def _image_task(sources: list[Source], settings: ShardSettings) -> ImageTask:
    return ImageTask(Reader(sources), settings)


def _report_set(
    out: str,
    counts: dict[str, Any],
    max_bad_fraction: float,
    preview: str | None,
    network: Extractor | None,
    interrupt: Interrupt,
    quiet: bool,
) -> None:
    """Write preview and features of a finished set, then judge it by its counts."""
    if preview and counts["taken"]:
        _write_preview(out, preview)
    if network and counts["taken"]:
        _store_features(out, network, interrupt, quiet)
    refuse_too_many_bad(out, counts, max_bad_fraction)
    if empty := [ascii(name)[1:-1] for name, count in (counts["classes"] or {}).items() if not count]:
        messages.warning(
            f"{len(empty)} of {len(counts['classes'])} classes have no image: "
            f"{', '.join(empty[:_CLASSES_SHOWN])}; if their directories are empty, remove them from the source"
        )


# The next three functions import torch, which takes seconds: a job that does not need them does not wait.


def _load_network(file: str, size: tuple[int, int]) -> Extractor:
    from pipeline.cluster.device import own_device
    from pipeline.evaluation import features

    return features.load(file, own_device(), size)


def _store_features(out: str, network: Extractor, interrupt: Interrupt, quiet: bool) -> None:
    from pipeline.evaluation import features

    shards = ShardSet.open(out)
    results = features.of_shards(shards, network, out)
    missing = results.missing()
    total = sum(shards.shards[i].samples for i in missing)
    with Progress(total, "computing features", unit="images", quiet=quiet) as progress:

        def each(count: int) -> None:
            progress.advance(count)
            _check_stop(interrupt, "with the set complete, but not its features")

        for i in missing:
            results.compute(i, each)


def _write_preview(out: str, file: str) -> None:
    from pipeline.data.loading.batches import read_all

    images = read_all(ShardSet.open(out), _PREVIEW_IMAGES).images.permute(0, 2, 3, 1).numpy()
    files.write_bytes(file, encode(grid(images), "png"))


def _check_stop(interrupt: Interrupt, when: str) -> None:
    if interrupt.requested:
        raise Stopped(f"stopped by {interrupt.requested} {when}: the same command continues from there")


def _parse_part(text: str, overwrite: bool, dedupe: Dedupe) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--part {text}: write I/N with I from 0 to N - 1, as in 3/16")
    if overwrite and int(match[2]) > 1:
        raise ConfigError(
            "--overwrite: with --part each job would delete the parts of the other jobs: remove the set first"
        )
    if dedupe != "none" and int(match[2]) > 1:
        raise ConfigError(f"--dedupe {dedupe} compares each image with all before it: leave --part out")
    return int(match[1]), int(match[2])
