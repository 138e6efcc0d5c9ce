"""Where a run goes on from: the checks before anything of an existing directory is touched, and what a start leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from pipeline import configfile, storage
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.run import checkpoint as checkpoints
from pipeline.run import failure
from pipeline.run.checkpoint import Checkpoint
from pipeline.run.continuity import check_same_run
from pipeline.run.interrupt import STOPPED

CONTROL = "control"
_OF_A_RUN = {CONTROL, "logs"}
"""What a batch script may have made before the run began."""


@dataclass(frozen=True)
class Opened:
    """A run, and where it stands."""

    checkpoint: Checkpoint | None
    """The newest valid one; None at step 0."""
    state: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's."""

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.checkpoint.step if self.checkpoint else 0


def check_place(run_dir: str) -> None:
    """See that a directory is a run, or may become one.

    Raises:
        ConfigError: it holds something else.
    """
    if not run_dir:
        raise ConfigError("run.dir is not set: name a directory or URL, such as run.dir=runs/cats")
    if storage.exists(run_dir) and not storage.is_dir(run_dir):
        raise ConfigError(f"run.dir {run_dir} is a file: name a directory")
    names = {name for name in storage.listdir(run_dir) if not name.startswith(".")}
    if "checkpoints" not in names and "config.yaml" in names:
        _parse_own(run_dir)
    elif "config.yaml" not in names and names - _OF_A_RUN:
        raise ConfigError(f"{run_dir} exists and is not a run (no config.yaml): choose another run.dir")


def is_finished(config: Config) -> bool:
    """Whether the run says that it is done with as many steps as are asked for; reads next to nothing."""
    run_dir = config.run.dir
    return storage.exists(storage.join(run_dir, "DONE")) and checkpoints.committed_step(run_dir) >= config.train.steps


def look(
    config: Config,
    data: tuple[str, int],
    environment: dict[str, str],
    insist: Collection[str],
    say: Callable[[str], None],
) -> Opened:
    """Find the newest checkpoint that the configuration may go on from. Writes nothing.

    Args:
        config: the whole run, with all lengths in steps.
        data: sha256 and number of samples of the shard set.
        environment: what the bits depend on besides; compared with the checkpoint's, but not refused.
        insist: keys that may differ from the run's own all the same.
        say: told what is passed over, and what else is worth a word.

    Raises:
        ConfigError: the settings or the data are not those of the run.
        NoCheckpoint: the run has checkpoints, but none is valid.
    """
    run_dir = config.run.dir
    found, rejected = checkpoints.newest(run_dir)
    for line in rejected:
        say(f"warning: {run_dir}: {line}")
    if not found:
        return Opened(None)
    state = found.state()
    for line in check_same_run(configfile.parse(state["config"]), config, found.step, insist):
        say(f"warning: {run_dir}: {line}")
    if state["data_sha256"] != data[0] and "data.shards" not in insist:
        raise ConfigError(
            f"{config.data.shards} is not the data {run_dir} was trained on ({data[1]} samples, then "
            f"{state['data_samples']}): restore it, take another run.dir, or insist with --override data.shards"
        )
    before = state.get("environment", {})
    if changed := [f"{key}: {before[key]} -> {now}" for key, now in environment.items() if before.get(key, now) != now]:
        say(f"warning: {run_dir} goes on with other software or another device ({'; '.join(changed)}): its last bits "
            "will differ from those of a run that did not")  # fmt: skip
    lanes = state["position"]["lanes"]
    if config.train.global_batch % lanes:
        raise ConfigError(
            f"train.global_batch is {config.train.global_batch}, but {run_dir} reads its data in {lanes} lanes: "
            f"take a multiple of {lanes}"
        )
    return Opened(found, state)


def begin(config: Config, opened: Opened, say: Callable[[str], None]) -> None:
    """Write down what the run is now, and forget how its last start ended."""
    run_dir = config.run.dir
    for name in (failure.FILE, STOPPED, f"{CONTROL}/ranks"):
        storage.remove(storage.join(run_dir, name))
    if not opened.checkpoint:
        checkpoints.sweep(run_dir)  # a second one would look like a run that has lost its checkpoints
    if opened.step >= config.train.steps:
        return
    if opened.checkpoint and storage.exists(storage.join(run_dir, "DONE")):
        checkpoints.keep(opened.checkpoint)  # a finished model is never lost to the retention of the run that goes on
        storage.remove(storage.join(run_dir, "DONE"))
    storage.write_bytes(storage.join(run_dir, "config.yaml"), configfile.dump(config).encode())
    if config.train.warmup_steps >= config.train.steps:
        say(
            f"warning: train.warmup_steps {config.train.warmup_steps} is no shorter than the run "
            f"({config.train.steps} steps): the full learning rate is never reached"
        )


def _parse_own(run_dir: str) -> None:
    """Only a configuration as a run writes it down, every key of every section, is taken for a run's."""
    path = storage.join(run_dir, "config.yaml")
    try:
        text = storage.read_bytes(path).decode()
        own = configfile.dump(configfile.parse(text, path)) == text
    except (ConfigError, UnicodeDecodeError):
        own = False
    if not own:
        raise ConfigError(f"{path} is not the configuration of a run: choose another run.dir")
