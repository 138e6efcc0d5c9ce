"""Job: checkpoint + seeds → samples. `ddpm sample RUN --seeds 0-49999 --out SAMPLES`, or `accelerate launch` for many.

A map over shards of seeds, without any collective. Whatever number of processes work on it, and however often they are
killed, the set comes out the same: a seed always meets the same noise, in the same slot of a batch of the same size,
and a shard is done once its record is there.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline import generator as generators
from pipeline import storage
from pipeline.config import SampleSection
from pipeline.data import images, sampleset, video
from pipeline.data.grid import grid
from pipeline.data.sampleset import Format, SampleSet, parse_seeds
from pipeline.errors import ConfigError, Stopped
from pipeline.generator import Generator, Manner
from pipeline.run.environment import environment
from pipeline.run.interrupt import Interrupt
from pipeline.run.progress import Progress

SHOWN = 100
"""Most pictures in a grid or a video: the first of the seeds asked for."""
SHARDS, SHARD_BATCHES, SHARD_SAMPLES = 64, 4, 1024
"""If not said otherwise a set has about so many shards, of at most so many batches and so many seeds."""
VIDEO_FRAMES = 120
"""Most frames of a video before its last one."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Request:
    """What is asked for, and where it goes."""

    seeds: tuple[range, ...]
    out: str | None = None
    format: Format = "tar"
    shard_samples: int = 0
    """Seeds in a shard, a multiple of the batch; 0: not settled yet."""
    grid: str | None = None
    video: str | None = None


def sample(
    generator: Generator, identity: str, manner: Manner, request: Request, interrupt: Interrupt, *, quiet: bool = False
) -> dict[str, Any]:
    """Draw the pictures of all seeds asked for that are not there yet.

    Args:
        generator: the trained network.
        identity: sha256 that identifies its weights.
        manner: how to draw.
        request: what to draw, and where to.
        interrupt: looked at before each pass through the network.
        quiet: show nothing but warnings.

    Returns:
        `images` asked for, `drawn` by this process, `complete`, `seconds`, and where they are.

    Raises:
        ConfigError: the request does not fit the model, or the output holds something else.
        DataError: no space left.
        Stopped: on request; finished shards stay.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    quiet = quiet or rank > 0
    started, total = time.monotonic(), sum(map(len, request.seeds))
    first = [seed for part in request.seeds for seed in part[:SHOWN]][:SHOWN]
    data = generator.config.data
    _check(generator, manner, request)
    result: dict[str, Any] = {"images": total, "drawn": 0, "complete": True, "out": request.out}
    target = request.out and SampleSet(
        request.out,
        request.format,
        request.shard_samples,
        _provenance(generator, identity, manner, request),
        environment(generator.device) | {"threads": torch.get_num_threads()},
    )

    # Shard by shard; what another start or another process has finished is not done again.
    if target:
        target.check()
        mine = _in_turn(target.numbers(request.seeds), rank, world_size)
        share = sum(len(target.asked(i, request.seeds)) for i in mine)
        with Progress(share, "sampling", unit="images", quiet=quiet) as progress:
            if total < manner.settings.batch // 2:
                progress.say(f"{total} of the {manner.settings.batch} slots of a batch used; --batch {total} is "
                             "faster, but the last bits of the pictures may differ")  # fmt: skip
            go_on = _watch(interrupt, progress)
            for i in mine:
                asked, there = target.asked(i, request.seeds), target.there(i)
                if known := there.intersection(asked):
                    progress.advance(len(known))
                if not there.issuperset(asked):
                    seeds = sorted(there.union(asked))
                    drawn = _counted(generator.pictures(seeds, manner, go_on), progress, already=there)
                    target.write(i, drawn, generator.labels(seeds, manner))
                    result["drawn"] += len(seeds)
            size = manner.size or data.height_width
            result["complete"] = target.finish(
                request.seeds, size=size, channels=data.channels, classes=generator.class_names
            )
            progress.say(f"{result['drawn']} pictures drawn, {total} asked for: {request.out}"
                         + ("" if result["complete"] else " (other processes are still at work)"))  # fmt: skip

    # A sheet and a video of the first seeds.
    if request.grid and rank == 0:
        shown = target.read(first, data.channels) if target else {}
        missing = [seed for seed in first if seed not in shown]
        with Progress(len(missing), "drawing the grid", unit="images", quiet=quiet) as progress:
            shown |= _counted(generator.pictures(missing, manner, _watch(interrupt, progress)), progress)
            storage.write_bytes(request.grid, images.encode(grid(np.stack([shown[seed] for seed in first])), "png"))
            progress.say(f"grid of {len(first)} pictures: {request.grid}")
    if request.video and rank == 0:
        steps = generator.sampler(manner.settings).steps
        count = -(-steps // -(-steps // VIDEO_FRAMES)) + 1
        with Progress(count, "drawing the video", unit="frames", quiet=quiet) as progress:
            denoising = generator.denoising(first, manner, VIDEO_FRAMES, _watch(interrupt, progress))
            frames = (grid(pictures) for _, pictures in _counted(enumerate(denoising), progress))
            storage.write_bytes(request.video, video.encode(frames, video.kind(request.video)))
            progress.say(f"video of their denoising: {request.video}")
    return result | {"grid": request.grid, "video": request.video, "seconds": round(time.monotonic() - started, 3)}


def from_flags(
    source: str,
    settings: dict[str, Any],
    *,
    seeds: str,
    shard_samples: int | None,
    ema: bool,
    precision: str | None,
    label: int | None,
    size: tuple[int, int] | None,
    quiet: bool,
    **outputs: Any,
) -> dict[str, Any]:
    """`sample` with what the command line gives; what it leaves open comes from the run, or from the set begun."""
    with Interrupt() as interrupt:
        request = Request(parse_seeds(seeds), **outputs)
        _check_places(request)
        generator, identity = generators.load(source, _device(), ema=ema)
        model = generator.config.model
        section = SampleSection.model_validate(generator.config.sample.model_dump() | settings)
        if "guidance" not in settings and not (model.num_classes and model.label_dropout):
            section = section.model_copy(update={"guidance": 1.0})
        if "variance" in settings and model.learned_variance:
            raise ConfigError("--variance: this model has learned its variance: leave it out")
        if shard_samples and "batch" not in settings and shard_samples % section.batch:
            batch = max(size for size in range(1, section.batch + 1) if shard_samples % size == 0)
            sys.stderr.write(f"warning: batches of {batch} instead of {section.batch}, to fit --shard-samples "
                             f"{shard_samples}: the last bits of the pictures may differ\n")  # fmt: skip
            section = section.model_copy(update={"batch": batch})
        request = replace(request, shard_samples=shard_samples or _shard_samples(request, section.batch))
        manner = Manner(section, precision or generator.config.train.precision, label, size)
        return sample(generator, identity, manner, request, interrupt, quiet=quiet)


def _shard_samples(request: Request, batch: int) -> int:
    """As in the set that is there; else enough shards for many processes, whatever their number is now."""
    begun = sampleset.shard_samples(request.out) if request.out else None
    if begun and begun % batch == 0:
        return begun
    batches = sum(map(len, request.seeds)) // batch // SHARDS
    return batch * max(1, min(batches, SHARD_BATCHES, SHARD_SAMPLES // batch))


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _check(generator: Generator, manner: Manner, request: Request) -> None:
    """Refuse what the model cannot do, before anything is drawn."""
    model, data = generator.config.model, generator.config.data
    if (manner.label is not None or manner.settings.guidance != 1.0) and not model.num_classes:
        raise ConfigError(
            "--label and --guidance need a class-conditional model, this one is unconditional: leave them out"
        )
    if manner.label is not None and manner.label >= model.num_classes:
        raise ConfigError(f"--label {manner.label}: this model knows the classes 0 to {model.num_classes - 1}")
    if manner.settings.guidance != 1.0 and not model.label_dropout:
        raise ConfigError(
            "--guidance: the model was trained with model.label_dropout=0 and cannot be guided: leave it out"
        )
    if not math.isfinite(manner.settings.guidance):
        raise ConfigError(f"--guidance {manner.settings.guidance}: give a number, such as 3")
    steps, timesteps = generator.sampler(manner.settings).steps, generator.config.diffusion.timesteps
    if steps > timesteps:
        raise ConfigError(f"--steps {steps}: this model has {timesteps} timesteps: take no more steps than that")
    if request.shard_samples % manner.settings.batch:
        raise ConfigError(
            f"--shard-samples {request.shard_samples} is no multiple of --batch {manner.settings.batch}: change either"
        )
    height, width = manner.size or data.height_width
    if height % model.stride or width % model.stride:
        raise ConfigError(f"--size {height}x{width}: this network draws multiples of {model.stride} pixels: change it")
    if (height, width) != data.height_width:
        sys.stderr.write(
            f"warning: trained at {data.height_width[0]}x{data.height_width[1]}, drawing at {height}x{width}: expect "
            "repeated or broken shapes\n"
        )


def _check_places(request: Request) -> None:
    if not (request.out or request.grid or request.video):
        raise ConfigError("nothing to write: give --out SAMPLES, --grid FILE.png or --video FILE.mp4")
    for path in (request.grid, request.video):
        if path and request.out and path.startswith(request.out.rstrip("/") + "/"):
            raise ConfigError(f"{path} lies in the sample set {request.out}: name a place beside it")
        if path and storage.is_dir(path):
            raise ConfigError(f"{path} is a directory: name a file in it")
    if request.grid and not request.grid.lower().endswith(".png"):
        raise ConfigError(f"--grid {request.grid}: the sheet is a PNG: name a .png file")
    if request.video:
        video.check(request.video)


def _provenance(generator: Generator, identity: str, manner: Manner, request: Request) -> dict[str, Any]:
    sampler, settings = generator.sampler(manner.settings), manner.settings
    return {
        "checkpoint_sha256": identity,
        "weights": "ema" if generator.ema else "model",
        "sampler": sampler.name,
        "steps": sampler.steps,
        "eta": sampler.eta,
        "spacing": sampler.spacing,
        "variance": sampler.variance,
        "guidance": settings.guidance,
        "label": manner.label,
        "batch": settings.batch,
        "precision": manner.precision,
        "size": list(manner.size or generator.config.data.height_width),
        "format": request.format,
        "shard_samples": request.shard_samples,
    } | ({"compile": True} if settings.compile else {})  # older sets say nothing of it, and may go on


def _in_turn(shards: list[int], rank: int, world_size: int) -> list[int]:
    """The shards of this process: its share under a launcher, otherwise all of them, begun where others do not.

    Independent processes share the work that way: each looks before a shard whether it is done, and a shard that two
    of them draw at once comes out the same. The tasks of a job array begin at their proportional places and go round,
    others in random order; that is a matter of speed only.
    """
    share = shards[rank::world_size]
    task, first, tasks = (os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "MIN", "COUNT"))
    if task.isdecimal() and first.isdecimal() and tasks.isdecimal():
        start = len(share) * (int(task) - int(first)) // max(1, int(tasks)) % max(1, len(share))
        return share[start:] + share[:start]
    if world_size == 1:
        random.SystemRandom().shuffle(share)
    return share


def _watch(interrupt: Interrupt, progress: Progress) -> Callable[[], None]:
    """What to do before each pass through the network: leave if asked to, and show a sign of life."""
    passes = 0

    def go_on() -> None:
        nonlocal passes
        if interrupt.requested:
            raise Stopped(
                f"stop requested ({interrupt.requested}): finished shards stay; the same command goes on from there"
            )
        progress.pulse(f"network pass {passes}")
        passes += 1

    return go_on


def _counted(
    pictures: Iterable[tuple[int, _T]], progress: Progress, already: Collection[int] = ()
) -> Iterator[tuple[int, _T]]:
    for seed, picture in pictures:
        yield seed, picture
        if seed not in already:
            progress.advance()


if __name__ == "__main__":
    from pipeline import cli

    cli.main(["sample", *sys.argv[1:]])
