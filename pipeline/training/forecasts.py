"""How long a run takes and how much it writes, from a few of its own steps."""

from __future__ import annotations

import time
from typing import NamedTuple

from pipeline import messages
from pipeline.cluster.world import World
from pipeline.data.loading.batches import Batches
from pipeline.forecast import Forecast
from pipeline.storage import files
from pipeline.training.start import ResumePoint
from pipeline.training.trainer import Trainer

_STEPS = 2


class Measured(NamedTuple):
    """What a few steps have shown."""

    seconds: float
    """Of a step."""
    checkpoint_bytes: int


def measure(trainer: Trainer, batches: Batches) -> Measured:
    """Take a step, which may compile, then measure two. Every rank must call this; the trainer is of no use after."""
    if trainer.world.is_main:
        messages.info(f"taking {1 + _STEPS} steps of {trainer.config.train.global_batch} images, to measure their time")
    for number in range(1 + _STEPS):
        if number == 1:
            started = time.monotonic()
        trainer.finish_step(trainer.gradient(next(batches)))
    seconds = (time.monotonic() - started) / _STEPS
    return Measured(seconds, sum(tensor.nbytes for part in trainer.tensors().values() for tensor in part.values()))


def of_run(point: ResumePoint, ranks: World, measured: Measured | None) -> Forecast:
    """The forecast of a run from where it resumes; without `measured` it has nothing left to do."""
    run, section, step = point.config.run, point.config.train, point.step
    if measured is None:
        return Forecast(run.dir, f"done at step {step}, nothing to do", 0, "steps", None, "", 0)
    left = section.steps - step
    where = f"from {point.checkpoint.path}" if point.checkpoint else "from step 0"
    saves = left // run.checkpoint_every + 1 if run.checkpoint_every else 1
    kept = min(run.keep_last, saves) + (left // run.keep_every if run.keep_every else 0)
    processes = f"{ranks.size} process{'es' * (ranks.size > 1)} on {ranks.device.type}"
    return Forecast(
        where=run.dir,
        work=f"{left:,} of {section.steps:,} steps to train, {where}",
        units=left,
        unit="steps",
        per_s=1 / measured.seconds,
        basis=f"measured on {_STEPS} steps of {section.global_batch} images, {processes}; validation, previews and "
        "evaluation come on top",
        bytes=kept * measured.checkpoint_bytes,
        free_bytes=files.free_bytes(run.dir),
    )
