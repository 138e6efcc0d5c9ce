"""Two hosts, each with a network of its own: the link between them is cut while they train."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch import ENVIRONMENT, TINY, ended, logged_steps, until

HOSTS = Path(__file__).parent / "two_hosts.sh"
TIMEOUT_S = 20

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2"
)


@pytest.fixture
def hosts() -> Iterator[None]:
    subprocess.run([HOSTS, "down"], check=False)
    made = subprocess.run([HOSTS, "up"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    yield
    subprocess.run([HOSTS, "down"], check=True)


def begin(host: int, log: Path, *arguments: object) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2",
                "--num_processes", "2", "--machine_rank", str(host), "--main_process_ip", "ddpm0",
                "--main_process_port", "29531", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    command = [HOSTS, "exec", str(host), *launcher, "-m", "pipeline.train", *map(str, arguments)]
    with log.open("ab") as output:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output)


def test_a_short_cut_costs_time_only_and_a_long_one_is_told_and_the_run_goes_on(
    hosts: None, digits: Path, tmp_path: Path
) -> None:
    run, logs = tmp_path / "run", [tmp_path / "log0", tmp_path / "log1"]
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={run}", "train.steps=100000", "run.checkpoint_every=10",
                 f"run.timeout={TIMEOUT_S}", "data.workers=0")  # fmt: skip
    launchers = [begin(host, logs[host], *arguments) for host in (0, 1)]
    assert until(lambda: logged_steps(run) >= 15, launchers[0]), logs[0].read_text()[-4000:]
    subprocess.run([HOSTS, "cut"], check=True)
    time.sleep(4)
    frozen = logged_steps(run)
    subprocess.run([HOSTS, "mend"], check=True)
    assert until(lambda: logged_steps(run) >= frozen + 5, launchers[0]), logs[0].read_text()[-4000:]

    subprocess.run([HOSTS, "cut"], check=True)
    cut = time.monotonic()
    assert [ended(launcher, log, 120) for launcher, log in zip(launchers, logs)] == [1, 1]
    seconds = time.monotonic() - cut
    told = json.loads((run / "FAILED.json").read_text())
    print(f"both ended {seconds:.0f} s after the cut: {told['error']}")
    assert "network" in told["error"] and "ddpm1" in told["error"]
    assert all("lost contact at step" in log.read_text() or "makes no progress" in log.read_text() for log in logs)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run) in " ".join(p.info["cmdline"] or ())]

    subprocess.run([HOSTS, "mend"], check=True)
    done = logged_steps(run)
    launchers = [begin(host, logs[host], *arguments, f"train.steps={done + 20}") for host in (0, 1)]
    assert [ended(launcher, log, 180) for launcher, log in zip(launchers, logs)] == [0, 0]
    assert "resuming at step" in logs[0].read_text()
    assert (run / "DONE").exists()
