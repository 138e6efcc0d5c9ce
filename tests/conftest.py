"""A tiny shard set and a tiny run that the tests share, and the rule that nothing skips in continuous checks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.jobs import shard
from tests.launch import TINY, ddpm

# Several pytest workers share the cores: threads that wait for a core cost ten times their work.
torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would everything that is started here

ROOT = Path(__file__).parent.parent
LONG = (
    "slurm/test_train.py", "multiprocess", "training/test_trainer.py", "laws", "container", "test_train.py", "remote",
    "repo/test_commands.py",
    "test_shard.py", "slurm", "test_cli.py", "sampling/test_generator.py", "diffusion/test_samplers.py", "test_plan.py",
    "diffusion/test_sampler_truth.py", "training/test_memory_estimate.py", "data/loading", "test_index.py",
    "test_doctor.py", "data/shards/test_damage.py", "processes/test_pool.py", "training/test_start.py",
    "model/test_unet.py", "model/test_fused_norm.py", "rehearsal",
    "cluster", "test_evaluate.py", "sampling/test_ema_length.py", "test_export.py",
    "test_sample.py", "training/test_evaluator.py", "data/sources/test_parquet.py", "test_forecast.py",
    "repo/test_wheel.py", "repo/test_benchmarks.py", "test_report.py", "test_notebook.py", "test_attacks.py",
    "sampling/test_options.py", "diffusion/test_learned_variance.py",
)  # fmt: skip
"""Files and directories with the longest tests, longest first; the files of slurm, which share a cluster, lie apart."""


def _is_in(path: Path, long: str) -> bool:
    name = path.relative_to(ROOT / "tests").as_posix()
    return name == long or name.startswith(f"{long}/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="Leave out the files and directories in LONG of conftest.py.")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_long = collection_path != ROOT / "tests" and any(_is_in(collection_path, long) for long in LONG)
    return True if is_long and config.getoption("--quick") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files: a worker that began one last would work alone at the end."""

    def turn(item: pytest.Item) -> int:
        return next((i for i, long in enumerate(LONG) if _is_in(item.path, long)), len(LONG))

    items.sort(key=turn)  # stable, so the tests of a file stay together


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
