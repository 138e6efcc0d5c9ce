"""Builds the Dockerfile with no container engine and no registry: buildah, on a stand-in for the base image.

The stand-in is this machine's own distribution, made by debootstrap and given the base image's name, so that the
Dockerfile is built as it is. It gets what belongs to this machine: certificates, and pip's settings with the
directories that they name. What it cannot show is the content of the real base image, and CUDA.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/ddpm:test"
CERTIFICATES = Path("usr/local/share/ca-certificates")


def missing() -> str | None:
    """Why nothing can be built here."""
    absent = [tool for tool in ("buildah", "debootstrap", "apt-get") if shutil.which(tool) is None]
    return f"{', '.join(absent)} not installed" if absent else None if os.geteuid() == 0 else "root is needed"


class Buildah:
    """Images and containers under one directory, which `clear` empties again."""

    def __init__(self, work: Path) -> None:
        self.work = work
        (work / "storage.conf").write_text(f'[storage]\ngraphroot = "{work}/graph"\nrunroot = "{work}/run"\n')
        (work / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.settings, self.mounts = _pip_settings()
        self.driver = "overlay"
        try:
            self("info")
        except AssertionError:  # where layers cannot be stacked, such as in some containers, they are copied
            self.driver = "vfs"

    def build(self) -> str:
        """Builds the Dockerfile; returns a container to run in."""
        (base,) = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        self._make_base(base)
        policy = f"--signature-policy={self.work}/policy.json"
        self("build", policy, "--pull-never", *self._volumes(), "--tag", IMAGE, "--file", ROOT / "Dockerfile", ROOT)
        return self("from", "--pull-never", IMAGE)

    def run(self, container: str, *command: object, uid: int = 0, volume: Path | None = None) -> str:
        """Run a command in a container; its standard output."""
        volumes = [f"--volume={volume}:{volume}"] if volume else []
        user = [f"--user={uid}:{uid}"] if uid else []
        return self("run", *user, *volumes, container, "--", *command)

    def config(self) -> dict[str, Any]:
        """The image's entry point, user and environment."""
        config: dict[str, Any] = json.loads(self("inspect", "--type=image", IMAGE))["OCIv1"]["config"]
        return config

    def clear(self) -> None:
        """Remove all containers and images."""
        self("rm", "--all")
        self("rmi", "--all", "--force")
        mounted = [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.work) in line]
        assert not mounted, mounted
        shutil.rmtree(self.work)

    def __call__(self, *arguments: object, timeout_s: float = 1500) -> str:
        environment = {
            **os.environ, "STORAGE_DRIVER": self.driver, "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_STORAGE_CONF": f"{self.work}/storage.conf", "TMPDIR": str(self.work),
        }  # fmt: skip
        done = subprocess.run(
            ["buildah", *map(str, arguments)],
            env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"buildah {arguments[0]}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    def _make_base(self, name: str) -> None:
        container = self("from", "scratch")
        root = Path(self("mount", container))
        site, suite, components = _mirror()
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--components={components}", suite, root, site],
            stdout=subprocess.DEVNULL, timeout=1500, check=True,
        )  # fmt: skip
        (root / CERTIFICATES).mkdir(parents=True, exist_ok=True)
        for certificate in (Path("/") / CERTIFICATES).glob("*.crt"):
            shutil.copy(certificate, root / CERTIFICATES)
        (root / "etc/pip.conf").write_text(self.settings)
        self("unmount", container)
        self("commit", f"--signature-policy={self.work}/policy.json", "--rm", container, name)

    def _volumes(self) -> list[str]:
        return [f"--volume={path}:{path}:ro" for path in self.mounts]


def _mirror() -> tuple[str, str, str]:
    """Where this machine's own distribution comes from: address, suite, components."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    targets = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)"]
    lines = [line.split() for line in subprocess.check_output(targets, text=True).splitlines()]
    (site, *_) = [site for site, release, _ in lines if release == suite]
    return site, suite, ",".join(sorted({part for where, release, part in lines if (where, release) == (site, suite)}))


def _pip_settings() -> tuple[str, list[Path]]:
    """This machine's settings of pip as a file, and the paths that they name."""
    listing = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    settings, named = {}, set()
    for line in listing.splitlines():  # such as global.timeout='60', or :env:.timeout='60'
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        settings[key] = str(ast.literal_eval(value)).split()
        for path in (Path(value.removeprefix("file://")) for value in settings[key]):
            if path.is_absolute() and path.exists():
                named.add(path.parent if key.endswith("-url") else path)  # what such pages lead to lies beside them
    lines = [f"{key} = {' '.join(values)}" for key, values in settings.items()]
    # What lies under /etc/ssl comes from the certificates, when the Dockerfile installs them.
    return "\n".join(["[global]", *lines, ""]), sorted(path for path in named if not path.is_relative_to("/etc/ssl"))
