"""The README's commands exist, its files are there, and its configurations are all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.config import Config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:ddpm|accelerate launch.* -m pipeline\.)\s?(\w+)(.*)$", README, re.MULTILINE)


def test_there_are_commands() -> None:
    assert {job for job, _ in COMMANDS} >= {"shard", "train", "sample"}


@pytest.mark.parametrize(("job", "arguments"), COMMANDS)
def test_a_command_has_the_options_it_is_shown_with(job: str, arguments: str) -> None:
    known = {flag for parameter in get_command(app).commands[job].params for flag in parameter.opts}  # type: ignore[attr-defined]
    assert set(re.findall(r"--[a-z-]+", arguments)) <= known


def test_keys_are_keys() -> None:
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}  # type: ignore[union-attr]
    for section, key in re.findall(r"\b(data|model|diffusion|train|sample|run)\.(\w+)(?==)", README):
        assert key in sections[section], f"{section}.{key}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_front_door_is_in_the_makefile(target: str) -> None:
    assert re.search(rf"^make {target}\b", README, re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
