"""Job: checkpoint + seeds → samples. `ddpm sample RUN --seeds 0-49999 --out SAMPLES`, or `accelerate launch` for many.

Each process draws shards of seeds; processes do not communicate. The sample set has the same content for any number of
processes and after any number of kills: a seed always gets the same noise, in the same slot of a batch of the same
size, and a shard is complete when its record exists.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline import messages
from pipeline.cluster.device import own_device
from pipeline.cluster.interrupt import Interrupt
from pipeline.cluster.launch_environment import in_turn, process_rank
from pipeline.config import SamplingOptions
from pipeline.data.images import preprocess, video
from pipeline.data.images.contact_sheet import grid
from pipeline.data.shards import sample_set
from pipeline.data.shards.committed import CommittedSeeds
from pipeline.data.shards.sample_set import SampleSet
from pipeline.data.shards.shard_set import Sample, key, pack
from pipeline.errors import Stopped
from pipeline.forecast import Forecast
from pipeline.monitoring.environment import environment
from pipeline.monitoring.progress import Progress
from pipeline.sampling import generator as generators
from pipeline.sampling import image_start
from pipeline.sampling.generator import Generator
from pipeline.sampling.options import DEFAULT_STRENGTH, SamplingRequest, choose, provenance
from pipeline.solvers import SAMPLERS
from pipeline.storage import files
from pipeline.units import all_of

SHOWN = 100
"""Maximum number of images in a grid or a video: the first ones of the requested seeds."""
VIDEO_FRAMES = 120
"""Maximum number of frames of a video before its last one."""

TRAJECTORY_ROWS, TRAJECTORY_COLUMNS = 8, 11
"""Maximum numbers of seeds and of images of each in a sheet of trajectories."""

_LEAST_STEPS, _TRIED_S = 3, 10.0
"""A forecast measures so many steps at least, then stops after so many seconds."""

_T = TypeVar("_T")


def sample(request: SamplingRequest, *, quiet: bool = False) -> dict[str, Any]:
    """Draw the images of all requested seeds that the sample set does not hold yet.

    Args:
        request: what to draw, and where to write it.
        quiet: show nothing but warnings.

    Returns:
        `images` requested, `drawn` by this process, `complete`, `seconds`, and the outputs `out`, `grid`, `video`,
        `trajectory`.

    Raises:
        ConfigError: the request does not fit the model, or the output holds something else.
        DataError: the model is damaged, or there is no space left.
        NoCheckpoint: the run holds no valid checkpoint.
        Stopped: on request, before the next pass through the network; finished shards stay.
    """
    with Interrupt("" if quiet else "finished shards stay") as interrupt:
        rank = process_rank().rank
        generator, options, target = _prepare(request, quiet=quiet)
        started = time.monotonic()
        if rank == 0 and (line := generator.advice(options)):
            messages.warning(line)
        drawing = _Drawing(request, generator, options, target, interrupt, quiet or rank > 0)
        result = {"images": request.images, "drawn": 0, "complete": True, "out": request.out}
        if target:
            result |= drawing.draw_shards(target)
        if rank == 0:
            drawing.draw_sheets()
        written = {name: getattr(request, name) for name in ("grid", "video", "trajectory")}
        return result | written | {"seconds": round(time.monotonic() - started, 3)}


def forecast(request: SamplingRequest) -> Forecast:
    """What `sample` would do for this request; writes nothing. Takes a few steps of one batch, to measure their time.

    Raises:
        ConfigError, DataError, NoCheckpoint, Stopped: as `sample` does before it draws.
    """
    with Interrupt() as interrupt:
        generator, options, target = _prepare(request, quiet=True)
        images, total = min(request.images, SHOWN), min(request.images, SHOWN)
        if request.interpolate:
            images = total = request.interpolate
        if target:
            total = request.images
            images = total - CommittedSeeds(target, request.seeds, target.check()).count
        batch_s, steps, image_bytes = _measure(generator, options, interrupt) if images else (0.0, 0, 0)
        batches = -(-images // options.batch)
        return Forecast(
            where=request.out or request.grid or request.video or request.trajectory or "",
            work=f"{images:,} of {total:,} images to draw, in {batches:,} batch{'es' * (batches > 1)} of "
            f"{options.batch}" if images
            else f"{all_of(total, 'image')} there",
            units=images, unit="images", per_s=images / (batches * batch_s) if batches else None,
            basis=f"measured on {steps} of {generator.steps(options)} steps of one batch, one process on "
            f"{generator.device.type}",
            bytes=images * image_bytes, bytes_are="at most", free_bytes=files.free_bytes(request.out or "."),
        )  # fmt: skip


def _measure(generator: Generator, options: SamplingOptions, interrupt: Interrupt) -> tuple[float, int, int]:
    """Seconds of a batch, the steps measured, and bytes of a sample at most: of noise, which PNG cannot compress."""
    steps, times = generator.steps(options), [time.monotonic()]
    check_stop = _watch(interrupt, Progress(steps, "measuring", unit="steps", quiet=True), str)
    for images in islice(generator.denoising(range(options.batch), options, steps, check_stop), steps):
        shape = images[0].shape
        times.append(time.monotonic())
        if len(times) > _LEAST_STEPS and times[-1] - times[0] > _TRIED_S:
            break
    measured = times[1:] if len(times) > 2 else times  # the first step may compile
    seconds = (measured[-1] - measured[0]) / (len(measured) - 1) * steps
    noise = np.frombuffer(hashlib.shake_256(b"").digest(math.prod(shape)), np.uint8).reshape(shape)
    sample = Sample(key(0), preprocess.encode(noise, "png"), "png", 0, {"seed": 0, "label": 0})
    return seconds, len(measured) - 1, len(pack(sample).data)


def _prepare(request: SamplingRequest, *, quiet: bool) -> tuple[Generator, SamplingOptions, SampleSet | None]:
    """Check a request: the generator, every option, and the sample set if there is one."""
    request.check_outputs()
    request.check_start()
    generator = generators.load(
        request.source, own_device(), ema=request.ema, ema_length=request.ema_length, guide=request.guide
    )
    begun = sample_set.provenance(request.out) if request.out else {}
    options, shard_samples = choose(request, generator, begun, quiet=quiet)
    if request.from_image:
        data, strength = generator.config.data, request.strength or DEFAULT_STRENGTH
        size = options.height_width or data.height_width
        generator = generator.starting_at(image_start.read(request.from_image, strength, size, data.channels))
    if not request.out:
        return generator, options, None
    target = SampleSet(
        request.out,
        request.format,
        shard_samples,
        provenance(generator, options, request.format, shard_samples),
        environment(generator.device) | {"threads": torch.get_num_threads()},
        asked=request.seeds,
    )
    return generator, options, target


@dataclass(frozen=True)
class _Drawing:
    """The outputs of a request."""

    request: SamplingRequest
    generator: Generator
    options: SamplingOptions
    target: SampleSet | None
    interrupt: Interrupt
    quiet: bool

    def draw_shards(self, target: SampleSet) -> dict[str, Any]:
        """Draw this process's shards, except those that an earlier start or another process has finished.

        The progress is that of the whole set.
        """
        generator, seeds, options, images = self.generator, self.request.seeds, self.options, self.request.images
        committed = CommittedSeeds(target, seeds, target.check())
        process, data, count = process_rank(), generator.config.data, 0
        shards = in_turn(target.numbers(seeds), process)
        done = committed.count
        with Progress(images, "sampling", unit="images", done=done, quiet=self.quiet, steady=True) as progress:
            if process.size > 1:
                share = sum(len(target.seeds_in(i, seeds)) for i in shards)
                progress.info(f"process {process.rank} of {process.size}: its share is {share} of {images} images")
            if images < options.batch // 2:
                wanted = "1 image is" if images == 1 else f"{images} images are"
                progress.info(f"{wanted} wanted, but each batch draws {options.batch}: --batch {images} is faster; "
                              "the last bits of the images may differ")  # fmt: skip

            def show_count() -> None:
                committed.look()
                progress.set_done(committed.count)

            for i in shards:
                requested, stored = target.seeds_in(i, seeds), target.committed(i)
                committed.note(i, stored)
                if not stored.issuperset(requested):
                    members = sorted(stored.union(requested))
                    where = f" of shard {i}" if len(shards) > 1 else ""
                    check_stop = self.watch(progress, members, where, show_count)
                    drawn = committed.counted(i, generator.images(members, options, check_stop))
                    target.write(i, drawn, generator.labels(members, options))
                    committed.note(i, members)
                    count += len(members)
                show_count()
            complete = target.finish(
                seeds,
                size=options.height_width or data.height_width,
                channels=data.channels,
                classes=generator.class_names,
            )
            progress.info(f"{target.url}: {_drawn(count, committed.count, images)}")
        return {"drawn": count, "complete": complete}

    def watch(
        self,
        progress: Progress,
        seeds: Collection[int],
        where: str = "",
        show_count: Callable[[], None] = lambda: None,
    ) -> Callable[[], None]:
        """`_watch` for the batches of these seeds."""
        passes = SAMPLERS[self.options.sampler].passes(self.generator.steps(self.options))
        batches = len({seed // self.options.batch for seed in seeds})

        def text(number: int) -> str:
            batch, done = divmod(number, passes)
            return f"network pass {done + 1} of {passes}, batch {batch + 1} of {batches}{where}"

        return _watch(self.interrupt, progress, text, show_count)

    def draw_sheets(self) -> None:
        """Write the files that are requested beside the sample set."""
        request = self.request
        if request.interpolate:
            self.draw_interpolation(request.interpolate)
            return
        if request.grid:
            self.draw_grid(request.grid)
        if request.video:
            self.draw_video(request.video)
        if request.trajectory:
            self.draw_trajectories(request.trajectory)

    def draw_grid(self, path: str) -> None:
        """Write a sheet of the first images; those in the sample set are read instead of drawn."""
        shown = self.target.read(self._first, self.generator.config.data.channels) if self.target else {}
        missing = [seed for seed in self._first if seed not in shown]
        with Progress(len(missing), "drawing the grid", unit="images", quiet=self.quiet) as progress:
            check_stop = self.watch(progress, missing)
            shown |= _counted(self.generator.images(missing, self.options, check_stop), progress)
            sheet = grid(np.stack([shown[seed] for seed in self._first]))
            written = _write(path, preprocess.encode(sheet, "png"))
            progress.info(f"grid of {len(self._first)} images: {written}")

    def draw_video(self, path: str) -> None:
        """Write a video of the denoising of the first images."""
        steps = self.generator.steps(self.options)
        count = -(-steps // -(-steps // VIDEO_FRAMES)) + 1
        with Progress(count, "drawing the video", unit="frames", quiet=self.quiet) as progress:
            check_stop = self.watch(progress, self._first[:1])
            denoising = self.generator.denoising(self._first, self.options, VIDEO_FRAMES, check_stop)
            frames = (grid(images) for _, images in _counted(enumerate(denoising), progress))
            written = _write(path, video.encode(frames, video.kind(path)))
            progress.info(f"video of their denoising: {written}")

    def draw_trajectories(self, path: str) -> None:
        """Write a sheet of the first seeds: a row each, from noise to image."""
        with Progress(1, "drawing the trajectories", unit="sheets", quiet=self.quiet) as progress:
            seeds, check_stop = self._first[:TRAJECTORY_ROWS], self.watch(progress, self._first[:1])
            rows = self.generator.trajectories(seeds, self.options, TRAJECTORY_COLUMNS, check_stop)
            sheet = grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
            written = _write(path, preprocess.encode(sheet, "png"))
            progress.advance()
            progress.info(f"trajectories of {len(rows)} seeds: {written}")

    def draw_interpolation(self, count: int) -> None:
        """Write the images between the two seeds: a grid of one row, a video, or both."""
        request, (first, last) = self.request, self._first
        with Progress(count, "interpolating", unit="images", quiet=self.quiet) as progress:
            check_stop = self.watch(progress, range(count))
            between = self.generator.between(first, last, self.options, count, check_stop)
            images = np.stack([image for _, image in _counted(enumerate(between), progress)])
            written = []
            if request.grid:
                written.append(_write(request.grid, preprocess.encode(grid(images, columns=count), "png")))
            if request.video:
                frames = (grid(image[None]) for image in images)
                written.append(_write(request.video, video.encode(frames, video.kind(request.video))))
            progress.info(f"{count} images from seed {first} to seed {last}: {', '.join(written)}")

    @cached_property
    def _first(self) -> list[int]:
        """The seeds that a grid or a video shows."""
        return [seed for part in self.request.seeds for seed in part[:SHOWN]][:SHOWN]


def _write(path: str, data: bytes) -> str:
    """Write a file, and return how a line names it: whether it replaces one."""
    replaced = files.exists(path)
    files.write_bytes(path, data)
    return "replaced " * replaced + path


def _drawn(count: int, there: int, images: int) -> str:
    """What this process drew, and what is there now."""
    if there < images:
        return f"{count} images drawn here, {there} of {images} are there: other processes are still at work"
    if not count:
        return f"{all_of(images, 'image')} there already"
    return f"{count} images drawn" + f" here, all {images} are there" * (count < images)


def _watch(
    interrupt: Interrupt,
    progress: Progress,
    text: Callable[[int], str],
    show_count: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """A function to call before each pass through the network: it raises `Stopped` on request, and reports progress.

    Args:
        interrupt: the request to stop.
        progress: where to show it.
        text: number of passes before this one → what to show.
        show_count: updates the count of images.
    """
    passes = 0

    def check_stop() -> None:
        nonlocal passes
        if interrupt.requested:
            raise Stopped(
                f"stop requested ({interrupt.requested}): finished shards are kept; the same command continues"
            )
        show_count()
        progress.show_alive(text(passes))
        passes += 1

    return check_stop


def _counted(images: Iterable[tuple[int, _T]], progress: Progress) -> Iterator[tuple[int, _T]]:
    """The same images; each one advances the progress."""
    for seed, image in images:
        yield seed, image
        progress.advance()


if __name__ == "__main__":
    from pipeline import cli

    cli.main(["sample", *sys.argv[1:]])
