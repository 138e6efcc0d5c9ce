"""Job: say what this machine has, what a run here would do, and what is missing, with the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import ConfigError

# What other packages are needed for is imported where it is used, so that a machine without them is told so.

DISTRIBUTION = "ddpm-pipeline"
GRACE_S = 30.0
"""What launchers and SLURM leave between SIGTERM and SIGKILL unless told otherwise."""
SLOW_SAVE_S = 20.0
"""A save that takes longer may not fit into it, for the step under way comes first."""
_SMALL_SHM_BYTES = 1 << 30
_FEW_FILES = 1024
_BF16_CAPABILITY = (8, 0)  # of NVIDIA GPUs; older ones convert to float32 and back
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm
_PROTOCOLS = {"s3": "s3", "gs": "gcs", "abfs": "azure"}  # fsspec protocol → extra
_TOOLS = ("git", "nvidia-smi", "sbatch")


@dataclass(frozen=True)
class Gpu:
    """A device that torch can use."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16 itself."""
        return self.capability >= _BF16_CAPABILITY


@dataclass(frozen=True)
class Machine:
    """What was found."""

    python: str
    packages: dict[str, str | None]
    """Required distribution → installed version, None if absent."""
    outdated: dict[str, str]
    """Required distribution → the least version, where an older one is installed."""
    extras: dict[str, bool]
    """Extra → whether all that it adds is installed."""
    protocols: dict[str, bool]
    """fsspec protocol → whether it can be used."""
    torch_cuda: str | None
    """CUDA that torch was built for; None for a CPU build, or without torch."""
    gpus: tuple[Gpu, ...]
    hidden_gpus: int
    """GPUs that nvidia-smi lists where torch sees none."""
    visible_devices: str | None
    """CUDA_VISIBLE_DEVICES."""
    cores: int
    """That this process may use."""
    cpu_bf16: bool
    shm_bytes: int | None
    """Size of /dev/shm, through which loader processes pass batches."""
    free_bytes: int
    """Of the file system of the working directory."""
    open_files: int
    tools: dict[str, bool]


@dataclass(frozen=True)
class Finding:
    """Something that a run here lacks, or that will hurt it."""

    what: str
    mend: str
    necessary: bool = False


def examine(run: str | None = None) -> dict[str, Any]:
    """Everything `ddpm doctor` tells, as JSON values.

    Args:
        run: a run to look at too.

    Returns:
        `machine` (as `Machine`), `findings`, `ok`: whether a run could be made here, and with that `here` (device,
        processes, precision, command) and `run` (None unless asked for).

    Raises:
        ConfigError: there is no such run.
    """
    machine = look()
    findings = missing_packages(machine)
    ok, stand = not findings, None
    if ok:
        stand = _look_at_run(run) if run else None
        findings = [*gpu_findings(machine, stand), *limit_findings(machine), *run_findings(stand)]
    return {
        "machine": asdict(machine) | {"gpus": [asdict(gpu) | {"bf16": gpu.bf16} for gpu in machine.gpus]},
        "findings": [asdict(finding) for finding in findings],
        "ok": ok,
        "here": recommend(machine, stand) if ok else None,
        "run": stand,
    }


def look() -> Machine:
    """What this machine has. CUDA is initialised only where there is a GPU to describe."""
    needed, by_extra = _requirements()
    versions = {name: _version(name) for name in needed}
    torch_cuda, gpus = _gpus()
    tools = {tool: shutil.which(tool) is not None for tool in _TOOLS}
    return Machine(
        python=platform.python_version(),
        packages=versions,
        outdated={name: least for name, least in needed.items() if _numbers(versions[name] or least) < _numbers(least)},
        extras={extra: all(map(_version, names)) for extra, names in by_extra.items()},
        protocols=_protocols(),
        torch_cuda=torch_cuda,
        gpus=gpus,
        hidden_gpus=_listed_gpus() if tools["nvidia-smi"] and not gpus else 0,
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        cores=len(os.sched_getaffinity(0)),
        cpu_bf16=_cpu_has_bf16(),
        shm_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,  # noqa: S108
        free_bytes=shutil.disk_usage(".").free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        tools=tools,
    )


def recommend(machine: Machine, stand: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a run does on this machine, and the command line for it; of a given run, the one that goes on with it."""
    from pipeline.config import Config
    from pipeline.data.order import allowed_worlds, default_lanes

    lanes = (stand or {}).get("lanes") or default_lanes(Config().train.global_batch)
    processes = max(ranks for ranks in allowed_worlds(lanes) if ranks <= max(len(machine.gpus), 1))
    config = f"{stand['path']}/config.yaml" if stand else "CONFIG.yaml"
    launcher = (
        f"accelerate launch --multi_gpu --num_machines 1 --num_processes {processes} --main_process_port 0 "
        "--mixed_precision no --dynamo_backend no -m pipeline.train"
    )
    bf16 = all(gpu.bf16 for gpu in machine.gpus) if machine.gpus else machine.cpu_bf16
    return {
        "device": "cuda" if machine.gpus else "cpu",
        "processes": processes,
        "precision": Config().train.precision,
        "precision_emulated": not bf16,
        "command": f"{launcher if processes > 1 else 'ddpm train'} --config {config}",
        "slurm_command": f"sbatch --nodes=1 launch/slurm/train.sbatch {config}" if machine.tools["sbatch"] else None,
    }


def missing_packages(machine: Machine) -> list[Finding]:
    """What no run can do without."""
    if not machine.packages:
        return [Finding(f"{DISTRIBUTION} is not installed", "pip install -c constraints.txt .", necessary=True)]
    absent = [name for name, version in machine.packages.items() if version is None]
    found = {name: f"{name} is not there" for name in absent} | {
        name: f"{name} {machine.packages[name]} is older than {least}" for name, least in machine.outdated.items()
    }
    return [Finding(what, f"pip install -U -c constraints.txt {name}", necessary=True) for name, what in found.items()]


def gpu_findings(machine: Machine, stand: dict[str, Any] | None = None) -> list[Finding]:
    """GPUs that cannot be used, and what they cannot do."""
    here, count, findings = recommend(machine, stand), len(machine.gpus), []
    if machine.hidden_gpus:
        if machine.visible_devices is not None:
            reason, mend = "CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES"
        elif machine.torch_cuda is None:
            reason, mend = "torch is a CPU build", "pip install --force-reinstall torch, from an index with CUDA builds"
        else:
            reason, mend = f"the driver may be too old for CUDA {machine.torch_cuda}", "a newer driver (nvidia-smi)"
        findings.append(Finding(f"nvidia-smi lists {machine.hidden_gpus} GPUs, but torch sees none: {reason}", mend))
    if count > here["processes"]:
        what = f"{count} GPUs cannot share the lanes of the data equally, {here['processes']} can"
        findings.append(
            Finding(what, f"a new run with data.lanes and train.global_batch that are multiples of {count}")
        )
    if here["precision_emulated"]:
        findings.append(Finding(f"bf16 is emulated on this {here['device']}, and slow", "train.precision=fp32"))
    return findings


def limit_findings(machine: Machine) -> list[Finding]:
    """Limits of this system that loader processes run into."""
    findings = []
    if machine.shm_bytes is None or machine.shm_bytes < _SMALL_SHM_BYTES:
        what = f"shared memory (/dev/shm) is {_size(machine.shm_bytes or 0)}: loader processes and NCCL may die of it"
        findings.append(Finding(what, "docker run --shm-size 8g (or --ipc host), or data.workers=0"))
    if machine.open_files < _FEW_FILES:
        findings.append(Finding(f"only {machine.open_files} files may be open at a time", "ulimit -n 65536"))
    return findings


def run_findings(stand: dict[str, Any] | None) -> list[Finding]:
    """Whether a run can be stopped in time."""
    save_s = stand["save_s"] if stand else None
    if save_s is None or save_s <= SLOW_SAVE_S:
        return []
    what = f"the last save took {save_s:.0f} s, and a launcher kills {GRACE_S:.0f} s after SIGTERM"
    return [Finding(what, f"export PET_SHUTDOWN_TIMEOUT={4 * int(save_s)}, and a longer warning (--signal)")]


def as_text(report: dict[str, Any]) -> str:
    """The report as a table to read."""
    machine, here, run = report["machine"], report["here"], report["run"]
    gpus = [f"{gpu['name']}, {_size(gpu['memory_bytes'])}, capability {'.'.join(map(str, gpu['capability']))}, "
            f"{'bf16' if gpu['bf16'] else 'no bf16'}" for gpu in machine["gpus"]]  # fmt: skip
    protocols = [name if there else f"{name} (with the extra {_PROTOCOLS.get(name, 's3')})"
                 for name, there in machine["protocols"].items()]  # fmt: skip
    rows: list[tuple[str, str]] = [
        ("this machine", ""),
        ("  python", machine["python"]),
        ("  packages", ", ".join(f"{name} {version or 'MISSING'}" for name, version in machine["packages"].items())),
        ("  extras", _yes_or_no(machine["extras"])),
        ("  URLs", ", ".join(protocols)),
        ("  torch for", f"CUDA {machine['torch_cuda']}" if machine["torch_cuda"] else "CPU only"),
        *(("  GPU", text) for text in gpus or ["none"]),
        ("  cores", str(machine["cores"])),
        ("  /dev/shm", _size(machine["shm_bytes"] or 0)),
        ("  free here", _size(machine["free_bytes"])),
        ("  open files", str(machine["open_files"])),
        ("  tools", _yes_or_no(machine["tools"])),
    ]
    if here:
        rows += [
            ("a run here", ""),
            ("  runs on", f"{here['device']}, {here['processes']} process{'es' * (here['processes'] > 1)}"),
            ("  precision", here["precision"] + (", emulated" if here["precision_emulated"] else "")),
            ("  command", here["command"]),
        ]
        rows += [("  or", here["slurm_command"])] if here["slurm_command"] else []
    if run:
        rows += [
            (f"run {run['path']}", ""),
            ("  state", f"{run['state']}, newest checkpoint at step {run['step']}"),
            ("  held by", run["holder"] or "nobody"),
            ("  last save", "not known" if run["save_s"] is None else f"{run['save_s']:.1f} s"),
        ]
    rows.append(("findings", "" if report["findings"] else "none"))
    rows += [
        ("  MISSING" if finding["necessary"] else "  warning", f"{finding['what']}; mend: {finding['mend']}")
        for finding in report["findings"]
    ]
    return "\n".join(f"{name:<12} {text}".rstrip() for name, text in rows)


def _requirements() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Of this distribution: what it needs with the least version of each, and the names that each extra adds."""
    needed: dict[str, str] = {}
    by_extra: dict[str, list[str]] = {}
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}, {}
    for line in lines:
        name, _, least = line.partition(";")[0].partition(">=")
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if extra is None:
            needed[name.strip()] = least.strip()
        elif extra[1] != "dev":
            by_extra.setdefault(extra[1], []).append(name.strip())
    return needed, by_extra


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def _protocols() -> dict[str, bool]:
    if importlib.util.find_spec("fsspec") is None:
        return {}
    import fsspec

    def usable(protocol: str) -> bool:
        try:
            return bool(fsspec.get_filesystem_class(protocol))
        except ImportError:
            return False

    return {protocol: usable(protocol) for protocol in ("file", "memory", "http", *_PROTOCOLS)}


def _gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    """What CUDA torch is built for, and the devices it sees."""
    if importlib.util.find_spec("torch") is None:
        return None, ()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks the driver, without a CUDA context
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old; told as a finding
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return torch.version.cuda, tuple(Gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in found)


def _listed_gpus() -> int:
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S607
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return bool(_BF16_CPU_FLAGS & set(file.read().split()))
    except OSError:
        return False


def _look_at_run(path: str) -> dict[str, Any]:
    """Where a run stands: state, newest step, lanes, who holds it, and how long its last save took."""
    from pipeline import storage
    from pipeline.run import checkpoint, failure, interrupt, lease, opening

    if not storage.is_dir(path):
        raise ConfigError(f"{path}: no such run: give the run.dir of one")
    opening.check_place(path)
    step = checkpoint.committed_step(path)
    state, lanes, save_s = "new" if step == 0 else "to be resumed", None, None
    if storage.exists(storage.join(path, "DONE")):
        state = "done"
    elif failed := failure.read(path):
        state = f"failed on rank {failed['rank']} ({failed['host']}) at step {failed['step']}: {failed['error']}"
    elif reason := interrupt.stop_reason(path):
        state = f"stopped on request ({reason})"
    if step:
        saved = storage.read_json(storage.join(path, "checkpoints", f"step_{step:08d}", "state.json"))
        lanes = saved["position"]["lanes"]
    log = storage.join(path, "log.jsonl")
    if storage.exists(log):
        saves = [line for line in storage.read_bytes(log).decode().splitlines()
                 if '"checkpoint/save_s"' in line and line.endswith("}")]  # fmt: skip
        save_s = json.loads(saves[-1])["checkpoint/save_s"] if saves else None
    return {"path": path.rstrip("/"), "state": state, "step": step, "lanes": lanes, "holder": lease.holder(path),
            "save_s": save_s}  # fmt: skip


def _yes_or_no(there: dict[str, bool]) -> str:
    return ", ".join(f"{name}: {'yes' if yes else 'no'}" for name, yes in there.items())


def _size(amount: int) -> str:
    return f"{amount / 2**30:.1f} GiB" if amount >= 1 << 30 else f"{amount / 2**20:.0f} MiB"
