"""A tiny shard set and a tiny run that the tests share, and the rule that nothing skips in continuous checks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.shard import shard
from tests.launch import TINY, ddpm

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would everything that is started here

ROOT = Path(__file__).parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and os.environ.get("DDPM_CI") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may skip: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 1,797 digits as a shard set of 8 px, grey, ten classes, in several shards."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    shard([str(ROOT / "shards" / "digits.zip")], str(out), size=8, channels=1, shard_samples=300, workers=2, quiet=True)
    return out


@pytest.fixture(scope="session")
def tiny_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny class-conditional network. Tests must not write to it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    ddpm("train", *TINY, f"data.shards={digits}", f"run.dir={run}", "train.steps=6").check_returncode()
    return run
