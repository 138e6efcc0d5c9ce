"""The wheel works without the repository: it has the configurations and launch scripts, and `ddpm init` copies them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from pipeline import init as init_job
from pipeline.errors import ConfigError
from pipeline.monitoring.machine import PROTOCOLS
from tests.launch import ENVIRONMENT

ROOT = Path(__file__).parents[2]
SHIPPED = {
    f"{directory}/{path.relative_to(ROOT / directory)}"
    for directory in init_job.DIRECTORIES
    for path in (ROOT / directory).rglob("*")
    if path.is_file()
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as the builder leaves files beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pipeline", *init_job.DIRECTORIES):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (built,) = source.glob("*.whl")
    return built


def test_the_wheel_has_every_configuration_and_script_once_and_the_marker_of_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        name.removeprefix("pipeline/") for name in names if name.startswith(("pipeline/configs/", "pipeline/launch/"))
    } == SHIPPED
    assert "pipeline/py.typed" in names
    assert not [name for name in names if name.split("/")[0] in ("configs", "launch", "tests", "docs", "benchmarks")]
    assert wheel.stat().st_size < 1_000_000


def test_init_works_from_an_installed_wheel_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, wheel]
    subprocess.run(command, check=True, timeout=300)
    code = "from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "init", "here"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=ENVIRONMENT | {"PYTHONPATH": str(installed)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"here: {len(SHIPPED)} files copied to here/configs and here/launch\n")
    for name in SHIPPED:
        assert (tmp_path / "here" / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_init_keeps_files_that_exist(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/env.sh").write_text("mine")
    result = init_job.init(str(tmp_path))
    assert result["kept"] == ["launch/env.sh"] and len(result["written"]) == len(SHIPPED) - 1
    assert (tmp_path / "launch/env.sh").read_text() == "mine"
    assert ", 1 that exist are left as they are\n" in init_job.as_text("x", result)
    assert init_job.init(str(tmp_path))["written"] == []
    with pytest.raises(ConfigError, match="is a file: give a directory"):
        init_job.init(str(tmp_path / "launch/env.sh"))


def test_every_package_that_is_imported_is_a_dependency_or_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    given = [
        *project["dependencies"],
        *(line for name in extras if name not in ("dev", "fuzz") for line in extras[name]),
    ]
    distributions = {re.split(r"[><=\[]", line)[0].lower().replace("-", "_") for line in given}
    others = {"PIL": "pillow", "yaml": "pyyaml", "google": "protobuf"}
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"pipeline"}:
                assert others.get(name, name) in distributions, f"{path.name} imports {name}: name it in pyproject.toml"


def test_every_protocol_that_the_doctor_misses_has_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(PROTOCOLS.values()) <= extras.keys()
