"""The configurations that are shipped: each loads, and editors complete and check them with the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import config_file
from pipeline.config import Config

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMA = CONFIGS / "config.schema.json"
FILES = sorted(CONFIGS.glob("*.yaml"))
every = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def _load(path: Path) -> Config:
    return config_file.load(str(path), (), lambda name: Path(name).read_text())


def _schema() -> dict[str, Any]:
    assert SCHEMA.exists(), f"{SCHEMA} is missing: run `make schema` and commit it"
    return dict(json.loads(SCHEMA.read_text()))


def _unknown(values: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """Keys that an editor would mark."""
    schema = root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "properties" in schema:
        for key, value in (values or {}).items():
            if key not in schema["properties"]:
                yield f"{path}{key}"
            else:
                yield from _unknown(value, schema["properties"][key], root, f"{path}{key}.")


def test_the_schema_is_current() -> None:
    assert _schema() == Config.model_json_schema(), (
        "configs/config.schema.json is stale: run `make schema` and commit it"
    )


def test_the_schema_carries_the_documentation_and_the_choices() -> None:
    train = _schema()["$defs"]["TrainSection"]["properties"]
    assert train["lr"]["description"] == "Learning rate of Adam."
    assert train["precision"]["enum"] == ["bf16", "fp32"]


def test_there_are_configurations() -> None:
    assert FILES, f"no *.yaml in {CONFIGS}"


@every
def test_it_loads_and_its_lengths_resolve(path: Path) -> None:
    config = _load(path)
    resolved = config.in_steps(50_000)
    assert resolved.in_steps(1) == resolved
    assert config_file.parse_stored(config_file.dump(resolved)) == resolved


@every
def test_an_editor_knows_every_key(path: Path) -> None:
    """`base` included: a configuration with a parent must not look wrong in an editor."""
    root = _schema()
    assert list(_unknown(yaml.safe_load(path.read_text()), root, root)) == []


def test_an_editor_marks_a_wrong_key() -> None:
    root = _schema()
    assert list(_unknown({"train": {"lr": 1, "lrr": 1}, "trian": {}}, root, root)) == ["train.lrr", "trian"]


@every
def test_its_head_tells_an_editor_the_schema_and_a_reader_the_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert head[0] == "# yaml-language-server: $schema=config.schema.json"
    assert len(head) >= 4, "purpose, hardware and hours, expected result, command"
    command = [line for line in head if "train" in line and f"configs/{path.name}" in line]
    assert command, f"name the command that trains it: … --config configs/{path.name}"


@every
def test_a_configuration_is_complete_and_lists_only_changed_keys(path: Path) -> None:
    config, default, written = _load(path), Config(), yaml.safe_load(path.read_text())
    assert config.run.dir and config.data.shards, "give data.shards and run.dir, so that the command needs nothing else"
    keys = [(section, key) for section, values in written.items() if section != "base" for key in values]
    repeated = [
        f"{section}.{key}"
        for section, key in keys
        if getattr(getattr(config, section), key) == getattr(getattr(default, section), key) and "base" not in written
    ]
    assert not repeated, f"{', '.join(repeated)}: the default, leave it out"
