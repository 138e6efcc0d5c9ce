"""Worker processes where the name of the temporary directory is too long for a socket in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ENVIRONMENT

CODE = """
import multiprocessing, tempfile
from multiprocessing.connection import Listener
from pipeline.processes.forkserver import start_worker_server
start_worker_server("pipeline.errors")
worker = multiprocessing.get_context("forkserver").Process(target=Listener)  # in a socket of its own
worker.start()
worker.join()
print(worker.exitcode, tempfile.gettempdir())
"""


@pytest.mark.parametrize("length", [75, 76, 118])
def test_sockets_find_a_place_and_other_files_stay(length: int, tmp_path: Path) -> None:
    place = tmp_path / "t" if len(str(tmp_path)) < length - 1 else Path("/tmp") / tmp_path.name
    place = Path(str(place).ljust(length, "t"))
    place.mkdir(parents=True)
    environment = {**ENVIRONMENT, "TMPDIR": str(place)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (f"0 {place}\n", 0), done.stderr
