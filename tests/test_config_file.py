"""Configuration files: what a user writes is what is meant, and a mistake is told with its place and its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import config_file
from pipeline.config import PATHS, Config
from pipeline.errors import ConfigError


def load(text: str, *overrides: str, **parents: str) -> Config:
    files = {"c.yaml": text} | {f"{name}.yaml": parent for name, parent in parents.items()}
    return config_file.load("c.yaml", overrides, files.__getitem__)


def complaints(text: str, *overrides: str, **parents: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides, **parents)
    return str(caught.value).splitlines()


# --- values as written ---


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("2e-4", 2e-4),
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("+1e-3", 1e-3),
        ("1.5e-4", 1.5e-4),
        ("2_0e-5", 2e-4),
        ("1", 1.0),
        (".5", 0.5),
    ],
)
def test_scientific_notation_is_a_number(text: str, rate: float) -> None:
    assert load(f"train: {{lr: {text}}}").train.lr == rate
    assert load("", f"train.lr={text}").train.lr == rate
    assert load(f"train: {{lr_stages: [[10, {text}]]}}").train.lr_stages == ((10, rate),)


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    assert load("train: {steps: 3e5}").train.steps == 300_000


def test_words_that_look_like_numbers_stay_words() -> None:
    assert load("run: {dir: 1e-3-run}").run.dir == "1e-3-run"
    assert load("run: {dir: e5}").run.dir == "e5"
    assert load('run: {dir: "1e5"}').run.dir == "1e5"


def test_thousands_may_be_grouped() -> None:
    assert load("train: {steps: 300_000}").train.steps == 300_000


def test_an_empty_file_is_the_run_of_the_paper() -> None:
    config = load("")
    assert config == Config()
    assert (config.train.lr, config.train.global_batch, config.train.ema_decay) == (2e-4, 128, 0.9999)
    assert config.model.channel_mults == (1, 2, 2, 2)
    assert load("train:\n") == config  # an empty section


def test_integers_are_decimal() -> None:
    assert load("data: {size: 024}").data.size == 24
    assert complaints("train: {steps: 1:30}")


# --- precedence ---


def test_command_line_beats_file_beats_parent_beats_default() -> None:
    parent = "train: {steps: 1, global_batch: 4, lr: 0.1}\nrun: {dir: parent}"
    config = load("base: p.yaml\ntrain: {steps: 2, global_batch: 8}", "train.steps=3", p=parent)
    assert (config.train.steps, config.train.global_batch, config.train.lr) == (3, 8, 0.1)
    assert (config.run.dir, config.train.seed) == ("parent", 0)


def test_the_last_of_two_overrides_wins() -> None:
    assert load("", "train.seed=1", "train.seed=2").train.seed == 2


def test_a_parent_is_found_beside_its_child_and_may_have_a_parent() -> None:
    files = {
        "configs/c.yaml": "base: b.yaml",
        "configs/b.yaml": "base: ../a.yaml\ntrain: {seed: 1}",
        "configs/../a.yaml": "train: {seed: 0, steps: 9}",
    }
    config = config_file.load("configs/c.yaml", (), files.__getitem__)
    assert (config.train.seed, config.train.steps) == (1, 9)


def test_a_child_replaces_values_and_merges_sections() -> None:
    config = load("base: p.yaml\nmodel: {channel_mults: [1, 2]}", p="model: {channel_mults: [1, 1, 1], dropout: 0}")
    assert (config.model.channel_mults, config.model.dropout) == ((1, 2), 0)


def test_an_empty_section_leaves_the_parents() -> None:
    assert load("base: p.yaml\ntrain:\n", p="train: {steps: 7}").train.steps == 7


def test_a_circle_of_parents_is_refused() -> None:
    assert complaints("base: p.yaml", p="base: c.yaml")[0].endswith("base: the files name each other as parents")


# --- stored configurations ---

LATER = {
    "data": ("cache", "cache_limit"),
    "model": (
        "norm_groups", "num_heads", "norm_eps", "resample_blocks", "downsample_padding", "freq_shift",
        "flip_sin_to_cos", "timestep_scale",
    ),
    "diffusion": ("log_snr_shift", "log_snr_min", "sigmoid_bias"),
    "sample": (
        "timesteps", "max_step_ratio", "guidance_interval", "clip", "dynamic_threshold", "precision", "label", "size",
    ),
    "train": ("ema_lengths", "fused_norm"),
    "run": ("ema_snapshot_every", "evaluate_every", "evaluate_samples", "evaluate_features"),
}  # fmt: skip
"""Keys that version 0.1 did not know."""


def stored_by_the_first_version(**sections: dict[str, Any]) -> str:
    values = yaml.safe_load(config_file.dump(Config()))
    for section, keys in LATER.items():
        values[section] = {key: value for key, value in values[section].items() if key not in keys}
    return yaml.safe_dump({name: section | sections.get(name, {}) for name, section in values.items()})


@pytest.mark.parametrize(
    ("base", "groups"), [(4, 4), (8, 8), (12, 4), (32, 32), (96, 32), (100, 4), (128, 32), (192, 32)]
)
def test_a_configuration_stored_by_the_first_version_keeps_its_meaning(base: int, groups: int) -> None:
    text = stored_by_the_first_version(model={"base_channels": base})
    assert config_file.is_stored(text)
    assert config_file.is_stored((Path(__file__).parent / "golden/version_0_1/run/config.yaml").read_text())
    config = config_file.parse_stored(text)
    assert config.model.norm_groups == config.model.groups == groups
    assert config.sample.max_step_ratio is None
    expected = load("", f"model.base_channels={base}", f"model.norm_groups={groups}", "sample.max_step_ratio=null")
    assert config == expected
    assert load(text).model.norm_groups == "auto"  # written anew by hand, it takes today's defaults


def test_stored_samplers_keep_their_old_number_of_steps() -> None:
    for sampler, timesteps, steps in (("ddim", 1000, 50), ("dpmpp", 1000, 50), ("heun", 30, 30), ("ddpm", 1000, None)):
        text = stored_by_the_first_version(sample={"sampler": sampler}, diffusion={"timesteps": timesteps})
        assert config_file.parse_stored(text).sample.steps == steps
    given = stored_by_the_first_version(sample={"sampler": "dpmpp", "steps": 20})
    assert config_file.parse_stored(given).sample.steps == 20


@pytest.mark.parametrize(
    "overrides",
    [(), ("model.base_channels=32",), ("model.norm_groups=4", "sample.sampler=dpmpp", "diffusion.log_snr_min=-9")],
)
def test_a_configuration_stored_today_comes_back_as_it_is(overrides: tuple[str, ...]) -> None:
    config = load("", *overrides)
    assert config_file.is_stored(config_file.dump(config))
    assert config_file.parse_stored(config_file.dump(config)) == config


@pytest.mark.parametrize(
    ("section", "key"), [("train", "lr"), ("model", "dropout"), ("sample", "eta"), ("diffusion", "schedule")]
)
def test_a_configuration_that_lacks_a_key_of_every_version_was_written_by_hand(section: str, key: str) -> None:
    for text in (config_file.dump(Config()), stored_by_the_first_version()):
        values = yaml.safe_load(text)
        del values[section][key]
        assert not config_file.is_stored(yaml.safe_dump(values))
        del values[section]
        assert not config_file.is_stored(yaml.safe_dump(values))


@pytest.mark.parametrize(
    "text",
    ["", "train: {lr: 0.1}", "- 1", "train: [", "name: x", "model: resnet50", "sample: 3", "model: {base_channels: x}",
     "sample: {sampler: ddim}\ndiffusion: stable", "sample: {sampler: ddim}\ndiffusion: {timesteps: x}"],
)  # fmt: skip
def test_other_text_is_no_stored_configuration(text: str) -> None:
    assert not config_file.is_stored(text)
    assert not config_file.is_stored(f"{config_file.dump(Config())}more: {{}}\n")


# --- mistakes ---


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  seed: 5\n  globl_batch: 4\n", "c.yaml:3: train.globl_batch: unknown key; did you mean train.glob"),
        ("\nmodle: {dropout: 0}\n", "c.yaml:2: modle: unknown key; did you mean model?"),
        ("run: {zzz: 1}\n", "c.yaml:1: run.zzz: unknown key; known here: dir, "),
        ("train:\n  lr: fast\n", "c.yaml:2: train.lr: must be a number"),
        ("train:\n  lr: 0\n", "c.yaml:2: train.lr: must be above 0 (got 0)"),
        ("train:\n  lr:\n", "c.yaml:2: train.lr: must be a number (got None)"),
        ("train:\n  steps: 50 ep\n", "c.yaml:2: train.steps: a length is a number of steps, or of epochs as in 50ep"),
        ("run: {timeout: 10 minutes}", "c.yaml:1: run.timeout: a duration is a number of seconds, or as in 90s"),
        ("train: {precision: fp16}", "c.yaml:1: train.precision: must be bf16 or fp32 (got 'fp16')"),
        ("data: {channels: 2}", "c.yaml:1: data.channels: must be 3 or 1 (got 2)"),
        ("model: {dropout: 1}",
         "c.yaml:1: model.dropout: must be below 1, or a list (got 1)"),
        ("train: {micro_batch: -1}", "c.yaml:1: train.micro_batch: must be above 0, or auto (got -1)"),
        ("train: {steps: -1}", "c.yaml:1: train.steps: must be above 0, or epochs as in 50ep (got -1)"),
        ("train: {lr_stages: [[1]]}", "c.yaml:1: train.lr_stages: has too few values"),
        ("sample: {guidance_interval: [1, 2, 3]}", "c.yaml:1: sample.guidance_interval: has more than 2 values"),
        ("train:\n  seed: 1\n  seed: 2\n", "c.yaml:3: train.seed: given twice, first at c.yaml:2"),
        ("train: {seed: 1}\nrun: {}\ntrain: {seed: 2}\n", "c.yaml:3: train: given twice, first at c.yaml:1"),
        ("train: 7\n", "c.yaml:1: train: must be a mapping of keys to values"),
        ("- train\n", "c.yaml: a configuration is a mapping of sections"),
        ("train:\n\tlr: 1\n", "c.yaml: not YAML: "),
        ("train: [\n", "c.yaml: not YAML: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_location_and_remedy(text: str, line: str) -> None:
    (complaint,) = complaints(text)
    assert complaint.startswith(line)


def test_all_mistakes_are_reported_at_once_one_on_each_line() -> None:
    text = "train:\n  lr: fast\n  globl_batch: 4\nmodle: {}\nrun:\n  dir: [1]\n"
    assert sorted(line.split(": ")[:2] for line in complaints(text, "sample.eta=2")) == [
        ["c.yaml:2", "train.lr"],
        ["c.yaml:3", "train.globl_batch"],
        ["c.yaml:4", "modle"],
        ["c.yaml:6", "run.dir"],
        ["command line", "sample.eta"],
    ]


@pytest.mark.parametrize(
    "text",
    ["train: {steps: -5}", "train: {micro_batch: many}", "data: {size: [32, x]}", "train: {lr_stages: [[0, 1]]}"],
)
def test_one_mistake_is_one_line_whatever_types_a_key_may_have(text: str) -> None:
    assert len(complaints(text)) == 1


def test_a_mistake_in_the_parent_is_reported_with_the_parents_name() -> None:
    assert complaints("base: p.yaml\ntrain: {seed: 1}", p="train:\n  lr: x")[0].startswith("p.yaml:2: train.lr: ")
    assert complaints("base: p.yaml\n\ntrain: {lr: x}", p="train: {lr: 1}")[0].startswith("c.yaml:3: train.lr: ")


@pytest.mark.parametrize("override", ["train.lr", "train=3", "=3", "train.=3"])
def test_a_malformed_override_is_refused_with_an_example(override: str) -> None:
    assert complaints("", override) == [
        f"{override!r} is not a setting: write section.key=value, such as train.lr=1e-4"
    ]


def test_all_mistakes_are_told_at_once_each_with_what_was_meant() -> None:
    """A missing section, a key of another section, names of other programs; and one that means nothing."""
    settings = ("lr=3", "train.num_clases=2", "train.learning_rate=1", "train.batch_size=8", "train.xyzzy=1", "x")
    told = complaints("model: {num_class: 3}\nrun: {ouput_dir: x}", *settings, "data.size=[")
    hints = [line.rpartition("did you mean ")[2] for line in told if "did you mean" in line]
    assert sorted(hints) == sorted(
        ["train.lr=3?", "model.num_classes?", "train.lr?", "train.global_batch?", "model.num_classes?", "run.dir?"]
    )
    assert len(told) == 9
    assert any(line.startswith("command line: train.xyzzy: unknown key; known here: steps, ") for line in told)
    with pytest.raises(ConfigError) as refusal:
        config_file.check_keys(["train.lrr", "learning_rate", "data.shards", "q"])
    assert [line.partition("; ")[2] for line in str(refusal.value).splitlines()] == [
        "did you mean train.lr?", "did you mean train.lr?", "write section.key, such as train.lr",
    ]  # fmt: skip


def test_mistakes_on_the_command_line_say_so() -> None:
    assert complaints("", "train.lrr=3") == ["command line: train.lrr: unknown key; did you mean train.lr?"]
    assert complaints("", "trian.lr=3") == ["command line: trian: unknown key; did you mean train?"]
    assert complaints("train: {lr: 1}", "train.lr=x")[0].startswith("command line: train.lr: ")
    assert complaints("", "train.lr=[1")[0].startswith("'train.lr=[1': the value is not YAML: ")


def test_a_configuration_executes_nothing() -> None:
    assert complaints("train: {lr: !!python/object/apply:os.getpid []}")[0].startswith("c.yaml: not YAML: ")
    assert complaints("", "train.lr=!!python/name:os.getpid")[0].startswith("'train.lr=")


NAMES = (
    "123",
    "2024-11-29",
    "2024-13-01",
    "cmt #2",
    "on",
    "yes",
    "null",
    "1e3",
    "0x10",
    "1:30",
    "[a",
    "a: b",
    ".5",
    "-",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_path_on_the_command_line_is_plain_text(name: str) -> None:
    config = load("data: {}", f"run.dir={name}")
    assert config.run.dir == name
    assert config_file.parse_stored(config_file.dump(config)).run.dir == name


@pytest.mark.parametrize("name", ["123", "2024-11-29", "2024-13-01", "on", "1e3", "0x10", "1:30", ".5"])
def test_a_path_in_a_file_is_text_too(name: str) -> None:
    config = load(f"run:\n  dir: {name}  # a comment\ntrain: {{init_from: {name}}}")
    assert config.run.dir == config.train.init_from == name


def test_a_path_may_be_quoted_or_none() -> None:
    text = "data: {val_shards: v}\ntrain: {init_from: null}"
    assert load(text, "data.val_shards=null").data.val_shards is None
    assert load(text, "data.val_shards=~").data.val_shards is None
    assert load(text, "data.val_shards='null'").data.val_shards == "null"
    assert load(text).train.init_from is None


def test_every_text_that_is_not_a_choice_is_a_path() -> None:
    """What YAML takes for a number or a date would be refused there."""
    texts = {
        (section, key)
        for section, kind in Config.model_fields.items()
        for key, field in kind.annotation.model_fields.items()  # type: ignore[union-attr]
        if field.annotation in (str, str | None)
    }
    assert texts == PATHS


@pytest.mark.parametrize(
    ("key", "hint"),
    [("train.lrr", "train.lr?"), ("lr", "train.lr?"), ("train", "train.lr?"), ("train.lr=1", "train.lr?"), ("", "")],
)
def test_a_key_to_override_that_does_not_exist_is_refused_with_the_nearest(key: str, hint: str) -> None:
    config_file.check_keys(["train.lr", "data.shards"])
    with pytest.raises(ConfigError, match="unknown key") as refusal:
        config_file.check_keys([key])
    assert str(refusal.value).startswith(f"--override {key}: ") and hint in str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("run.timeout=.inf", "run.timeout"),
        ("run.timeout=1e300", "run.timeout"),
        ("run.time_limit=99999d", "run.time_limit"),
        ("data.size=8by8", r"\[96, 64\]"),
        ("data.size=0x8", "data.size"),
        ("data.window=[" + 400 * "[", "not YAML"),
    ],
)
def test_an_impossible_value_is_refused_in_one_line(setting: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refusal:
        load("data: {}", setting)
    assert "\n" not in str(refusal.value)


def test_a_size_may_be_written_as_people_do() -> None:
    assert load("data: {}", "data.size=96x64", "sample.size=8x8").data.height_width == (96, 64)
