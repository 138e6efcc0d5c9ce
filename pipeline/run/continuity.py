"""What may change when a run goes on, and what would make it another run."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.config import Config, differences
from pipeline.errors import ConfigError
from pipeline.run.learning_rate import same_past

MAY_CHANGE = (
    "run.",
    "sample.",
    "data.shards",
    "data.val_shards",
    "data.workers",
    "train.steps",
    "train.global_batch",
    "train.device",
    "train.micro_batch",
    "train.checkpointing",
    "train.compile",
    "train.ema_device",
    "train.max_bad_steps",
    "train.init_from",
)
"""Keys, or whole sections, that do not decide what the run computes or only how far it goes."""
_RATE_KEYS = {"train.lr", "train.lr_schedule", "train.lr_stages", "train.warmup_steps"}


def check_same_run(old: Config, new: Config, steps_done: int, insist: Collection[str] = ()) -> list[str]:
    """Refuse settings under which the finished steps would have been others.

    Args:
        old: what the newest checkpoint was trained with.
        new: what is asked for now.
        steps_done: finished steps.
        insist: keys that may differ all the same.

    Returns:
        What is allowed but worth a warning, a line each.

    Raises:
        ConfigError: with the difference, and which keys may change.
    """
    if new.train.steps < steps_done and "train.steps" not in insist:
        raise ConfigError(
            f"train.steps is {new.train.steps}, but {new.run.dir} is at step {steps_done} already: it may only grow"
        )
    changed = {
        key: values
        for key, values in differences(old, new).items()
        if not key.startswith(MAY_CHANGE) and key not in insist
    }
    past_is_same = same_past(old.train, new.train, steps_done)
    if past_is_same:
        changed = {key: values for key, values in changed.items() if key not in _RATE_KEYS}
    if changed:
        diff = "; ".join(f"{key}: {before} -> {after}" for key, (before, after) in changed.items())
        free = ", ".join(f"{key}*" if key.endswith(".") else key for key in MAY_CHANGE)
        raise ConfigError(
            f"{new.run.dir} was started with other settings ({diff}): take another run.dir, or insist with "
            f"{' '.join(f'--override {key}' for key in changed)}; free to change are {free}, and the learning rates of "
            "steps to come"
        )
    if not past_is_same and not _RATE_KEYS & set(insist):
        return [f"with train.steps={new.train.steps} the learning rates of the finished steps would have been others"]
    return []
