"""The cluster that the tests share, and an undisturbed run to compare with."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import TINY, launch
from tests.slurm.cluster import Cluster

SETTINGS = ("train.steps=200", "run.checkpoint_every=50", "data.workers=0")
"""Long enough to be caught in the middle; the bytes do not depend on the loader's workers, and each start is faster."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("only root can start slurmd and make network namespaces")
    missing = [name for name in ("slurmctld", "slurmd", "munged", "ip", "nsenter") if not shutil.which(name)]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)")
    with Path("/run/lock/ddpm-slurm").open("w") as lock, tempfile.TemporaryDirectory(prefix="ddpm-slurm-") as directory:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at a time, as of tests side by side, would have the same names
        with Cluster(Path(directory)) as cluster:
            yield cluster


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails takes no other with it."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()


@pytest.fixture(scope="session")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of SETTINGS with two ranks that nobody disturbed."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    log = run.parent / "log"
    code = launch(2, "train", *TINY, f"data.shards={digits}", f"run.dir={run}", *SETTINGS, log=log)
    assert code == 0, log.read_text()
    return run
