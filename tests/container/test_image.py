"""The Dockerfile: clean, and what it builds runs as any user with the versions that were tested."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.buildah import ROOT, Buildah, missing
from tests.launch import TINY

DOCKERFILE = (ROOT / "Dockerfile").read_text()
SOMEBODY = 4321
pytestmark = pytest.mark.timeout(2400)


def test_it_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_base_is_pinned_and_has_no_libraries_of_cuda_as_torch_brings_them() -> None:
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-\w+[\d.]+", base)


def test_our_own_code_comes_after_the_packages() -> None:
    """So that a change of it does not install torch again."""
    packages, code = DOCKERFILE.index("pip install -c constraints.txt"), DOCKERFILE.index("COPY . .")
    copied = re.findall(r"^COPY (.+)$", DOCKERFILE[:packages], re.MULTILINE)
    assert packages < code and copied == ["pyproject.toml constraints.txt ./"]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if reason := missing():
        pytest.skip(reason)
    buildah = Buildah(tmp_path_factory.mktemp("buildah"))
    try:
        yield buildah
    finally:
        buildah.clear()


@pytest.fixture(scope="module")
def container(buildah: Buildah) -> str:
    return buildah.build()


def test_it_runs_as_nobody_in_particular(buildah: Buildah, container: str) -> None:
    config = buildah.config()
    assert config["Entrypoint"] == ["ddpm"] and int(config["User"]) > 0
    report = json.loads(buildah.run(container, *config["Entrypoint"], "doctor", "--json", uid=SOMEBODY))
    assert report["ok"] and report["here"]["device"] == "cpu"
    assert "shards → run → samples → figures" in buildah.run(container, *config["Entrypoint"], "--help", uid=SOMEBODY)
    assert buildah.run(container, "id", "-u") == config["User"]


def _versions(lines: str) -> dict[str, str]:
    """Normalised name → version, without what names a build."""
    pins = re.findall(r"^([\w.-]+)==([^\s+]+)", lines, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def test_packages_are_those_that_were_tested(buildah: Buildah, container: str) -> None:
    tested = _versions((ROOT / "constraints.txt").read_text())
    installed = _versions(buildah.run(container, "pip", "list", "--format=freeze"))
    torchs = ("nvidia-", "cuda-", "triton")  # torch's CUDA build pins its own
    strangers = {name for name in installed if not name.startswith(torchs)} - {"ddpm-pipeline", "pip", "setuptools"}
    assert {name: installed[name] for name in strangers} == {name: tested.get(name) for name in strangers}
    assert {"torch", "accelerate", "s3fs", "av"} <= strangers


def test_it_holds_what_it_needs_and_no_more(buildah: Buildah, container: str) -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    content = set(buildah.run(container, "ls", "-A", "/opt/ddpm").split())
    assert content == {*allowed, "ddpm_pipeline.egg-info"}
    assert buildah.run(container, "find", "/opt/ddpm", "-name", "__pycache__") == ""


def test_a_run_is_made_in_it_by_somebody(buildah: Buildah, container: str, digits: Path, tmp_path: Path) -> None:
    """Two processes, as launched on a node; with a user id that the image has never heard of."""
    shutil.copytree(digits, tmp_path / "digits")
    shutil.copy(TINY[1], tmp_path / "tiny.yaml")
    for path in (tmp_path, *tmp_path.rglob("*")):
        shutil.chown(path, SOMEBODY, SOMEBODY)
    two = "accelerate launch --multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0 -m pipeline.train"
    for command in (["ddpm", "train"], two.split()):
        run = tmp_path / command[0]
        settings = [f"data.shards={tmp_path}/digits", f"run.dir={run}", "train.steps=2"]
        buildah.run(container, *command, "--config", tmp_path / "tiny.yaml", *settings, uid=SOMEBODY, volume=tmp_path)
        assert (run / "DONE").stat().st_uid == SOMEBODY


def test_networks_can_be_compiled_in_it(buildah: Buildah, container: str) -> None:
    """torch.compile needs a compiler, the headers of Python, and a directory that this user may write to."""
    code = "import sysconfig, tempfile; print(sysconfig.get_path('include'), tempfile.gettempdir())"
    include, directory = buildah.run(container, "python", "-c", code, uid=SOMEBODY).split()
    source = f"echo '#include <Python.h>\nint main() {{ return 0; }}' > {directory}/a.cpp"
    build = f"g++ -I{include} -fopenmp -o {directory}/a {directory}/a.cpp && {directory}/a && echo built"
    assert buildah.run(container, "sh", "-c", f"{source} && {build}", uid=SOMEBODY) == "built"
