"""Job: shard set → run. `accelerate launch -m pipeline.train --config C.yaml [key=value …]`.

`train` reads from top to bottom as the story of a run. Order of the data, learning rate and all that is random follow
from the step, so a run that is killed and started again does what it would have done: steps done, samples consumed,
weights and optimizer are all there is to restore.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial

import accelerate
import torch

from pipeline import configfile, storage
from pipeline.config import Config
from pipeline.data.batches import Batch, Batches, read_all
from pipeline.data.fit import check_fit
from pipeline.data.order import Order, check_world, default_lanes
from pipeline.data.shardset import ShardSet
from pipeline.data.workers import start_worker_server
from pipeline.errors import ConfigError, DataError, Stopped, Superseded
from pipeline.generator import load_weights
from pipeline.model import ema as averaging
from pipeline.run import failure, memory, opening, world
from pipeline.run.checkpoint import Checkpoint
from pipeline.run.environment import environment
from pipeline.run.heartbeat import Heartbeat
from pipeline.run.interrupt import CONTROL_FILE, REASONS, STOPPED, Interrupt
from pipeline.run.learning_rate import learning_rate
from pipeline.run.lease import Lease
from pipeline.run.meter import Meter
from pipeline.run.opening import Opened
from pipeline.run.progress import Progress
from pipeline.run.saver import Saver
from pipeline.run.telemetry import Telemetry
from pipeline.run.world import World
from pipeline.trainer import Position, Trainer

_RUNS_BEHIND = ("cuda",)  # devices that queue their work while the host goes on


def train(config: Config, *, insist: Collection[str] = (), quiet: bool = False) -> None:
    """Train until the run's last step, going on from its newest checkpoint if there is one.

    Args:
        config: the whole run; lengths may still be in epochs.
        insist: frozen keys that may differ from the run's own all the same.
        quiet: show nothing but warnings.

    Raises:
        ConfigError: the settings do not fit the data, the ranks, or what the run was started with.
        DataError: the shard set is unreadable, or the last checkpoint could not be written.
        NoCheckpoint: the run has checkpoints, but none is valid.
        RankLost: another process of the job is gone or stuck.
        Stopped: it was asked for; a checkpoint was saved.
        Superseded: another job holds the run.
    """
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        if config.run.time_limit:
            interrupt.end_within(config.run.time_limit)
        if config.data.workers:
            start_worker_server()  # it imports torch while this process joins the others and builds the network
        ranks = world.enter(config.train.device, config.run.timeout)
        # Only ranks that end together part in order; after an error the others may wait in a collective for ever.
        stack.push(lambda kind, *_: ranks.leave() if kind in (None, Stopped) else None)

        # The data, and the configuration that fits it.
        if not config.data.shards:
            raise ConfigError("data.shards is not set: name a shard set, as `ddpm shard --out` writes them")
        shards = _open_shards(config.data.shards, ranks)
        config = config.in_steps(shards.samples)
        check_fit(shards, config.data, config.model.num_classes)
        validation = _open_validation(config, ranks)

        # The run: new, to be resumed, or finished. One job at a time holds it.
        lease = Lease(config.run.dir, partial(_say, ranks))
        opened = ranks.ask(lambda: _open(config, shards, insist, ranks, stack, lease))
        if opened.step >= config.train.steps:
            _say(
                ranks,
                f"{config.run.dir}: done at step {opened.step}, nothing to do (raise train.steps to go on)",
                quiet,
            )
            return
        heartbeat = stack.enter_context(_heartbeat(config, ranks))
        stack.enter_context(failure.recorded(config.run.dir, heartbeat, world.is_lost_contact))

        # The parts, and where they stand.
        fresh = None
        if config.train.init_from and not opened.checkpoint:
            fresh = load_weights(config.train.init_from, config)
        trainer = Trainer(config, ranks, fresh)
        position = _restore(trainer, opened)
        check_world(position.lanes, ranks.size)
        trainer.settle(position)
        trainer.warm_up(position.micro_batch)

        # The data from there on, and what is said of it.
        order = Order(
            config.train.seed, shards.shard_samples, config.train.global_batch, position.lanes, config.data.window
        )
        batches = stack.enter_context(
            Batches(shards, order, rank=ranks.rank, world_size=ranks.size, first_sample=position.samples,
                    workers=config.data.workers, flip=config.data.flip, pin=ranks.device.type == "cuda")
        )  # fmt: skip
        progress = stack.enter_context(
            Progress(config.train.steps, "training", unit="steps", done=position.step, quiet=quiet or not ranks.is_main)
        )
        telemetry = saver = None
        if ranks.is_main:
            telemetry = stack.enter_context(Telemetry(config.run.dir, position.step, progress.warn))
            saver = stack.enter_context(_saver(config, opened.checkpoint, lease, telemetry, progress.warn))
        progress.say(_headline(trainer, position, shards, opened.checkpoint))

        interrupt.control_file = storage.join(config.run.dir, CONTROL_FILE) if ranks.is_main else None
        around = _Surroundings(interrupt, lease, heartbeat, shards, validation, telemetry, saver, progress)
        _loop(trainer, position, batches, around)

        ranks.ask(lambda: _write_done(config, position.step))
        progress.say(f"done: {position.step} steps; checkpoints, previews and TensorBoard logs are in {config.run.dir}")


@dataclass
class _Surroundings:
    """What the loop looks at and speaks to."""

    interrupt: Interrupt
    lease: Lease
    heartbeat: Heartbeat
    shards: ShardSet
    validation: Batch | None
    """This rank's share."""
    telemetry: Telemetry | None
    """On rank 0, as the next one."""
    saver: Saver | None
    progress: Progress


def _loop(trainer: Trainer, position: Position, batches: Batches, around: _Surroundings) -> None:
    """Step until the run's end or until a stop is asked for, which leaves a checkpoint too.

    The verdict on a step is read when the device is busy with the next gradient, or at once if something else is due.
    """
    config, ranks, at = trainer.config, trainer.world, around.heartbeat.at
    every = (config.run.log_every, config.run.val_every, config.run.preview_every, config.run.checkpoint_every)
    meter = Meter(config.diffusion.timesteps, ranks.device, trainer.flops)
    while position.step < config.train.steps:
        # Data: what is read follows from the position alone.
        at(position.step, "data")
        with meter.waiting():
            batch = next(batches)

        # Gradients; ranks talk only in the last micro-batch.
        at(position.step, "gradient")
        gradient = trainer.gradient(batch, position)

        # Verdict on the step before; a stop leaves this one undone.
        at(position.step, "agreement")
        stop = _heed(trainer, position, around)
        if not stop:
            # Verdict on this one: one all-reduce. No rank may skip a step or leave alone.
            agreed = ranks.agree_soon(
                ~gradient.finite, REASONS.index(around.interrupt.requested or ""), around.lease.lost
            )

            # Update: a bad step changes nothing but its counter.
            at(position.step, "update")
            trainer.update(position, agreed)
            meter.add(gradient.losses, gradient.t, gradient.norm)
            if ranks.device.type not in _RUNS_BEHIND or _due(trainer, position, *every):
                stop = _heed(trainer, position, around)
            at(position.step, "report")
            _report(trainer, position, meter, batches, around)

        # Look and save.
        last = position.step == config.train.steps
        with meter.paused():
            if last or not stop:
                _look(trainer, position, around)
            if stop or last or position.step % config.run.checkpoint_every == 0:
                at(position.step, "saving")
                _save(trainer, position, around, must=bool(stop) or last)
        if stop and not last:
            _stop(trainer, position, REASONS[stop])


def _heed(trainer: Trainer, position: Position, around: _Surroundings) -> int:
    """Act on the verdict on the last step; the number of the reason to stop, 0 if there is none."""
    config, (bad, stop, lost) = trainer.config, trainer.conclude(position)
    if lost:
        around.lease.check()
        raise Superseded(f"{config.run.dir} was taken over by another job: this one writes no more")
    if bad and trainer.world.is_main:
        first = position.samples - config.train.global_batch
        around.progress.warn(f"warning: step {position.step} changes no weights: loss or gradient was not finite "
                            f"(samples {first} to {position.samples - 1} of the order)")  # fmt: skip
    return stop


def _report(trainer: Trainer, position: Position, meter: Meter, batches: Batches, around: _Surroundings) -> None:
    """What is worth a word, and every `run.log_every` steps the curves."""
    config, ranks = trainer.config, trainer.world
    if around.saver:
        around.saver.ended()
    if _due(trainer, position, config.run.log_every):
        figures = meter.read(ranks.sum, config.train.global_batch)
        figures |= {
            "train/lr": learning_rate(position.step - 1, config.train),
            "train/bad_steps": float(position.bad_steps),
            "memory/peak_gib": memory.peak_bytes(ranks.device) / 2**30,
            "io/retries": float(ranks.sum(torch.tensor(batches.io_retries, device=ranks.device))),
        }
        around.progress.note(
            f"loss {figures.get('train/loss', float('nan')):.4f}, lr {figures['train/lr']:.3g}, "
            f"{figures['speed/images_per_s']:.3g} images/s"
        )
        if advice := meter.loader_limits(
            figures, workers=config.data.workers, shards=config.data.shards, retries=figures["io/retries"]
        ):
            around.progress.warn(advice)
        if around.telemetry and around.saver:
            around.telemetry.scalars(position.step, figures | around.saver.figures)
            around.interrupt.lead_s = max(30.0, 10.0 + 3 * around.saver.figures.get("checkpoint/save_s", 0.0))
    around.progress.advance()


def _look(trainer: Trainer, position: Position, around: _Surroundings) -> None:
    """Validation loss and previews, when they are due."""
    run = trainer.config.run
    if around.validation and _due(trainer, position, run.val_every):
        around.heartbeat.at(position.step, "validation")
        loss = trainer.validation_loss(around.validation, position.micro_batch)
        if around.telemetry:
            around.telemetry.scalars(position.step, {"val/loss": loss})
    if _due(trainer, position, run.preview_every):
        around.heartbeat.at(position.step, "preview")
        sheet = trainer.preview()
        if around.telemetry:
            around.telemetry.preview(position.step, sheet)


def _save(trainer: Trainer, position: Position, around: _Surroundings, *, must: bool) -> None:
    """Begin to save, on rank 0. A save that fails costs itself and not the run, unless it is the last one.

    Raises:
        DataError: it failed and `must` be.
    """
    config, ranks, problem = trainer.config, trainer.world, None
    if around.saver:
        state = {
            "step": position.step,
            "position": asdict(position),
            "config": configfile.dump(config),
            "data_sha256": around.shards.sha256,
            "data_samples": around.shards.samples,
            "classes": around.shards.classes,
            "world_size": ranks.size,
            "environment": _environment(ranks),
        }
        begun = around.saver.save(position.step, trainer.tensors(), state)
        if must:
            if begun:
                around.saver.ended(wait_for_it=True)
            problem = around.saver.problem
    if must and (problem := ranks.tell(problem)):
        if ranks.agree(around.lease.lost)[0]:
            raise Superseded(f"{config.run.dir} was taken over by another job: step {position.step} is not saved")
        raise DataError(f"step {position.step} is not saved: {problem}")


def _environment(ranks: World) -> dict[str, str]:
    return environment(ranks.device) | {"accelerate": accelerate.__version__}


def _stop(trainer: Trainer, position: Position, reason: str) -> None:
    """Leave, saved.

    Raises:
        Stopped: always.
    """
    run_dir, ranks = trainer.config.run.dir, trainer.world
    if ranks.is_main:
        with suppress(DataError, OSError):  # the checkpoint is there, which is what counts
            if reason == CONTROL_FILE:
                storage.remove(storage.join(run_dir, CONTROL_FILE))
            storage.write_json(storage.join(run_dir, STOPPED), {"reason": reason, "step": position.step})
    raise Stopped(
        f"stop requested ({reason}): saved step {position.step} of {trainer.config.train.steps}; "
        "the same command goes on from there"
    )


def _open(
    config: Config, shards: ShardSet, insist: Collection[str], ranks: World, stack: ExitStack, lease: Lease
) -> Opened:
    """On rank 0: take hold of the run and find where it goes on from; a finished one is left untouched."""
    say, data = partial(_say, ranks), (shards.sha256, shards.samples)
    opening.check_place(config.run.dir)
    if opening.is_finished(config):
        opened = opening.look(config, data, _environment(ranks), insist, say)
        if opened.step >= config.train.steps:
            return opened  # otherwise its last checkpoint is damaged, and there is something to do
    stack.enter_context(lease)
    opened = opening.look(config, data, _environment(ranks), insist, say)
    opening.begin(config, opened, say)
    if opened.step >= config.train.steps:
        _write_done(config, opened.step)  # an earlier start was killed between its last save and this
    return opened


def _heartbeat(config: Config, ranks: World) -> Heartbeat:
    def stalled(diagnosis: str) -> None:
        sys.stderr.write(f"warning: rank {ranks.rank} makes no progress: {diagnosis}\n")
        failure.stalled(config.run.dir, heartbeat, diagnosis)

    heartbeat = Heartbeat(config.run.dir, ranks.rank, ranks.size, patience_s=0.7 * config.run.timeout, on_stall=stalled)
    return heartbeat


def _saver(
    config: Config, resumed: Checkpoint | None, lease: Lease, telemetry: Telemetry, say: Callable[[str], None]
) -> Saver:
    return Saver(
        config.run.dir,
        keep_last=config.run.keep_last,
        keep_every=config.run.keep_every,
        generation=lease.generation,
        may_write=lease.check,
        afterwards=telemetry.upload,
        say=say,
        patience_s=config.run.timeout / 4,
        sound=resumed.path if resumed else None,
    )


def _open_shards(url: str, ranks: World) -> ShardSet:
    """Opened by one rank for all: it looks at each of what may be thousands of tars."""
    return ranks.ask(lambda: ShardSet.open(url))


def _open_validation(config: Config, ranks: World) -> Batch | None:
    if not (config.data.val_shards and config.run.val_every):
        return None
    shards = _open_shards(config.data.val_shards, ranks)
    check_fit(shards, config.data, config.model.num_classes)
    return read_all(shards, config.run.val_samples, (ranks.rank, ranks.size))


def _write_done(config: Config, step: int) -> None:
    failure.clear(config.run.dir)
    storage.write_json(storage.join(config.run.dir, "DONE"), {"step": step})


def _restore(trainer: Trainer, opened: Opened) -> Position:
    """Put a checkpoint into the live tensors: rank 0 reads, the others receive."""
    config, resumed = trainer.config, opened.checkpoint
    if not resumed:
        return Position(lanes=config.data.lanes or default_lanes(config.train.global_batch))
    position = Position(**opened.state["position"])
    for part, live in trainer.tensors().items():
        trainer.world.ask(partial(resumed.restore, part, live))
        trainer.world.share(live.values())
    averaging.set_updates(trainer.ema, position.ema_updates)
    return position


def _headline(trainer: Trainer, position: Position, shards: ShardSet, resumed: Checkpoint | None) -> str:
    section, ranks = trainer.config.train, trainer.world
    where = f"resuming at step {position.step} from {resumed.path}" if resumed else "starting at step 0"
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    accumulated = section.global_batch // ranks.size // position.micro_batch
    return (
        f"{trainer.config.run.dir}: {where}; {ranks.size} process{'es' * (ranks.size > 1)} on {ranks.device.type}, "
        f"{parameters:,} parameters, {shards.samples:,} pictures; global batch {section.global_batch} = "
        f"{ranks.size} ranks x {accumulated} x {position.micro_batch}, {section.precision}, "
        f"checkpointing {position.checkpointing}"
    )


def _due(trainer: Trainer, position: Position, *every: int) -> bool:
    last = position.step == trainer.config.train.steps
    return any(steps > 0 and (last or position.step % steps == 0) for steps in every)


def _say(ranks: World, line: str, quiet: bool = False) -> None:
    if ranks.is_main and not quiet:
        sys.stderr.write(line + "\n")


if __name__ == "__main__":
    from pipeline import cli

    cli.main(["train", *sys.argv[1:]])
