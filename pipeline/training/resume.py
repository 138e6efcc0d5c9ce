"""Open a run for training: take its lease, find its newest checkpoint, restore it; and mark the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import accelerate

from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster import failure, starts
from pipeline.cluster.lease import Lease, refuse_if_held
from pipeline.cluster.world import World
from pipeline.config import Config
from pipeline.data.shards.shard_set import ShardSet
from pipeline.diffusion.process import DiffusionProcess
from pipeline.model import ema as averaging
from pipeline.monitoring.environment import environment
from pipeline.sampling.pretrained import norm_groups
from pipeline.storage import files
from pipeline.training import start
from pipeline.training.datasets import agree_on_classes
from pipeline.training.intervals import Past, Schedule, batch_changed, newest_past, past_of
from pipeline.training.start import ResumePoint
from pipeline.training.train_state import TrainState
from pipeline.training.trainer import Trainer
from pipeline.units import EpochCounter


def open_run(
    asked: Config,
    sets: Sequence[ShardSet],
    overrides: Collection[str],
    ranks: World,
    stack: ExitStack,
    lease: Lease | None,
    info: Callable[[str], None],
    warn: Callable[[str], None],
) -> tuple[ResumePoint, Schedule]:
    """On rank 0: take the lease of the run and find where it resumes. A finished run is left untouched.

    Without a lease nothing is written: the same checks are made, for a forecast.

    Args:
        asked: the whole run; lengths may still be in epochs.
        sets: the training data, then the validation data if there is any.
        overrides: frozen keys that may differ from the run's own all the same.
        ranks: the processes of the job.
        stack: releases the lease at the end of the job.
        lease: of the run; None for a forecast.
        info: called with lines for people.
        warn: called with warnings.

    Raises:
        RunHeld: another job holds the run and is alive.
    """
    run_dir, shards = asked.run.dir, sets[0]
    agree = partial(agree_on_classes, sets, asked.model.num_classes)
    DiffusionProcess.of(asked.diffusion)  # a schedule that cannot be is refused before anything is written
    start.check_run_dir(run_dir)
    past = newest_past(run_dir)
    config = asked.in_steps(shards.samples, past)

    def find(past: Past) -> tuple[ResumePoint, Schedule]:
        resolved, data = asked.in_steps(shards.samples, past), (shards.sha256, shards.samples)
        point = start.find_resume_point(resolved, data, environment_of(ranks), overrides, warn)
        if (truth := past_of(point.state)) != past:  # the newest checkpoint is damaged, or another job has saved one
            return find(truth)
        return point, Schedule(EpochCounter(shards.samples, asked.train.global_batch, past), asked.run)

    if start.is_finished(config):
        point, schedule = find(past)
        if point.step >= point.config.train.steps:
            return point, schedule  # otherwise its last checkpoint is damaged, and there is something to do
    if start.is_new(config):
        agree(None)  # before anything is written
    if lease:
        stack.enter_context(lease)
    else:
        refuse_if_held(run_dir)
    point, schedule = find(past)
    point = replace(point, classes=agree(point.state.get("classes"), info, warn))
    config = point.config
    if config.train.init_from and not point.checkpoint and asked.model.norm_groups == "auto":
        point = replace(point, config=start.with_norm_groups(config, norm_groups(config.train.init_from)))
    if not lease:
        return point, schedule
    starts.record(run_dir, point.step, ranks.size, ranks.device.type)
    start.start_run(point, warn)
    if point.step >= config.train.steps:
        write_done(config, point.step)  # an earlier start was killed between its last save and this
    return point, schedule


def restore(trainer: Trainer, point: ResumePoint) -> None:
    """Restore the checkpoint into the trainer's state and live tensors: rank 0 reads, the others receive."""
    if not point.checkpoint:
        return
    trainer.state = state = TrainState(**point.state["position"])
    if batch_changed(past_of(point.state), trainer.config.train.global_batch):
        state.batch_changes.append((state.step, state.samples))
    for part, live in trainer.tensors().items():
        trainer.world.on_rank0(partial(point.checkpoint.restore, part, live))
        trainer.world.broadcast_(live.values())
    averaging.set_updates(trainer.ema, state.ema_updates)


def write_done(config: Config, step: int) -> None:
    """Write DONE: the run has all its steps."""
    failure.clear(config.run.dir)
    files.write_json(RunDir(config.run.dir).done, {"step": step})


def environment_of(ranks: World) -> dict[str, str]:
    """Versions and device, on which the bits of a run depend besides its settings."""
    return environment(ranks.device) | {"accelerate": accelerate.__version__}
