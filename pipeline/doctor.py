"""Job: report what this machine has, what a run here would do, and what is missing, with the command that fixes it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.monitoring.machine import DISTRIBUTION, PROTOCOLS, Machine, inspect_machine

# Other packages are imported where they are used, so that the doctor can report that one is missing.

GRACE_S = 30.0
"""Default time of launchers and SLURM between SIGTERM and SIGKILL."""
SLOW_SAVE_S = 20.0
"""A slower save may not fit into the grace time, as the current step comes first."""
_SMALL_SHM_BYTES = 1 << 30
_FEW_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """A thing that a run here lacks, or that slows it down or ends it."""

    what: str
    fix: str
    necessary: bool = False


def examine(run_dir: str | None = None) -> dict[str, Any]:
    """Everything that `ddpm doctor` reports, as JSON values.

    Args:
        run_dir: a run to report too.

    Returns:
        `machine` (as `Machine`), `findings`, `ok`: whether a run can start here, and if so `here` (device, processes,
        precision, command) and `run` (None without `run_dir`).

    Raises:
        ConfigError: the run does not exist.
    """
    machine = inspect_machine()
    findings = missing_packages(machine)
    ok, run = not findings, None
    if ok:
        run = _inspect_run(run_dir) if run_dir else None
        findings = [*gpu_findings(machine, run), *limit_findings(machine), *run_findings(run)]
    return {
        "machine": asdict(machine) | {"gpus": [asdict(gpu) | {"bf16": gpu.bf16} for gpu in machine.gpus]},
        "findings": [asdict(finding) for finding in findings],
        "ok": ok,
        "here": recommend(machine, run) if ok else None,
        "run": run,
    }


def recommend(machine: Machine, run: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a run does on this machine, and the command that starts it, or resumes the given run."""
    from pipeline.config import Config
    from pipeline.data.loading.order import allowed_worlds, default_lanes

    train, own = Config().train, run or {}
    precision = own.get("precision") or train.precision
    on_gpu = bool(machine.gpus) and own.get("device") != "cpu"
    lanes = own.get("lanes") or default_lanes(train.global_batch)
    processes = max(ranks for ranks in allowed_worlds(lanes) if ranks <= (len(machine.gpus) if on_gpu else 1))
    file = f"{run['path']}/config.yaml" if run else "CONFIG.yaml"
    launcher = (
        f"accelerate launch --multi_gpu --num_machines 1 --num_processes {processes} --main_process_port 0 "
        "--mixed_precision no --dynamo_backend no -m pipeline.train"
    )
    has_bf16 = all(gpu.bf16 for gpu in machine.gpus) if on_gpu else machine.cpu_bf16
    return {
        "device": "cuda" if on_gpu else "cpu",
        "processes": processes,
        "precision": precision,
        "precision_emulated": precision == "bf16" and not has_bf16,
        "command": f"{launcher if processes > 1 else 'ddpm train'} --config {file}",
        "slurm_command": f"sbatch --nodes=1 launch/slurm/train.sbatch {file}" if machine.tools["sbatch"] else None,
    }


def missing_packages(machine: Machine) -> list[Finding]:
    """Packages without which no run can start."""
    if not machine.packages:
        return [Finding(f"{DISTRIBUTION} is not installed", "pip install -c constraints.txt .", necessary=True)]
    problems = {name: f"{name} is missing" for name, version in machine.packages.items() if version is None}
    for name, least in machine.outdated.items():
        problems[name] = f"{name} {machine.packages[name]} is older than {least}"
    return [
        Finding(what, f"pip install -U -c constraints.txt {name}", necessary=True) for name, what in problems.items()
    ]


def gpu_findings(machine: Machine, run: dict[str, Any] | None = None) -> list[Finding]:
    """GPUs that cannot be used, or that have no bf16."""
    here, count, findings = recommend(machine, run), len(machine.gpus), []
    if machine.hidden_gpus:
        if machine.visible_devices is not None:
            reason, fix = "CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES"
        elif machine.torch_cuda is None:
            reason, fix = "torch is a CPU build", "pip install --force-reinstall torch, from an index with CUDA builds"
        else:
            reason, fix = f"the driver may be too old for CUDA {machine.torch_cuda}", "a newer driver (nvidia-smi)"
        findings.append(Finding(f"nvidia-smi lists {machine.hidden_gpus} GPUs, but torch sees none: {reason}", fix))
    if count > here["processes"]:
        what = f"{count} GPUs cannot share the lanes of the data equally, {here['processes']} can"
        fix = f"a new run with data.lanes and train.global_batch that are multiples of {count}"
        findings.append(Finding(what, fix))
    if here["precision_emulated"]:
        findings.append(Finding(f"bf16 is emulated on this {here['device']}, and slow", "train.precision=fp32"))
    return findings


def limit_findings(machine: Machine) -> list[Finding]:
    """Limits of this system that are too low for loader processes."""
    findings = []
    if (machine.shared_memory_bytes or 0) < _SMALL_SHM_BYTES:
        size = _size(machine.shared_memory_bytes)
        what = f"shared memory (/dev/shm) is {size}: too little for loader processes and NCCL"
        findings.append(Finding(what, "docker run --shm-size 8g (or --ipc host), or data.workers=0"))
    if machine.open_files < _FEW_FILES:
        findings.append(Finding(f"only {machine.open_files} files may be open at a time", "ulimit -n 65536"))
    return findings


def run_findings(run: dict[str, Any] | None) -> list[Finding]:
    """Whether a launcher gives the run enough time to save when it is stopped."""
    save_s = (run or {}).get("save_s") or 0.0
    if save_s <= SLOW_SAVE_S:
        return []
    what = f"the last save took {save_s:.0f} s, and a launcher kills {GRACE_S:.0f} s after SIGTERM"
    return [Finding(what, f"export PET_SHUTDOWN_TIMEOUT={4 * int(save_s)}, and a longer warning (--signal)")]


def as_text(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = []
    for title, section in (("this machine", "machine"), ("a run here", "here"), ("this run", "run")):
        if values := report[section]:
            names = [key.removesuffix("_bytes").replace("_", " ") for key in values]
            texts = [_as_text(key, value) for key, value in values.items()]
            rows += [title, *(f"  {name:<18} {text}" for name, text in zip(names, texts))]
    rows.append("findings" if report["findings"] else "findings: none")
    for finding in report["findings"]:
        rows.append(f"  {'MISSING' if finding['necessary'] else 'warning'}: {finding['what']}; fix: {finding['fix']}")
    return "\n".join(rows)


def _as_text(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_as_text(name, item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ("." if key == "capability" else "; ").join(_as_text(key, item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else f"no (install the extra {PROTOCOLS[key]})" if key in PROTOCOLS else "no"
    if value is None:
        return "none"
    return _size(value) if key.endswith("_bytes") else str(value)


def _inspect_run(path: str) -> dict[str, Any]:
    """The state of a run, its newest step, what its configuration asks of a machine, who holds it, its last save."""
    from pipeline import config_file
    from pipeline.checkpoints.checkpoint import committed_step
    from pipeline.checkpoints.run_dir import RunDir, advice_for_missing
    from pipeline.cluster import failure, interrupt, lease
    from pipeline.data.loading.order import default_lanes
    from pipeline.storage import files
    from pipeline.training import start

    if not files.is_dir(path):
        raise ConfigError(f"{path}: no such run: {advice_for_missing(path)}")
    start.check_run_dir(path)
    run, step, holder = RunDir(path), committed_step(path), lease.current_holder(path)
    state, save_s = "new" if step == 0 else "to be resumed", None
    config = config_file.parse_stored(files.read_bytes(run.config).decode()) if files.exists(run.config) else None
    lanes = config and (config.data.lanes or default_lanes(config.train.global_batch))
    if files.exists(run.done):
        state = "done"
    elif failed := failure.read(path):
        state = f"failed on rank {failed['rank']} ({failed['host']}) at step {failed['step']}: {failed['error']}"
    elif reason := interrupt.stop_reason(path):
        state = f"stopped on request ({reason})"
    if step:
        saved = files.read_json(files.join(run.checkpoint(step), "state.json"))
        lanes = saved["position"]["lanes"]
    if files.exists(run.log):
        lines = files.read_bytes(run.log).decode().splitlines()
        saves = [line for line in lines if '"checkpoint/save_s"' in line and line.endswith("}")]
        save_s = json.loads(saves[-1])["checkpoint/save_s"] if saves else None
    return {
        "path": path.rstrip("/"),
        "state": state,
        "step": step,
        "lanes": lanes,
        "device": config and config.train.device,
        "precision": config and config.train.precision,
        "holder": str(holder) if holder else None,
        "save_s": save_s,
    }


def _size(count: int | None) -> str:
    count = count or 0
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"
