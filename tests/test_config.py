"""Settings: units, rules between them, lengths in epochs, and a text form that says everything."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import Config, ModelSection, TrainSection, differences
from pipeline.config_file import dump, load, parse_stored
from pipeline.errors import ConfigError


def parse(text: str) -> Config:
    return load("c.yaml", (), lambda _: text)


def complaints(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value).splitlines()


# --- values ---


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800), ("0.5", 0.5)]
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert parse(f"run: {{timeout: {text}}}").run.timeout == seconds


def test_one_number_is_a_square() -> None:
    assert parse("data: {size: 32}").data.height_width == (32, 32)
    assert parse("data: {size: [32, 48]}").data.height_width == (32, 48)


NUMBERS = sorted({
    f"{section}.{key}" for section, values in Config().model_dump().items() for key in values
    if "number" in str(getattr(Config(), section).model_json_schema()["properties"][key])
})  # fmt: skip


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.0e+999"])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_is_not_finite_is_refused(key: str, value: str) -> None:
    section, _, field = key.partition(".")
    (complaint,) = complaints(f"{section}: {{{field}: {f'[[1, {value}]]' if field == 'lr_stages' else value}}}")
    assert key in complaint


def test_every_kind_of_number_was_tried() -> None:
    assert set(NUMBERS) >= {
        "train.lr", "train.lr_stages", "train.clip_norm", "diffusion.min_snr_gamma", "train.ema_decay",
        "model.dropout", "sample.guidance", "sample.eta", "run.timeout", "run.time_limit",
    }  # fmt: skip


@pytest.mark.parametrize("base", [*range(4, 258, 2)])
def test_automatic_norm_groups_divide_the_base_and_leave_four_channels_or_more_to_a_group(base: int) -> None:
    groups = ModelSection(base_channels=base).groups
    assert base % groups == 0 and base // groups >= 4 and groups <= 32
    assert groups == max(n for n in range(1, 33) if base % n == 0 and base // n >= 4)


def test_automatic_norm_groups_of_wide_networks_are_the_papers_and_a_number_is_taken_as_it_is() -> None:
    assert [ModelSection(base_channels=base).groups for base in (128, 256)] == [32, 32]
    assert ModelSection(base_channels=32, norm_groups=32).groups == 32
    assert parse("model: {base_channels: 32}").model.norm_groups == "auto"


# --- rules between settings ---


@pytest.mark.parametrize(
    ("text", "one", "cure"),
    [
        ("data: {size: 36}", "data.size 36x36 cannot be halved 3 times", "multiple of 8, or fewer model.channel_mults"),
        ("data: {size: [32, 36]}", "data.size 32x36 cannot be halved 3 times", "use a multiple of 8, or fewer "),
        ("data: {lanes: 3}", "train.global_batch 128 is not a multiple of data.lanes 3", "change one of them"),
        (
            "train: {micro_batch: 48}",
            "train.global_batch 128 is not a multiple of train.micro_batch 48",
            "change one of",
        ),
        (
            "train: {lr_schedule: cosine, lr_stages: [[1, 1]]}",
            "train.lr_stages and train.lr_schedule=cosine cannot both be set",
            "",
        ),
        ("sample: {steps: 1001}", "sample.steps 1001 exceeds diffusion.timesteps 1000", ""),
    ],
)
def test_settings_that_do_not_go_together_name_both(text: str, one: str, cure: str) -> None:
    (complaint,) = complaints(text)
    assert complaint.startswith(f"c.yaml: {one}") and cure in complaint


def test_all_contradictions_are_reported_at_once() -> None:
    assert len(complaints("data: {size: 36, lanes: 3}")) == 2


def test_a_seed_that_the_noise_cannot_take_is_refused() -> None:
    complaints(f"train: {{seed: {1 << 64}}}")


# --- lengths ---


def test_epochs_become_steps_rounded_up_so_that_every_sample_is_seen() -> None:
    config = parse(
        "train: {steps: 2ep, global_batch: 32, warmup_steps: 0.5ep, lr_stages: [[1ep, 1e-3], [7, 1e-4]]}\n"
        "run: {checkpoint_every: 1ep, keep_every: 3ep}"
    ).in_steps(100)  # 3.125 steps an epoch
    assert (config.train.steps, config.train.warmup_steps) == (7, 2)
    assert config.train.lr_stages == ((4, 1e-3), (7, 1e-4))
    assert (config.run.checkpoint_every, config.run.keep_every) == (4, 10)


def test_an_epoch_that_divides_is_exact_and_a_short_one_is_a_step() -> None:
    assert parse("train: {steps: 50ep, global_batch: 100}").in_steps(60_000).train.steps == 30_000
    assert parse("train: {steps: 0.001ep}").in_steps(10).train.steps == 1


def test_what_is_in_steps_stays() -> None:
    config = parse("train: {steps: 5}\nrun: {keep_every: 0}")
    assert config.in_steps(100) == config


def test_epochs_are_decimal_numbers() -> None:
    assert parse("train: {steps: 0.07ep, global_batch: 1}").in_steps(100).train.steps == 7


def test_a_directory_may_be_called_50ep() -> None:
    assert parse("run: {dir: 50ep}").in_steps(100).run.dir == "50ep"


def test_no_epochs_are_no_steps() -> None:
    assert parse("run: {keep_every: 0ep}").in_steps(100).run.keep_every == 0


# --- whole configurations ---

_configs = st.builds(
    lambda lr, steps, stages, size, classes, micro, timeout, text: Config.model_validate(
        {
            "data": {"size": size, "shards": text},
            "model": {"num_classes": classes, "head_channels": classes or None},
            "train": {"lr": lr, "steps": steps, "lr_stages": stages, "micro_batch": micro, "init_from": text or None},
            "run": {"timeout": timeout, "dir": text},
        }
    ),
    st.floats(1e-12, 1e3),
    st.integers(1, 10**9) | st.integers(1, 1000).map("{}ep".format) | st.just("1.5ep"),
    st.lists(st.tuples(st.integers(1, 99) | st.just("5ep"), st.floats(1e-9, 1.0)), max_size=3),
    st.sampled_from([8, 64, (8, 16)]),
    st.integers(0, 3),
    st.sampled_from(["auto", 1, 64]),
    st.sampled_from([1, 0.5, "10m"]),
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), max_size=12),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_configs)
def test_to_yaml_is_read_back_to_an_equal_configuration(config: Config) -> None:
    assert parse_stored(dump(config)) == config


@pytest.mark.parametrize(
    "text",
    [
        "no", "null", "~", "0x1", "1:30", "=", "<<", "#x", "5ep", " a ", "- b", "true", "2024-01-01", "1.5", ".inf",
        "ü: é",
        "1e-3",
    ],
)  # fmt: skip
def test_to_yaml_keeps_text_text(text: str) -> None:
    config = Config.model_validate({"run": {"dir": text}, "data": {"shards": text}})
    assert parse_stored(dump(config)) == config


def test_to_yaml_says_every_key_so_that_later_defaults_change_nothing() -> None:
    written = yaml.safe_load(dump(Config()))
    assert {name: list(values) for name, values in written.items()} == {
        name: list(type(getattr(Config(), name)).model_fields) for name in Config.model_fields
    }


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.lr = 1.0  # type: ignore[misc]


def test_differences_have_key_old_and_new_value() -> None:
    old = parse("train: {lr: 1e-3}\ndata: {size: 32}")
    new = parse("train: {lr: 1e-4, lr_stages: [[1, 1e-3]]}\ndata: {size: [32, 32]}")
    assert differences(old, old) == {}
    assert differences(old, new) == {
        "data.size": (32, [32, 32]),
        "train.lr": (1e-3, 1e-4),
        "train.lr_stages": ([], [[1, 1e-3]]),
    }


def test_every_setting_is_documented() -> None:
    """The docstring under a field is its only documentation; the schema carries it."""
    for name, section in Config.model_json_schema()["$defs"].items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}: write a docstring under the field"
    assert "auto" in str(TrainSection.model_fields["micro_batch"].description)


@pytest.mark.parametrize("value", [{"train": {"lr": True}}, {"data": {"size": True}}, {"run": {"timeout": True}},
                                   {"train": {"steps": False}}, {"sample": {"label": True}}])  # fmt: skip
def test_a_switch_is_no_number(value: dict[str, dict[str, bool]]) -> None:
    with pytest.raises(ValidationError, match="true, false, yes, no, on and off are switches"):
        Config.model_validate(value)


def test_a_size_of_one_number_in_brackets_is_shown_how_to_write_it() -> None:
    with pytest.raises(ValidationError, match=r"height and width as in \[96, 64\]"):
        Config.model_validate({"data": {"size": [8]}})
