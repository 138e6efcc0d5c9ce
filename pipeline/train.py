"""Job: shard set → run. `accelerate launch -m pipeline.train --config C.yaml [key=value …]`.

`train` reads from top to bottom as the story of a run. Order of the data, learning rate and all that is random follow
from the step, so a run that is killed and started again does what it would have done: steps done, samples consumed,
weights and optimizer are all there is to restore.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import accelerate
import torch

from pipeline import configfile, storage
from pipeline.config import Config
from pipeline.data.batches import Batch, Batches, read_all
from pipeline.data.order import Order, check_world, default_lanes
from pipeline.data.shardset import ShardSet
from pipeline.data.workers import start_worker_server
from pipeline.errors import ConfigError, DataError, PipelineError, Stopped
from pipeline.generator import load_weights
from pipeline.model import ema as averaging
from pipeline.run import checkpoint as checkpoints
from pipeline.run import memory, world
from pipeline.run.checkpoint import Checkpoint
from pipeline.run.continuity import check_same_run
from pipeline.run.interrupt import Interrupt
from pipeline.run.learning_rate import learning_rate
from pipeline.run.meter import Meter
from pipeline.run.progress import Progress
from pipeline.run.telemetry import Telemetry
from pipeline.run.world import World
from pipeline.trainer import Position, Trainer


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
        Stopped: a signal asked for it; a checkpoint was saved.
    """
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        if config.data.workers:
            start_worker_server()  # it imports torch while this process joins the others and builds the network
        ranks = world.enter(config.train.device, config.run.timeout)
        # Only ranks that end together part in order; after an error the others may wait in a collective for ever.
        stack.push(lambda kind, *_: ranks.leave() if kind in (None, Stopped) else None)

        # The data, and the configuration that fits it.
        shards = ShardSet.open(config.data.shards)
        config = config.in_steps(shards.samples)
        _check_data(config, shards)
        validation = _open_validation(config)

        # The run: new, to be resumed, or finished.
        opened = ranks.tell(_open_run_or_error(config, ranks, shards, insist) if ranks.is_main else None)
        if isinstance(opened, PipelineError):
            raise opened
        resumed, state = opened
        if resumed and resumed.step >= config.train.steps:
            if ranks.is_main and not storage.exists(storage.join(config.run.dir, "DONE")):
                _write_done(config, resumed.step)  # an earlier start was killed between its last save and this
            _say(
                ranks,
                f"{config.run.dir}: done at step {resumed.step}, nothing to do (raise train.steps to train on)",
                quiet,
            )
            return

        # The parts, and where they stand.
        fresh = load_weights(config.train.init_from, config) if config.train.init_from and not resumed else None
        trainer = Trainer(config, ranks, fresh)
        position = _restore(trainer, resumed, state)
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
        telemetry = stack.enter_context(Telemetry(config.run.dir, position.step)) if ranks.is_main else None
        progress = stack.enter_context(
            Progress(config.train.steps, "training", unit="steps", done=position.step, quiet=quiet or not ranks.is_main)
        )
        progress.say(_headline(trainer, position, shards, resumed))

        _loop(trainer, position, batches, _Surroundings(interrupt, shards, validation, telemetry, progress))

        if ranks.is_main:
            _write_done(config, position.step)
        progress.say(f"done: {position.step} steps; checkpoints, previews and TensorBoard logs are in {config.run.dir}")


@dataclass(frozen=True)
class _Surroundings:
    """What the loop looks at and speaks to."""

    interrupt: Interrupt
    shards: ShardSet
    validation: Batch | None
    telemetry: Telemetry | None
    """On rank 0."""
    progress: Progress


def _loop(trainer: Trainer, position: Position, batches: Iterator[Batch], around: _Surroundings) -> None:
    """Step until the run's end or until a stop is asked for, which leaves a checkpoint too."""
    config, ranks = trainer.config, trainer.world
    meter = Meter(config.diffusion.timesteps, ranks.device)
    while position.step < config.train.steps:
        # Data: what is read follows from the position alone.
        asked = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - asked

        # Gradients; ranks talk only in the last micro-batch.
        gradient = trainer.gradient(batch, position)
        meter.add(gradient.losses, gradient.t, gradient.norm, waited_s)

        # Verdict: one all-reduce. No rank may skip a step or leave alone.
        bad, stop = ranks.agree(~gradient.finite, around.interrupt.requested is not None)

        # Update: a bad step changes nothing but its counter.
        trainer.update(position, bad=bad)

        # Look and save.
        last = position.step == config.train.steps
        _report(trainer, position, meter, around, last)
        around.progress.advance()
        with meter.paused():
            _look(trainer, position, around, last)
            if stop or last or position.step % config.run.checkpoint_every == 0:
                _save(trainer, position, around, must=stop or last)
        if stop and not last:
            raise Stopped(
                f"stop requested ({around.interrupt.requested or 'on another rank'}): saved step {position.step} of "
                f"{config.train.steps}; the same command goes on from there"
            )


def _report(trainer: Trainer, position: Position, meter: Meter, around: _Surroundings, last: bool) -> None:
    """Curves, every `run.log_every` steps."""
    config, ranks = trainer.config, trainer.world
    if not _due(position.step, config.run.log_every, last):
        return
    figures = meter.read(ranks.sum, config.train.global_batch) | {
        "train/lr": learning_rate(position.step - 1, config.train),
        "train/bad_steps": float(position.bad_steps),
        "memory/peak_gib": memory.peak_bytes(ranks.device) / 2**30,
    }
    around.progress.note(f"loss {figures['train/loss']:.4f}, {figures['speed/images_per_s']:.3g} images/s")
    if around.telemetry:
        around.telemetry.scalars(position.step, figures)


def _look(trainer: Trainer, position: Position, around: _Surroundings, last: bool) -> None:
    """Validation loss and previews, when they are due."""
    run = trainer.config.run
    if around.validation and _due(position.step, run.val_every, last):
        loss = trainer.validation_loss(around.validation, position.micro_batch)
        if around.telemetry:
            around.telemetry.scalars(position.step, {"val/loss": loss})
    if _due(position.step, run.preview_every, last):
        sheet = trainer.preview()
        if around.telemetry:
            around.telemetry.preview(position.step, sheet)


def _save(trainer: Trainer, position: Position, around: _Surroundings, *, must: bool) -> None:
    """Write a checkpoint on rank 0. Failing costs the save, not the run, unless it is the last one.

    Raises:
        DataError: it failed and `must` be.
    """
    config, ranks, problem = trainer.config, trainer.world, None
    if ranks.is_main:
        state = {
            "step": position.step,
            "position": asdict(position),
            "config": configfile.dump(config),
            "data_sha256": around.shards.sha256,
            "data_samples": around.shards.samples,
            "world_size": ranks.size,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "accelerate": accelerate.__version__,
            },
        }
        try:
            checkpoints.write(config.run.dir, position.step, trainer.tensors(), state)
            checkpoints.retain(config.run.dir, config.run.keep_last, config.run.keep_every)
        except DataError as error:
            problem = str(error)
    problem = ranks.tell(problem)
    if problem and must:
        raise DataError(f"step {position.step} is not saved: {problem}")
    if problem:
        around.progress.say(f"warning: step {position.step} is not saved, training goes on: {problem}", important=True)


def _check_data(config: Config, shards: ShardSet) -> None:
    """The keys that must agree with what a shard set holds."""
    size, channels, classes = config.data.height_width, config.data.channels, config.model.num_classes
    if size != shards.size:
        theirs = "x".join(map(str, shards.size))
        raise ConfigError(
            f"data.size is {size[0]}x{size[1]}, but {shards.url} holds {theirs}: set data.size to that, or shard again"
        )
    if channels != shards.channels:
        raise ConfigError(
            f"data.channels is {channels}, but {shards.url} has {shards.channels}: set it to that, or shard again"
        )
    if classes and classes != len(shards.classes or ()):
        raise ConfigError(
            f"model.num_classes is {classes}, but {shards.url} has {len(shards.classes or ())} classes: set it to "
            "that, or to 0 for an unconditional model"
        )


def _open_validation(config: Config) -> Batch | None:
    if not (config.data.val_shards and config.run.val_every):
        return None
    shards = ShardSet.open(config.data.val_shards)
    _check_data(config, shards)
    return read_all(shards, config.run.val_samples)


def _write_done(config: Config, step: int) -> None:
    storage.write_json(storage.join(config.run.dir, "DONE"), {"step": step})


def _open_run_or_error(
    config: Config, ranks: World, shards: ShardSet, insist: Collection[str]
) -> tuple[Checkpoint | None, dict[str, Any]] | PipelineError:
    """So that all ranks learn of an error that only rank 0 can see."""
    try:
        return _open_run(config, ranks, shards, insist)
    except PipelineError as error:
        return error


def _open_run(
    config: Config, ranks: World, shards: ShardSet, insist: Collection[str]
) -> tuple[Checkpoint | None, dict[str, Any]]:
    """Where the run goes on from, with the checkpoint's state; writes down what the run now is."""
    run_dir = config.run.dir
    config_file, done_file = storage.join(run_dir, "config.yaml"), storage.join(run_dir, "DONE")
    if not run_dir or storage.is_remote(run_dir):
        raise ConfigError(
            f"run.dir is {run_dir or 'not set'}: name a local or mounted directory, such as run.dir=runs/cats"
        )
    if storage.exists(run_dir) and not storage.is_dir(run_dir):
        raise ConfigError(f"run.dir {run_dir} is a file: name a directory")
    if any(not name.startswith(".") for name in storage.listdir(run_dir)) and not storage.exists(config_file):
        raise ConfigError(f"{run_dir} exists and is not a run (no config.yaml): choose another run.dir")
    found, rejected = checkpoints.newest(run_dir)
    for line in rejected:
        _say(ranks, f"warning: {run_dir}: {line}")
    state: dict[str, Any] = {}
    if found:
        state = found.state()
        check_same_run(configfile.parse(state["config"]), config, found.step, insist)
        if state["data_sha256"] != shards.sha256 and "data.shards" not in insist:
            raise ConfigError(
                f"{shards.url} is not the data {run_dir} was trained on ({shards.samples} samples, then "
                f"{state['data_samples']}): restore it, take another run.dir, or insist with --override data.shards"
            )
        if storage.exists(done_file) and config.train.steps > found.step:
            checkpoints.keep(found)  # a finished model is never lost to the retention of the run that goes on
            storage.remove(done_file)
    if not found or config.train.steps > found.step:
        storage.write_bytes(config_file, configfile.dump(config).encode())
        if config.train.warmup_steps >= config.train.steps:
            _say(ranks, f"warning: train.warmup_steps {config.train.warmup_steps} is no shorter than the run "
                        f"({config.train.steps} steps): the full learning rate is never reached")  # fmt: skip
    return found, state


def _restore(trainer: Trainer, resumed: Checkpoint | None, state: dict[str, Any]) -> Position:
    """Put a checkpoint into the live tensors: rank 0 reads, the others receive."""
    config = trainer.config
    if not resumed:
        return Position(lanes=config.data.lanes or default_lanes(config.train.global_batch))
    position = Position(**state["position"])
    for part, live in trainer.tensors().items():
        if trainer.world.is_main:
            saved = resumed.tensors(part)
            for name, tensor in live.items():
                tensor.copy_(saved[name])
        trainer.world.share(live.values())
    weights, _ = averaging.ema_state(trainer.ema)
    averaging.load_ema_state(trainer.ema, weights, position.ema_updates)
    return position


def _headline(trainer: Trainer, position: Position, shards: ShardSet, resumed: Checkpoint | None) -> str:
    section, ranks = trainer.config.train, trainer.world
    where = f"resuming at step {position.step} from {resumed.path}" if resumed else "starting at step 0"
    million = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    accumulated = section.global_batch // ranks.size // position.micro_batch
    return (
        f"{trainer.config.run.dir}: {where}; {ranks.size} process{'es' * (ranks.size > 1)} on {ranks.device.type}, "
        f"{million:.1f} M parameters, {shards.samples} pictures; global batch {section.global_batch} = "
        f"{ranks.size} ranks x {accumulated} x {position.micro_batch}, {section.precision}, "
        f"checkpointing {position.checkpointing}"
    )


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _say(ranks: World, line: str, quiet: bool = False) -> None:
    if ranks.is_main and not quiet:
        sys.stderr.write(line + "\n")


if __name__ == "__main__":
    from pipeline import cli

    cli.main(["train", *sys.argv[1:]])
