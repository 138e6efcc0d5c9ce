"""A request to stop, however it arrives and whoever gets it, ends in a saved run that goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch import TINY, committed_step, ended, gone, launch, logged_steps, ranks, start, until

# Steps long enough to be told apart: about 0.2 s.
SLOW = (*TINY, "train.global_batch=480", "train.micro_batch=60", "train.steps=400", "run.checkpoint_every=400")


class Running:
    """A run of two ranks that has done its first `steps`."""

    def __init__(self, digits: Path, directory: Path, *settings: str, steps: int = 3, **environment: str) -> None:
        self.run, self.log = directory / "run", directory / "log"
        self.arguments = (*SLOW, f"data.shards={digits}", f"run.dir={self.run}", *settings)
        self.launcher = start(2, "train", *self.arguments, log=self.log, **environment)
        started = until(lambda: logged_steps(self.run) >= steps, self.launcher)
        assert started, self.log.read_text()[-4000:]
        self.family = psutil.Process(self.launcher.pid).children(recursive=True)

    def assert_saved(self, reason: str, within_steps: int) -> None:
        """It ended by itself, saved, and soon after step `self.asked`; the same command continues."""
        ended(self.launcher, self.log, 60)
        deadline = time.monotonic() + 30
        while not all(map(gone, self.family)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert all(map(gone, self.family)), "a process lives on"
        text = self.log.read_text()
        assert f"stop requested ({reason}): saved step" in text, text[-4000:]
        assert 0 <= committed_step(self.run) - self.asked <= within_steps
        assert json.loads((self.run / "control/stopped.json").read_text()) == {
            "reason": reason, "step": committed_step(self.run),
        }  # fmt: skip
        assert not (self.run / "FAILED.json").exists()
        assert launch(2, "train", *self.arguments, f"train.steps={committed_step(self.run) + 1}", log=self.log) == 0
        assert "resuming at step" in self.log.read_text()
        assert (self.run / "DONE").exists()

    def ask(self, how: Callable[[], object]) -> None:
        self.asked = logged_steps(self.run)
        how()


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_rank_stops_all_within_two_steps(
    digits: Path, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    running = Running(digits, tmp_path)
    running.ask(lambda: ranks(running.launcher)[rank].send_signal(number))
    running.assert_saved(number.name, 3)  # the step under way when the log was read, and two boundaries


def test_signals_to_every_process_again_and_again_do_no_harm(digits: Path, tmp_path: Path) -> None:
    """As SLURM sends them: loader processes too, and again while the checkpoint is being written."""
    running = Running(digits, tmp_path, "data.workers=2")
    running.asked = logged_steps(running.run)
    for _ in range(20):
        for process in running.family:
            if not gone(process):
                process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    running.assert_saved("SIGTERM", 3)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL])
def test_ranks_whose_launcher_is_gone_save_and_end(digits: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGUSR1 and SIGUSR2 kill `accelerate launch` as SIGKILL does; nobody tells the ranks."""
    running = Running(digits, tmp_path)
    running.ask(lambda: running.launcher.send_signal(number))
    running.assert_saved("the launcher is gone", 15)  # looked at once a second


def test_a_launcher_of_a_single_process_that_is_gone(digits: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = start(1, "train", *SLOW, f"data.shards={digits}", f"run.dir={run}", log=log)
    assert until(lambda: logged_steps(run) >= 2, launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert all(map(gone, alive))
    assert committed_step(run) > 0


def test_the_stop_file_of_a_batch_script(digits: Path, tmp_path: Path) -> None:
    running = Running(digits, tmp_path, DDPM_STOP_FILE=str(tmp_path / "stop"))
    running.ask((tmp_path / "stop").touch)
    running.assert_saved("the stop file", 15)


def test_a_person_s_stop_file_is_obeyed_once(digits: Path, tmp_path: Path) -> None:
    running = Running(digits, tmp_path)
    running.ask((running.run / "control/stop").touch)
    running.assert_saved("control/stop", 15)
    assert not (running.run / "control/stop").exists()


def test_a_deadline_is_met_with_time_to_save(digits: Path, tmp_path: Path) -> None:
    # 30 s is what a stop is asked for ahead of a deadline.
    running = Running(digits, tmp_path, steps=0, DDPM_DEADLINE=str(time.time() + 30 + 25))
    running.asked = 0
    running.assert_saved("the deadline", 400)


def test_a_stop_is_resumable_within_20_s_for_a_gpu_sized_model(digits: Path, tmp_path: Path) -> None:
    """The paper's CIFAR-10 network, 36 M parameters: 570 MB to save. From the request to the end of the process."""
    run = tmp_path / "run"
    command = [
        "ddpm", "train", "--config", "configs/cifar10.yaml", f"data.shards={digits}", f"run.dir={run}", "data.size=8",
        "data.channels=1", "train.device=cpu", "train.precision=fp32", "train.global_batch=2", "data.workers=0",
        "run.log_every=1", "run.preview_every=0", "run.val_every=0", "model.num_classes=0",
    ]  # fmt: skip
    job = subprocess.Popen(
        [sys.executable, "-c", "from pipeline.cli import main; main()", *command[1:]], stderr=subprocess.PIPE
    )
    assert until(lambda: logged_steps(run) >= 1, job)
    asked = time.monotonic()
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 75, job.stderr.read().decode()[-2000:]
    seconds = time.monotonic() - asked
    size = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*.safetensors"))
    assert size > 500e6
    print(f"{size / 1e6:.0f} MB saved {seconds:.1f} s after the request")
