"""A small file system of its own, to be filled, made read-only, and given room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted file system."""

    def __init__(self, path: Path) -> None:
        self.path, self._ballast = path, path / "ballast"

    def fill(self, leaving: int = 0) -> None:
        """Leave so many bytes, rounded down to pages."""
        status = os.statvfs(self.path)
        free = status.f_bavail * status.f_frsize
        with self._ballast.open("ab", buffering=0) as file:
            file.write(bytes(max(0, free - leaving)))

    def make_room(self) -> None:
        self._ballast.unlink()

    def remount(self, how: str) -> None:
        """`ro` or `rw`."""
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)


@contextmanager
def small_disk(path: Path, size: str = "1m") -> Iterator[SmallDisk]:
    """Mount one at a directory that is made for it; the test skips where that is not permitted."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
