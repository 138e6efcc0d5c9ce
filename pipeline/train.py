"""Job: shard set → run. `accelerate launch -m pipeline.train --config C.yaml [key=value …]`.

`train` reads from top to bottom as the story of a run. The order of the data, the learning rate and all randomness
follow from the step, so a run that is killed and started again computes what an unbroken run computes: the number of
steps and samples, the weights and the optimizer are all that a resume restores.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from math import inf
from typing import Any
from uuid import uuid4

import torch

from pipeline import config_file, messages
from pipeline.checkpoints.run_dir import RunDir
from pipeline.cluster import failure, world
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.cluster.interrupt import CONTROL_FILE, REASONS, Interrupt
from pipeline.cluster.lease import Lease
from pipeline.cluster.world import World
from pipeline.config import Config
from pipeline.data.loading.batches import Batch, Batches, read_all
from pipeline.data.loading.order import Order, check_world
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError, Diverged, NoCheckpoint, RunHeld, Stopped
from pipeline.evaluation.features import is_to_be_fetched
from pipeline.forecast import Forecast
from pipeline.monitoring.machine import cpu_has_bf16
from pipeline.monitoring.meter import Meter
from pipeline.processes.forkserver import start_worker_server
from pipeline.sampling.pretrained import load_for_training
from pipeline.storage import files
from pipeline.training import forecasts, resume
from pipeline.training.datasets import fit_classes, open_sets, with_cache
from pipeline.training.evaluator import Evaluator
from pipeline.training.learning_rate import learning_rate
from pipeline.training.micro_batch import peak_bytes
from pipeline.training.phases import Phases
from pipeline.training.run_log import RunLog
from pipeline.training.start import ResumePoint
from pipeline.training.trainer import REMEDY, StepVote, Trainer

_MANY_PARAMETERS = 10_000_000
"""For a CPU: 3 seconds a step of 128 images of 32 px, on 2 cores."""


def train(config: Config, *, overrides: Collection[str] = (), quiet: bool = False) -> None:
    """Train until the run's last step, resuming from its newest checkpoint if there is one.

    Args:
        config: the whole run; lengths may still be in epochs.
        overrides: keys that a run fixes when it starts and that may differ all the same.
        quiet: show nothing but warnings.

    Raises:
        ConfigError: the settings do not fit the data, the ranks, or what the run was started with.
        Diverged: the weights are not finite, or too many steps in a row were bad.
        DataError: the shard set is unreadable, or the last checkpoint could not be written.
        NoCheckpoint: the run has checkpoints, but none is valid; or the one to start from gives no finite loss.
        RankLost: another process of the job is gone or stuck.
        Stopped: on request; a checkpoint was saved.
        RunHeld: another job holds the run.
    """
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt("" if quiet else "this step is finished and saved first"))
        interrupt.set_time_limit(config.run.time_limit or inf)
        if config.data.workers:
            start_worker_server()  # it imports torch while this process joins the others and builds the network
        ranks = world.init_distributed(config.train.device, config.run.timeout)
        # Only ranks that end together shut down in order; after an error the others may wait in a collective for ever.
        stack.push(lambda kind, *_: ranks.shutdown() if kind in (None, Stopped) else None)

        # The run: new, to be resumed, or finished. One job at a time holds it.
        sets = open_sets(config, ranks)
        info, warn = (write if ranks.is_main else messages.discard for write in (messages.info, messages.warning))
        lease = Lease(config.run.dir, info)
        point, schedule = ranks.on_rank0(
            lambda: resume.open_run(config, sets, overrides, ranks, stack, lease, info, warn)
        )
        config = point.config
        interrupt.warn_if_too_short(warn)
        if point.step >= config.train.steps:
            if not quiet:
                info(f"{config.run.dir}: done at step {point.step}, nothing to do; train.steps may grow")
            return
        heartbeat = stack.enter_context(_heartbeat(config, ranks))
        stack.enter_context(failure.record_errors(config.run.dir, heartbeat, world.is_lost_contact))

        # Network, optimizer and state, restored; then the data from there on.
        trainer, origin = _make_trainer(config, ranks, point)
        shards, *held_out = (fit_classes(data, point.classes) for data in sets)
        validation = next((read_all(data, config.run.val_samples, (ranks.rank, ranks.size)) for data in held_out), None)
        shards = with_cache(shards, config.data, info)
        batches = stack.enter_context(_open_batches(trainer, shards))

        log = stack.enter_context(RunLog(config, ranks, trainer.state, schedule, lease, point.checkpoint, quiet=quiet))
        _log_start(log, trainer, shards, origin)
        interrupt.control_file = RunDir(config.run.dir).stop if ranks.is_main else None
        meter = Meter(config.diffusion.timesteps, ranks.device, trainer.flops)
        phase = Phases(trainer.state, heartbeat, meter, log.paused)
        try:
            evaluator = _evaluator(config, ranks, [*held_out, shards][0], phase, interrupt)
            _loop(trainer, batches, shards, validation, evaluator, log, meter, phase, interrupt, lease)
        except Diverged as error:
            safe = log.newest_safe_checkpoint()
            advice = (
                f"newest sound checkpoint: {safe}: remove newer ones"
                if safe
                else "there is no sound checkpoint: start a new run"
            )
            raise Diverged(f"{error}; {advice}") from None

        ranks.on_rank0(lambda: resume.write_done(config, trainer.state.step))
        log.info(
            f"done: {trainer.state.step} steps; checkpoints, previews and TensorBoard logs are in {config.run.dir}"
        )


def forecast(config: Config, *, overrides: Collection[str] = ()) -> Forecast | None:
    """What `train` with these arguments would do; writes nothing. Takes three steps, to measure their time.

    Returns:
        None on ranks other than 0.

    Raises:
        ConfigError, DataError, Diverged, NoCheckpoint, RunHeld: as `train` does before its first step.
    """
    with ExitStack() as stack:
        ranks = world.init_distributed(config.train.device, config.run.timeout)
        stack.push(lambda kind, *_: ranks.shutdown() if kind is None else None)
        sets = open_sets(config, ranks)
        info, warn = (write if ranks.is_main else messages.discard for write in (messages.info, messages.warning))
        point, _ = ranks.on_rank0(lambda: resume.open_run(config, sets, overrides, ranks, stack, None, info, warn))
        measured = None
        if point.step < point.config.train.steps:
            trainer, _ = _make_trainer(point.config, ranks, point)
            shards, *held_out = (fit_classes(data, point.classes) for data in sets)
            batches = stack.enter_context(_open_batches(trainer, shards))
            if config.run.evaluate_every and not is_to_be_fetched(config.run.evaluate_features):
                Evaluator(point.config, ranks, [*held_out, shards][0], nullcontext, lambda: False)
            measured = forecasts.measure(trainer, batches)
        return forecasts.of_run(point, ranks, measured) if ranks.is_main else None


def _loop(
    trainer: Trainer,
    batches: Batches,
    shards: ShardSet,
    validation: Batch | None,
    evaluator: Evaluator | None,
    log: RunLog,
    meter: Meter,
    phase: Phases,
    interrupt: Interrupt,
    lease: Lease,
) -> None:
    """Take steps until the run's last one, or until a rank is asked to stop; save a checkpoint in both cases."""
    state, last_step = trainer.state, trainer.config.train.steps
    while state.step < last_step:
        with phase("data"):  # which samples come next follows from the state alone
            batch = next(batches)
        with phase("gradient"):  # ranks communicate in the last micro-batch only
            gradient = trainer.gradient(batch)
        with phase("update"):  # one vote of all ranks; a bad step changes nothing but its counter
            vote = trainer.finish_step(gradient, stop=REASONS.index(interrupt.requested or ""), lost=lease.lost)
            _handle_vote(vote, trainer, log, lease)
        with phase("report"):
            meter.add(gradient.losses, gradient.t, gradient.norm)
            _report(trainer, batches, log, meter, interrupt)
        stops_early = vote.stop and state.step < last_step
        if not stops_early:
            _validate(trainer, validation, evaluator, log, phase)
        if vote.stop or log.due("checkpoint", "keep", "ema_snapshot", "evaluate"):
            with phase("saving"):
                _save(trainer, shards, log, lease, wait=bool(vote.stop) or state.step == last_step)
        if stops_early:
            _stop(trainer, REASONS[vote.stop])


def _handle_vote(vote: StepVote, trainer: Trainer, log: RunLog, lease: Lease) -> None:
    """Warn of a bad step, and end this job if another one holds the run."""
    config, state = trainer.config, trainer.state
    if vote.lost:
        lease.check()
        raise RunHeld(f"{config.run.dir} was taken over by another job: this job stops writing to it")
    if vote.bad and trainer.world.is_main:
        first = state.samples - config.train.global_batch
        log.warn(
            f"step {state.step} changes no weights: loss or gradient was not finite "
            f"(samples {first} to {state.samples - 1} of the order)"
        )


def _report(trainer: Trainer, batches: Batches, log: RunLog, meter: Meter, interrupt: Interrupt) -> None:
    """Count the step, and every `run.log_every` steps write the curves."""
    config, ranks, state = trainer.config, trainer.world, trainer.state
    if log.due("log"):
        figures = meter.read(ranks.sum, config.train.global_batch) | {
            "train/lr": learning_rate(state.step - 1, config.train),
            "train/bad_steps": float(state.bad_steps),
            "memory/peak_gib": peak_bytes(ranks.device) / 2**30,
            "io/retries": float(ranks.sum(torch.tensor(batches.io_retries, device=ranks.device))),
        }
        log.figures(figures)
        if advice := meter.slow_loader_advice(
            figures, workers=config.data.workers, shards=config.data.shards, retries=figures["io/retries"]
        ):
            log.warn(advice)
        interrupt.lead_s = max(30.0, 10.0 + 3 * log.save_s)
    log.count_step()


def _validate(
    trainer: Trainer, validation: Batch | None, evaluator: Evaluator | None, log: RunLog, phase: Phases
) -> None:
    """Validation loss, previews and evaluation, when they are due."""
    run, step = trainer.config.run, trainer.state.step
    if validation and log.due("val"):
        with phase("validation"):
            log.info(f"step {step}: computing the validation loss")
            log.scalars({"val/loss": trainer.validation_loss(validation)})
    if log.due("preview"):
        with phase("preview"):
            log.info(f"step {step}: drawing {run.preview_samples} preview images")
            log.preview(trainer.preview())
    if evaluator and log.due("evaluate"):
        log.info(f"step {step}: drawing {run.evaluate_samples:,} images to evaluate")
        figures = evaluator.evaluate(trainer.generator())
        if figures is None:
            log.info(f"step {step} is not evaluated: a stop was requested")
        elif figures:
            log.evaluation(figures)


def _save(trainer: Trainer, shards: ShardSet, log: RunLog, lease: Lease, *, wait: bool) -> None:
    """Save a checkpoint of this step.

    Raises:
        Diverged: the weights give no finite loss.
        DataError: with `wait`, the checkpoint could not be written.
        RunHeld: another job holds the run.
    """
    step = trainer.state.step
    if not trainer.is_sound():
        raise Diverged(f"step {step} is not saved: its weights give no finite loss: {REMEDY}")
    problem = log.save(trainer.tensors(), _checkpoint_state(trainer, shards), wait=wait)
    if problem:
        if trainer.world.all_reduce_max(lease.lost)[0]:
            raise RunHeld(f"{trainer.config.run.dir} was taken over by another job: step {step} is not saved")
        raise DataError(f"step {step} is not saved: {problem}")


def _checkpoint_state(trainer: Trainer, shards: ShardSet) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return {
        "step": trainer.state.step,
        "position": asdict(trainer.state),
        "config": config_file.dump(trainer.config),
        "data_sha256": shards.sha256,
        "data_samples": shards.samples,
        "classes": shards.classes,
        "world_size": trainer.world.size,
        "environment": resume.environment_of(trainer.world),
    }


def _stop(trainer: Trainer, reason: str) -> None:
    """Write down why the run stops, and raise Stopped."""
    run, step = RunDir(trainer.config.run.dir), trainer.state.step
    if trainer.world.is_main:
        with suppress(DataError, OSError):  # the checkpoint is there, which is what counts
            if reason == CONTROL_FILE:
                files.remove(run.stop)
            files.write_json(run.stopped, {"reason": reason, "step": step})
    raise Stopped(
        f"stop requested ({reason}): saved step {step} of {trainer.config.train.steps}; "
        "the same command continues from there"
    )


def _heartbeat(config: Config, ranks: World) -> Heartbeat:
    heartbeat = Heartbeat(
        config.run.dir, ranks.rank, ranks.size, start=ranks.broadcast_object(uuid4().hex),
        patience_s=0.7 * config.run.timeout, on_stall=lambda: failure.report_stall(config.run.dir, heartbeat),
    )  # fmt: skip
    return heartbeat


def _make_trainer(config: Config, ranks: World, point: ResumePoint) -> tuple[Trainer, str]:
    """The trainer with weights and state as at the resume point, ready for its first step; and where they come from."""
    weights, origin = None, "starting at step 0"
    if point.checkpoint:
        origin = f"resuming at step {point.step} from {point.checkpoint.path}"
    elif config.train.init_from:
        model = ranks.on_rank0(partial(load_for_training, config.train.init_from, config, point.classes))
        weights, step = model.weights, model.state.get("step")
        origin += f" with the weights of {config.train.init_from}" + f" (step {step})" * (step is not None)
    trainer = Trainer(config, ranks, weights)
    if ranks.is_main and ranks.device.type == "cpu":
        _warn_of_a_slow_cpu(trainer)
    resume.restore(trainer, point)
    check_world(trainer.state.lanes, ranks.size)
    trainer.choose_micro_batch()
    trainer.warm_up()
    source = point.checkpoint.path if point.checkpoint else config.train.init_from
    if source and not trainer.is_sound():
        raise NoCheckpoint(f"{source}: its weights give no finite loss: remove it, or give an earlier checkpoint")
    return trainer, origin


def _evaluator(
    config: Config, ranks: World, reference: ShardSet, phase: Phases, interrupt: Interrupt
) -> Evaluator | None:
    if not config.run.evaluate_every:
        return None
    return Evaluator(config, ranks, reference, lambda: phase("evaluation"), lambda: interrupt.requested is not None)


def _open_batches(trainer: Trainer, shards: ShardSet) -> Batches:
    """This rank's batches, from the next step on."""
    config, ranks = trainer.config, trainer.world
    order = Order(
        config.train.seed, shards.shard_samples, config.train.global_batch, trainer.state.lanes, config.data.window
    )
    return Batches(
        shards, order, rank=ranks.rank, world_size=ranks.size, first_sample=trainer.state.samples,
        workers=config.data.workers, flip=config.data.flip, pin=ranks.device.type == "cuda",
    )  # fmt: skip


def _log_start(log: RunLog, trainer: Trainer, shards: ShardSet, origin: str) -> None:
    """The first line of a run: where it starts or resumes, on what, and how the global batch is divided."""
    section, ranks, state = trainer.config.train, trainer.world, trainer.state
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    accumulated = section.global_batch // ranks.size // state.micro_batch
    log.info(
        f"{trainer.config.run.dir}: {origin}; {ranks.size} process{'es' * (ranks.size > 1)} on {ranks.device.type}, "
        f"{parameters:,} parameters, {shards.samples:,} images; batch {section.global_batch} = "
        f"{ranks.size} process{'es' * (ranks.size > 1)} × {accumulated} accumulation × {state.micro_batch} images; "
        f"{section.precision}, checkpointing {state.checkpointing}"
    )


def _warn_of_a_slow_cpu(trainer: Trainer) -> None:
    """Say before the first step, which may take minutes, what is too much for a CPU."""
    if trainer.config.train.precision == "bf16" and not cpu_has_bf16():
        messages.warning(
            "this CPU has no instructions for bf16 and may be thirty times faster in fp32: start a new run "
            "with train.precision=fp32"
        )
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    if parameters > _MANY_PARAMETERS:
        messages.warning(
            f"a network of {parameters:,} parameters trains on the CPU: a step may take minutes; configs/trial.yaml is "
            "made for a CPU"
        )


if __name__ == "__main__":
    from pipeline import cli

    cli.main(["train", *sys.argv[1:]])
