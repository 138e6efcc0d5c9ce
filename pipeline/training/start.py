"""The start of a run: checks before anything in its directory changes, the checkpoint to resume, the first writes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from pipeline import config_file, path_kind
from pipeline.checkpoints import ema_snapshots
from pipeline.checkpoints.checkpoint import (
    Checkpoint,
    committed_step,
    keep_forever,
    newest_checkpoint,
    remove_incomplete,
)
from pipeline.checkpoints.run_dir import RunDir
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.storage import files
from pipeline.training.continuity import check_same_run

_BEFORE_A_RUN = {"control", "logs"}
"""What a batch script may have made before the run began."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes, or step 0 of a new one."""

    config: Config
    """With `model.norm_groups` as a number."""
    checkpoint: Checkpoint | None
    """The newest valid one; None at step 0."""
    state: dict[str, Any] = field(default_factory=dict)
    """The state.json of the checkpoint."""
    classes: tuple[str, ...] | None = None
    """Names of the run's classes, by number; None for an unconditional network."""

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.checkpoint.step if self.checkpoint else 0


def check_run_dir(run_dir: str) -> None:
    """Check that a directory is a run, or may become one.

    Raises:
        ConfigError: the directory holds something else.
    """
    if not run_dir:
        raise ConfigError("run.dir is not set: set it to a directory or URL, such as run.dir=runs/cats")
    if files.exists(run_dir) and not files.is_dir(run_dir):
        raise ConfigError(f"run.dir {run_dir} is a file: give a directory")
    names = {name for name in files.listdir(run_dir) if not name.startswith(".")}
    if files.exists(RunDir(run_dir).imported):
        raise ConfigError(
            f"{run_dir} was imported: it has weights, but no data and no optimizer to resume from: choose another "
            f"run.dir with train.init_from={run_dir}"
        )
    if "checkpoints" not in names and "config.yaml" in names:
        _parse_own(run_dir)
    elif "config.yaml" not in names and names - _BEFORE_A_RUN:
        raise ConfigError(f"{path_kind.not_a_run(run_dir)}: choose another run.dir")


def is_finished(config: Config) -> bool:
    """Whether the run has DONE and a checkpoint of as many steps as the configuration asks for; reads no checkpoint."""
    run = RunDir(config.run.dir)
    return files.exists(run.done) and committed_step(run.path) >= config.train.steps


def is_new(config: Config) -> bool:
    """Whether the run has no checkpoint yet; reads none."""
    return not committed_step(config.run.dir)


def find_resume_point(
    config: Config,
    data: tuple[str, int],
    environment: dict[str, str],
    overrides: Collection[str],
    warn: Callable[[str], None],
) -> ResumePoint:
    """Find the newest valid checkpoint and check that the run may resume from it. Writes nothing.

    Args:
        config: the whole run, with all lengths in steps.
        data: sha256 and number of samples of the shard set.
        environment: software and device; a difference from the checkpoint's is a warning, for the last bits change.
        overrides: keys that may differ from the run's own all the same.
        warn: called with each warning.

    Raises:
        ConfigError: the settings or the data are not those of the run.
        NoCheckpoint: the run has checkpoints, but none is valid.
    """
    run_dir = config.run.dir
    found, rejected = newest_checkpoint(run_dir)
    for line in rejected:
        warn(f"{run_dir}: {line}")
    if not found:
        return ResumePoint(with_norm_groups(config, config.model.groups), None)
    state = found.state()
    stored = config_file.parse_stored(state["config"])
    if config.model.norm_groups == "auto":
        config = with_norm_groups(config, stored.model.groups)
    for line in check_same_run(stored, config, found.step, overrides):
        warn(f"{run_dir}: {line}")
    if state["data_sha256"] != data[0] and "data.shards" not in overrides:
        raise ConfigError(
            f"{config.data.shards} is not the data {run_dir} was trained on ({data[1]} samples, then "
            f"{state['data_samples']}): restore it, choose another run.dir, or add --override data.shards"
        )
    before = state.get("environment", {})
    if changed := [f"{key}: {before[key]} -> {now}" for key, now in environment.items() if before.get(key, now) != now]:
        warn(f"{run_dir} resumes with other software or another device ({'; '.join(changed)}): its last bits "
            "will differ from those of a run without the change")  # fmt: skip
    if config.run.ema_snapshot_every and not found.has(ema_snapshots.PART):
        raise ConfigError(
            f"run.ema_snapshot_every: {run_dir} did not track these averages from its start, so their lengths would be "
            "wrong: set it to 0, or start a new run"
        )
    lanes = state["position"]["lanes"]
    if config.train.global_batch % lanes:
        raise ConfigError(
            f"train.global_batch is {config.train.global_batch}, but {run_dir} reads its data in {lanes} lanes: "
            f"use a multiple of {lanes}"
        )
    return ResumePoint(config, found, state)


def with_norm_groups(config: Config, groups: int) -> Config:
    """The configuration with `model.norm_groups` set to a number."""
    return config.model_copy(update={"model": config.model.model_copy(update={"norm_groups": groups})})


def start_run(point: ResumePoint, warn: Callable[[str], None]) -> None:
    """Write the run's config.yaml, and remove the files that say how its last start ended."""
    config, run = point.config, RunDir(point.config.run.dir)
    for path in (run.failed, run.stopped, run.nodes, run.diagnosing, run.ranks):
        files.remove(path)
    ema_snapshots.remove_newer(run.path, point.step)
    if not point.checkpoint:
        remove_incomplete(run.path)  # a second one would look like a run that has lost its checkpoints
    if point.step >= config.train.steps:
        return
    if point.checkpoint and files.exists(run.done):
        keep_forever(point.checkpoint)  # `run.keep_last` must not remove a finished model when the run continues
        files.remove(run.done)
    files.write_bytes(run.config, config_file.dump(config).encode())
    if line := config.model.blindness:
        warn(line)
    if config.train.warmup_steps >= config.train.steps:
        warn(
            f"train.warmup_steps {config.train.warmup_steps} is no shorter than the run "
            f"({config.train.steps} steps): the full learning rate is never reached"
        )


def _parse_own(run_dir: str) -> None:
    """Refuse a config.yaml that is not as a run writes it, with every key of every section."""
    path = RunDir(run_dir).config
    try:
        own = config_file.is_stored(files.read_bytes(path).decode())
    except UnicodeDecodeError:
        own = False
    if not own:
        raise ConfigError(f"{path} is not the configuration of a run: choose another run.dir")
