"""What may change when a run goes on: only what leaves the finished steps as they were."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config_file import dump, parse_stored
from pipeline.errors import ConfigError
from pipeline.training.continuity import check_same_run


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {"train": {"steps": 1000, "warmup_steps": 10}, "run": {"dir": "runs/a"}}
    return Config.model_validate({k: values.get(k, {}) | sections.get(k, {}) for k in values.keys() | sections.keys()})


def refusal(old: Config, new: Config, steps_done: int = 100) -> str:
    with pytest.raises(ConfigError) as caught:
        check_same_run(old, new, steps_done)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CHANGES: dict[str, Any] = {
    "data.shards": "other", "data.val_shards": "v", "data.size": 64, "data.channels": 1, "data.flip": True,
    "data.lanes": 8, "data.window": 7, "data.workers": 5,
    "data.cache": "c", "data.cache_limit": 5, "model.base_channels": 64, "model.channel_mults": [1, 2],
    "model.blocks_per_level": 3, "model.attention_sizes": [8], "model.head_channels": 64, "model.norm_groups": 16,
    "model.dropout": 0.0, "model.num_classes": 10, "model.label_dropout": 0.2, "model.scale_shift": True,
    "model.learned_variance": True, "model.num_heads": 2, "model.norm_eps": 1e-5, "model.resample_blocks": True,
    "model.downsample_padding": 1,
    "model.freq_shift": 0, "model.flip_sin_to_cos": True, "model.timestep_scale": 0.25,
    "diffusion.timesteps": 500, "diffusion.schedule": "cosine",
    "diffusion.log_snr_shift": -1.0, "diffusion.log_snr_min": -9.0, "diffusion.prediction_type": "v_prediction",
    "diffusion.loss_weighting": "min_snr", "diffusion.min_snr_gamma": 1.0, "diffusion.sigmoid_bias": -2.0,
    "train.steps": 2000,
    "train.global_batch": 64, "train.micro_batch": 32, "train.lr": 1e-3, "train.lr_schedule": "cosine",
    "train.lr_stages": [[5, 1e-3]], "train.warmup_steps": 20, "train.clip_norm": 2.0, "train.precision": "fp32",
    "train.checkpointing": "full", "train.ema_device": "cpu",
    "train.compile": True, "train.fused_norm": True, "train.gradient_compression": "bf16",
    "train.deterministic": True, "train.ema_lengths": (0.08,), "train.ema_decay": 0.99, "train.init_from": "x",
    "train.device": "cpu", "train.seed": 1, "train.max_bad_steps": 3, "sample.sampler": "ddim", "sample.batch": 2,
    "run.dir": "runs/b", "run.checkpoint_every": 7, "run.keep_last": 5, "run.log_every": 3,
}  # fmt: skip
FREE = {
    "data.shards", "data.val_shards", "data.workers", "data.cache", "data.cache_limit",
    "train.global_batch", "train.steps",
    "train.micro_batch", "train.checkpointing", "train.ema_device",
    "train.compile", "train.fused_norm", "train.init_from", "train.device", "train.max_bad_steps",
    "sample.sampler", "sample.batch",
    "run.dir", "run.checkpoint_every", "run.keep_last", "run.log_every",
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_is_free_or_frozen(key: str) -> None:
    section, _, name = key.partition(".")
    new = config(**{section: {name: CHANGES[key]}})
    if key in FREE:
        check_same_run(config(), new, 100)
        return
    message = refusal(config(), new)
    assert f"({key}: " in message and " -> " in message
    assert message.endswith(f"--override {key}")
    check_same_run(config(), new, 100, overrides=[key])


def test_every_key_is_in_the_table_so_that_a_new_one_is_decided_on() -> None:
    sections = {
        f"{s}.{k}" for s in ("data", "model", "diffusion", "train") for k in type(getattr(config(), s)).model_fields
    }
    assert sections == {key for key in CHANGES if not key.startswith(("run.", "sample."))}


def test_the_refusal_shows_every_difference_and_what_to_do() -> None:
    message = refusal(config(), config(train={"seed": 3}, data={"window": 7}, run={"log_every": 9, "dir": "runs/b"}))
    assert message == (
        "data.window, train.seed are fixed once a run starts (data.window: 256 -> 7; train.seed: 0 -> 3 in runs/b): "
        "resume with --config runs/b/config.yaml, choose another run.dir, or add --override data.window "
        "--override train.seed"
    )
    rate = refusal(config(), config(train={"lr": 1e-4}))
    assert rate.startswith("train.lr is fixed once a run starts (train.lr: 0.0002 -> 0.0001 in runs/a): ")
    assert "train.lr_stages, choose another run.dir, or add --override train.lr" in rate


def test_overriding_one_key_does_not_free_another() -> None:
    new = config(train={"seed": 3}, data={"window": 7})
    with pytest.raises(ConfigError, match=r"\(data.window: 256 -> 7 in runs/a\)"):
        check_same_run(config(), new, 100, overrides=["train.seed"])
    check_same_run(config(), new, 100, overrides=["train.seed", "data.window"])


def test_a_run_may_grow_but_not_end_in_its_past() -> None:
    check_same_run(config(), config(train={"steps": 5000}), 1000)
    check_same_run(config(), config(train={"steps": 100}), 100)
    message = refusal(config(), config(train={"steps": 99}), 100)
    assert message.startswith("train.steps is 99, but runs/a is at step 100 already, of 1000: resume it with --config")
    assert message.endswith(" runs/a/config.yaml, or raise train.steps")


def staged(*stages: tuple[int, float], **more: Any) -> Config:
    return config(train={"lr_stages": stages, "warmup_steps": 0, **more})


def test_stages_to_come_may_change_and_the_past_may_not() -> None:
    """The article's plan, 1e-3 and then lower: train, look, train on at a lower rate."""
    old = staged((50, 1e-3), (50, 2e-4))
    for future in [((50, 2e-4), (50, 2e-5)), ((50, 2e-4), (9, 1e-2)), ((70, 2e-4), (1, 2e-5)), ((60, 2e-4),)]:
        check_same_run(old, staged((50, 1e-3), *future, steps=5000), 100)
    assert "train.lr_stages" in refusal(old, staged((50, 1e-3), (49, 2e-4), (50, 2e-5)), 100)
    check_same_run(old, staged((50, 1e-3), (49, 2e-4), (50, 2e-5)), 99)  # step 99 has not been done
    assert "train.lr_stages" in refusal(old, staged((50, 2e-3), (50, 2e-4)), 100)


def test_another_way_to_write_the_same_past_is_the_same_run() -> None:
    """From a constant rate to stages, when a run that is DONE goes on."""
    old = config(train={"lr": 1e-3, "warmup_steps": 0})
    check_same_run(old, config(train={"lr": 5.0, "lr_stages": [[100, 1e-3], [50, 1e-4]], "warmup_steps": 0}), 100)
    assert "train.lr" in refusal(old, config(train={"lr": 1e-4, "warmup_steps": 0}), 1)


def test_before_the_first_step_every_rate_is_to_come() -> None:
    check_same_run(config(), config(train={"lr": 1e-5, "warmup_steps": 0}), 0)
    assert "train.seed" in refusal(config(), config(train={"seed": 1}), 0)


def test_what_a_checkpoint_stores_is_compared_as_written() -> None:
    """The old configuration comes back from YAML text; nothing differs but what was changed."""
    old = config(train={"lr": 1e-5, "lr_stages": [[3, 1e-6]]}, data={"size": [32, 64]})
    check_same_run(parse_stored(dump(old)), old, 3)
