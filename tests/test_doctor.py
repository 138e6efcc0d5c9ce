"""`ddpm doctor` tells what is there, recommends a command that works, and says what is missing."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from pipeline import doctor
from pipeline.cluster.lease import Lease
from pipeline.monitoring.machine import Gpu, Machine
from tests import warm
from tests.launch import ENVIRONMENT, TINY, ddpm

H100 = Gpu("H100", 80 << 30, (9, 0))
T4 = Gpu("T4", 16 << 30, (7, 5))
GOOD = Machine(
    ddpm="0.1.0", python="3.12.3", packages={"torch": "2.13.0"}, outdated={}, extras={}, protocols={},
    torch_cuda="13.0", gpus=(H100,) * 8, hidden_gpus=0, visible_devices=None, cores=64, cpu_bf16=True,
    shared_memory_bytes=64 << 30, free_bytes=1 << 40, open_files=65536,
    tools={"git": True, "nvidia-smi": True, "sbatch": False},
)  # fmt: skip


def _doctor(*arguments: object, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any], str]:
    done = ddpm("doctor", "--json", *arguments, **(env or {}))
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


# --- what is there ---


def test_the_report_describes_this_machine() -> None:
    code, report, _ = _doctor()
    machine = report["machine"]
    assert code == 0 and report["ok"] and report["run"] is None
    assert machine["python"] == platform.python_version() and machine["ddpm"] == version("ddpm-pipeline")
    assert machine["packages"]["torch"] == version("torch") and machine["packages"]["accelerate"]
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["shared_memory_bytes"] == shutil.disk_usage("/dev/shm").total
    assert machine["protocols"]["file"] and machine["protocols"]["s3"] and machine["extras"]["s3"]


def test_the_table_is_for_reading() -> None:
    done = ddpm("doctor")
    assert done.returncode == 0
    for what in (f"torch {version('torch')}", "cores", "shared memory ", "a run here", "ddpm train --config"):
        assert what in done.stdout


def test_cuda_is_not_initialized_without_a_gpu() -> None:
    code = (
        "import sys; from pipeline.monitoring.machine import inspect_machine; inspect_machine(); import torch; "
        "sys.exit(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == 0


# --- what a run here would do ---


def test_the_recommended_command_works(digits: Path, tmp_path: Path) -> None:
    """On a machine without GPUs it is one process; the command for many is started with gloo."""
    _, report, _ = _doctor()
    assert (report["here"]["device"], report["here"]["processes"]) == ("cpu", 1)
    two = doctor.recommend(replace(GOOD, gpus=(H100, H100)))["command"]
    for number, command in enumerate((report["here"]["command"], two)):
        program, *arguments = shlex.split(command.replace("CONFIG.yaml", TINY[1]))
        module = {
            "ddpm": ["-c", "from pipeline.cli import main; main()"],
            "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
        }[program]
        run = tmp_path / str(number)
        started = [sys.executable, *module, *arguments, f"data.shards={digits}", f"run.dir={run}", "train.steps=2"]
        done = warm.run(started, env=ENVIRONMENT, timeout_s=300)
        assert done.returncode == 0, done.stderr
        assert f"{number + 1} process{'es' * number} on cpu" in done.stderr and (run / "DONE").exists()


def test_all_gpus_that_can_share_the_data_are_used() -> None:
    assert doctor.recommend(GOOD)["processes"] == 8 and doctor.gpu_findings(GOOD) == []
    six = replace(GOOD, gpus=(H100,) * 6)
    (finding,) = doctor.gpu_findings(six)
    assert doctor.recommend(six)["processes"] == 4 and "6 GPUs" in finding.what
    run = {"path": "runs/x", "lanes": 12, "save_s": None}
    assert doctor.recommend(six, run)["processes"] == 6 and doctor.gpu_findings(six, run) == []
    assert doctor.recommend(six, run)["command"].endswith("--config runs/x/config.yaml")


def test_emulated_bf16_is_a_finding() -> None:
    old = replace(GOOD, gpus=(H100, T4))
    assert doctor.recommend(old)["precision_emulated"] and not doctor.recommend(GOOD)["precision_emulated"]
    assert [finding.fix for finding in doctor.gpu_findings(old)] == ["train.precision=fp32"]
    run = {"path": "runs/x", "lanes": 12, "save_s": None, "precision": "fp32"}
    assert doctor.gpu_findings(old, run) == [] and doctor.recommend(old, run)["precision"] == "fp32"
    on_cpu = doctor.recommend(GOOD, run | {"device": "cpu"})
    assert (on_cpu["device"], on_cpu["processes"]) == ("cpu", 1)


def test_a_batch_job_is_offered_where_there_is_slurm() -> None:
    assert doctor.recommend(GOOD)["slurm_command"] is None
    slurm = doctor.recommend(replace(GOOD, tools={**GOOD.tools, "sbatch": True}))["slurm_command"]
    script = shlex.split(slurm)[2]
    assert (Path(__file__).parents[1] / script).exists()


# --- what is missing ---


def test_an_outdated_package_ends_with_3_and_the_command_that_fixes_it(tmp_path: Path) -> None:
    old = tmp_path / "webdataset-0.1.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.1.0\n")
    code, report, error = _doctor(env={"PYTHONPATH": str(tmp_path)})
    (finding,) = report["findings"]
    assert code == 3 and not report["ok"] and report["here"] is None and "install or correct" in error
    assert finding["necessary"] and "webdataset 0.1.0 is older than" in finding["what"]
    assert finding["fix"].startswith("pip install") and "webdataset" in finding["fix"]


def test_a_missing_package_is_a_finding_and_not_imported() -> None:
    (finding,) = doctor.missing_packages(replace(GOOD, packages={"torch": None}))
    assert finding.necessary and finding.what == "torch is missing"
    blind = "import sys; sys.modules.update(torch=None, numpy=None, pydantic=None, fsspec=None); import pipeline.doctor"
    subprocess.run([sys.executable, "-c", blind], env=ENVIRONMENT, timeout=60, check=True)


def test_gpus_that_torch_does_not_see_are_a_finding(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    _, report, _ = _doctor(env={**path, "CUDA_VISIBLE_DEVICES": ""})
    assert report["machine"]["hidden_gpus"] == 2 and "CUDA_VISIBLE_DEVICES hides" in report["findings"][0]["what"]
    blind = replace(GOOD, gpus=(), hidden_gpus=2)
    assert "driver" in doctor.gpu_findings(blind)[0].what
    assert "CPU build" in doctor.gpu_findings(replace(blind, torch_cuda=None))[0].what


def test_small_limits_are_findings() -> None:
    assert doctor.limit_findings(GOOD) == []
    shm, files = doctor.limit_findings(replace(GOOD, shared_memory_bytes=64 << 20, open_files=512))
    assert "64 MiB" in shm.what and "--shm-size" in shm.fix and "512 files" in files.what
    limited = f"ulimit -n 1000; exec {sys.executable} -c 'from pipeline.cli import main; main()' doctor"
    done = subprocess.run(
        ["sh", "-c", limited], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and "only 1000 files may be open at a time; fix: ulimit" in done.stdout


# --- where a run stands ---


def test_a_finished_run(tiny_run: Path) -> None:
    run = doctor.examine(f"{tiny_run}/")["run"]
    assert run == {
        "path": str(tiny_run),
        "state": "done",
        "step": 6,
        "lanes": 12,
        "device": "cpu",
        "precision": "fp32",
        "holder": None,
        "save_s": run["save_s"],
    }
    assert 0 < run["save_s"] < 60


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "DONE").unlink()
    return run


def test_a_held_run(copy: Path) -> None:
    with Lease(str(copy), lambda _: None):
        assert doctor.examine(str(copy))["run"]["holder"] == f"process {os.getpid()} on {socket.gethostname()}"
        assert f"holder             process {os.getpid()} on" in doctor.as_text(doctor.examine(str(copy)))
    assert doctor.examine(str(copy))["run"]["holder"] is None


def test_a_failed_run(copy: Path) -> None:
    failure = {
        "rank": 3,
        "host": "n2",
        "step": 5,
        "phase": "data",
        "error": "shard 7 is gone",
        "trace": "",
        "exit_code": 3,
    }
    (copy / "FAILED.json").write_text(json.dumps(failure))
    state = doctor.examine(str(copy))["run"]["state"]
    assert all(part in state for part in ("rank 3", "n2", "step 5", "shard 7 is gone"))


def test_a_stopped_run(copy: Path) -> None:
    (copy / "control").mkdir(exist_ok=True)
    (copy / "control" / "stopped.json").write_text(json.dumps({"reason": "SIGTERM", "step": 6}))
    assert doctor.examine(str(copy))["run"]["state"] == "stopped on request (SIGTERM)"


@pytest.mark.parametrize(("save_s", "told"), [(19.0, False), (27.5, True)])
def test_a_save_longer_than_the_grace_time_is_a_finding(copy: Path, save_s: float, told: bool) -> None:
    with (copy / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 2, "checkpoint/save_s": 99.0}) + "\n")
        log.write(json.dumps({"step": 4, "checkpoint/save_s": save_s}) + "\n" + '{"step": 6, "checkpoint/sa')
    report = doctor.examine(str(copy))
    assert report["run"]["save_s"] == save_s and report["ok"]
    assert any("PET_SHUTDOWN_TIMEOUT" in finding["fix"] for finding in report["findings"]) == told


def test_no_such_run_is_one_line(tmp_path: Path) -> None:
    code, report, error = _doctor("--run", tmp_path / "nothing")
    assert code == 2 and not report and "no such run" in error and "Traceback" not in error


def test_a_directory_that_is_no_run_is_refused(digits: Path) -> None:
    code, report, error = _doctor("--run", digits)
    assert code == 2 and not report and "is a shard set, not a run" in error and "Traceback" not in error
