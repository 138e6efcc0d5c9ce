"""Which settings may change when a run resumes, and which would make it another run."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.config import Config, differences
from pipeline.errors import ConfigError
from pipeline.training.learning_rate import same_past

MAY_CHANGE = (
    "run.",
    "sample.",
    "data.shards",
    "data.val_shards",
    "data.workers",
    "data.cache",
    "data.cache_limit",
    "train.steps",
    "train.global_batch",
    "train.device",
    "train.micro_batch",
    "train.checkpointing",
    "train.compile",
    "train.fused_norm",
    "train.ema_device",
    "train.max_bad_steps",
    "train.init_from",
)
"""Keys, or whole sections, that do not change what the finished steps have computed."""
_RATE_KEYS = {"train.lr", "train.lr_schedule", "train.lr_stages", "train.warmup_steps"}


def check_same_run(old: Config, new: Config, steps_done: int, overrides: Collection[str] = ()) -> list[str]:
    """Refuse settings under which the finished steps would have computed something else.

    Args:
        old: what the newest checkpoint was trained with.
        new: the configuration of this start.
        steps_done: finished steps.
        overrides: keys that may differ all the same.

    Returns:
        Warnings, a line each.

    Raises:
        ConfigError: with the difference, and what to do instead.
    """
    if new.train.steps < steps_done and "train.steps" not in overrides:
        raise ConfigError(
            f"train.steps is {new.train.steps}, but {new.run.dir} is at step {steps_done} already, of "
            f"{old.train.steps}: resume it with --config {_own(new)}, or raise train.steps"
        )
    changed = {
        key: values
        for key, values in differences(old, new).items()
        if not key.startswith(MAY_CHANGE) and key not in overrides
    }
    past_is_same = same_past(old.train, new.train, steps_done)
    if past_is_same:
        changed = {key: values for key, values in changed.items() if key not in _RATE_KEYS}
    if changed:
        diff = "; ".join(f"{key}: {before} -> {after}" for key, (before, after) in changed.items())
        instead = f"resume with --config {_own(new)}"
        if changed.keys() <= _RATE_KEYS:  # later rates are free
            instead = "give the rates of later steps as train.lr_stages"
        raise ConfigError(
            f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} fixed once a run starts ({diff} in "
            f"{new.run.dir}): {instead}, choose another run.dir, or add "
            f"{' '.join(f'--override {key}' for key in changed)}"
        )
    if not past_is_same and not _RATE_KEYS & set(overrides):
        return [f"with train.steps={new.train.steps} the finished steps would have had other learning rates"]
    return []


def _own(config: Config) -> str:
    """The configuration file in the run directory."""
    return f"{config.run.dir.rstrip('/')}/config.yaml"
