"""The short help of a command fits a screen, its examples are commands, and completion does not wait for torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli import app, main
from pipeline.commands.help import EXAMPLES, RARE, Command
from tests.launch import ENVIRONMENT

JOBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
every = pytest.mark.parametrize("job", JOBS)


def _context(job: str) -> Any:
    name = f"ddpm {job}"
    return JOBS[job].make_context(name, [], resilient_parsing=True, terminal_width=80, max_content_width=80)


@every
def test_short_help_fits_a_screen(job: str) -> None:
    lines = JOBS[job].short_help_of(_context(job)).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@every
def test_every_option_is_named_in_the_short_help_and_explained_in_the_full_one(job: str) -> None:
    context = _context(job)
    short, full = JOBS[job].short_help_of(context), JOBS[job].get_help(context)
    for parameter in JOBS[job].get_params(context):
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in short.replace("-\n", "-") and parameter.opts[0] in full
            assert " ".join(parameter.help.split()) in " ".join(full.split()).replace("- ", "-") or (
                parameter.help.split()[0] in full
            )


@every
def test_help_has_two_examples_which_parse(job: str) -> None:
    shown = JOBS[job].get_help(_context(job))
    assert len(EXAMPLES[job]) == 2
    for example in EXAMPLES[job]:
        assert f"  {example}\n" in shown
        program, name, *words = shlex.split(example)
        assert (program, name) == ("ddpm", job)
        JOBS[job].make_context(job, words)  # raises for an unknown option or a missing argument


def test_only_options_that_exist_are_left_to_the_full_help() -> None:
    for job, rare in RARE.items():
        assert rare <= {parameter.name for parameter in JOBS[job].params}, job
        assert not any(parameter.required for parameter in JOBS[job].params if parameter.name in rare), job


def test_the_list_of_commands_cuts_no_sentence() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output.partition("Commands:")[2]
    assert len(shown.splitlines()) == len(JOBS) + 1 and "..." not in shown and "…" not in shown


def test_all_commands_have_this_help() -> None:
    assert all(isinstance(command, Command) for command in JOBS.values())
    assert EXAMPLES.keys() == JOBS.keys()


@pytest.mark.parametrize(("flag", "explains"), [("-h", False), ("--help", True)])
def test_a_rare_option_is_explained_by_the_full_help_alone(
    flag: str, explains: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["sample", "--steps", "3", flag])
    assert left.value.code == 0
    out = capfd.readouterr().out
    assert "ddpm sample runs/mine --seeds 0-7" in out and ("(SDEdit)" in out) == explains


def test_the_version_is_that_of_the_package_and_needs_no_torch() -> None:
    code = "import sys; from pipeline.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"ddpm {version('ddpm-pipeline')}\n")
    assert not {"torch", "numpy", "PIL"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [("ddpm tr", "train"), ("ddpm sample --gui", "--guidance"), ("ddpm plan --js", "--json")],
)
def test_completion_needs_no_torch(words: str, expected: str) -> None:
    code = "import sys; from pipeline.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    wanted = {"_DDPM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT | wanted, capture_output=True, text=True, timeout=60, check=False
    )
    assert expected in done.stdout.split()
    assert not {"torch", "numpy", "PIL"} & set(done.stderr.split())
