"""What a run shows and keeps: progress bar, curves, previews, checkpoints. On other ranks than 0 nothing is written."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline import messages
from pipeline.checkpoints.async_save import Saver
from pipeline.checkpoints.checkpoint import Checkpoint, keep_forever, lowest_distance
from pipeline.cluster.lease import Lease
from pipeline.cluster.world import World
from pipeline.config import Config
from pipeline.evaluation.intervals import Figure, curves
from pipeline.monitoring.progress import Progress
from pipeline.monitoring.telemetry import Telemetry
from pipeline.training.intervals import Schedule
from pipeline.training.train_state import TrainState


class RunLog:
    """Progress, telemetry and checkpoints of a run. Every rank calls the same methods; only rank 0 writes.

    Args:
        config: the whole run.
        world: the ranks.
        state: of the run.
        schedule: says what is due at which step.
        lease: of this job on the run.
        resumed: the checkpoint that the run resumes from.
        quiet: show nothing but warnings.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        state: TrainState,
        schedule: Schedule,
        lease: Lease,
        resumed: Checkpoint | None,
        *,
        quiet: bool,
    ) -> None:
        self._config, self._world, self._state, self._schedule = config, world, state, schedule
        self._progress = Progress(
            config.train.steps, "training", unit="steps", done=state.step, quiet=quiet or not world.is_main
        )
        self._telemetry: Telemetry | None = None
        self._saver: Saver | None = None
        self._best: dict[str, Any] | None = None
        self._lowest = lowest_distance(config.run.dir) if world.is_main and resumed else None
        if world.is_main:
            if resumed and schedule.is_milestone(resumed.step):  # the start that saved it may have been killed
                keep_forever(resumed)
            self._telemetry = Telemetry(config.run.dir, state.step, self.warn, config.model_dump(mode="json"))
            self._saver = Saver(
                config.run.dir, keep_last=config.run.keep_last, keep_every=schedule.keep_every,
                generation=lease.generation, check_lease=lease.check, on_saved=self._telemetry.upload, warn=self.warn,
                patience_s=config.run.timeout / 4, verified_path=resumed.path if resumed else None,
                is_milestone=schedule.is_milestone,
            )  # fmt: skip

    def __enter__(self) -> RunLog:
        with ExitStack() as stack:
            for part in (self._progress, self._telemetry, self._saver):
                if part:
                    stack.enter_context(part)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def paused(self) -> AbstractContextManager[None]:
        """Exclude the time spent in this context from the progress's rate and time left."""
        return self._progress.paused()

    def info(self, line: str) -> None:
        """A line for people, from rank 0."""
        self._progress.info(line)

    def warn(self, line: str) -> None:
        """A warning from this rank, also with `--quiet`."""
        messages.warning(line)

    def due(self, *names: str) -> bool:
        """Whether one of `names`, such as `checkpoint` of `run.checkpoint_every`, is due; at the last step all are."""
        if self._state.step < self._config.train.steps:
            return self._schedule.due(self._state.step, *names)
        return any(getattr(self._config.run, f"{name}_every") for name in names)

    def count_step(self) -> None:
        """Count a finished step, and report how the save in the background has ended, if it has."""
        if self._saver:
            self._saver.collect_result()
        self._progress.advance()

    def figures(self, figures: dict[str, float]) -> None:
        """Curves at this step, with those of the checkpoints; some of them beside the progress bar."""
        self._progress.set_postfix(
            f"loss {figures.get('train/loss', float('nan')):.4f}, lr {figures['train/lr']:.3g}, "
            f"{figures['speed/images_per_s']:.3g} images/s"
        )
        if self._saver:
            self.scalars(figures | self._saver.figures)

    def scalars(self, figures: dict[str, float]) -> None:
        """Curves at this step."""
        if self._telemetry:
            self._telemetry.scalars(self._state.step, figures)

    def evaluation(self, figures: dict[str, Figure]) -> None:
        """Figures of samples at this step, with intervals; the lowest Fréchet distance makes the best checkpoint."""
        if not self._telemetry:
            return
        distance = figures["frechet_distance"]
        values = curves({name: figure.as_json() for name, figure in figures.items()})
        self.scalars(values | {"evaluation/samples": float(distance.n)})
        self.info(
            f"step {self._state.step}: Fréchet distance {distance.value:.4g} (95 % interval of that at infinity "
            f"{distance.low:.4g} to {distance.high:.4g}, {distance.n} samples against {distance.reference_n} images)"
        )
        if self._lowest is None or distance.value < self._lowest:
            self._lowest = distance.value
            self._best = {"step": self._state.step, "frechet_distance": distance.value, "samples": distance.n}

    def preview(self, sheet: NDArray[np.uint8]) -> None:
        """A sheet of samples at this step, uint8 (H, W, C)."""
        if self._telemetry:
            self._telemetry.preview(self._state.step, sheet)

    @property
    def save_s(self) -> float:
        """Seconds that the last save took in the background; 0 before the first."""
        return self._saver.figures.get("checkpoint/save_s", 0.0) if self._saver else 0.0

    def save(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, wait: bool) -> str | None:
        """Begin to save a checkpoint of this step. A save that fails costs itself and not the run.

        Args:
            tensors: part of the checkpoint → name → live tensor.
            state: JSON values.
            wait: return when the checkpoint is there.

        Returns:
            With `wait`, on every rank: why it has failed, or None.
        """
        problem = None
        if self._saver:
            updates = self._state.ema_updates if self.due("ema_snapshot") else None
            best = self._best if self._best and self._best["step"] == self._state.step else None
            begun = self._saver.save(self._state.step, tensors, state, snapshot_updates=updates or None, best=best)
            if wait and begun:
                self._saver.collect_result(wait=True)
            problem = self._saver.problem
        return self._world.broadcast_object(problem) if wait else None

    def newest_safe_checkpoint(self) -> str | None:
        """The newest checkpoint from which good steps followed, on every rank; None if there is none."""
        return self._world.on_rank0(
            lambda: self._saver.newest_safe_checkpoint(self._state.ema_updates) if self._saver else None
        )
