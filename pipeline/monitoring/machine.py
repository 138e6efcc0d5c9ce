"""What this machine has: packages, GPUs, memory and limits, without importing a package that may be missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import warnings
from dataclasses import dataclass

DISTRIBUTION = "ddpm-pipeline"
PROTOCOLS = {"s3": "s3", "gs": "gcs", "abfs": "azure", "http": "http", "hf": "hf"}
"""fsspec protocol → extra of this distribution that installs it."""
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm


@dataclass(frozen=True)
class Gpu:
    """A device that torch can use."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]

    @property
    def bf16(self) -> bool:
        """Whether it has instructions for bf16; older NVIDIA GPUs convert to float32 and back."""
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Machine:
    """What this machine has."""

    ddpm: str  # version of this distribution
    python: str
    packages: dict[str, str | None]  # required distribution → installed version, None if it is missing
    outdated: dict[str, str]  # required distribution → lowest version that works, where an older one is installed
    extras: dict[str, bool]  # extra → whether all of its packages are installed
    protocols: dict[str, bool]  # fsspec protocol → whether it works here
    torch_cuda: str | None  # CUDA version that torch was built for; None for a CPU build, or without torch
    gpus: tuple[Gpu, ...]
    hidden_gpus: int  # GPUs that nvidia-smi lists although torch sees none
    visible_devices: str | None  # CUDA_VISIBLE_DEVICES
    cores: int  # that this process may use
    cpu_bf16: bool
    shared_memory_bytes: int | None  # size of /dev/shm, through which loader processes pass batches
    free_bytes: int  # on the file system of the working directory
    open_files: int  # limit for a process
    tools: dict[str, bool]


def inspect_machine() -> Machine:
    """Examine this machine. CUDA is initialized only if there is a GPU to describe."""
    required, extras = _requirements()
    versions = {name: _version(name) for name in required}
    torch_cuda, gpus = _gpus()
    tools = {tool: shutil.which(tool) is not None for tool in ("git", "nvidia-smi", "sbatch")}
    return Machine(
        ddpm=own_version(),
        python=platform.python_version(),
        packages=versions,
        outdated={name: least for name, least in required.items() if _is_older(versions[name], least)},
        extras={extra: all(map(_version, names)) for extra, names in extras.items()},
        protocols=_protocols(),
        torch_cuda=torch_cuda,
        gpus=gpus,
        hidden_gpus=_gpus_of_nvidia_smi() if tools["nvidia-smi"] and not gpus else 0,
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        cores=len(os.sched_getaffinity(0)),
        cpu_bf16=cpu_has_bf16(),
        shared_memory_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,  # noqa: S108
        free_bytes=shutil.disk_usage(".").free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        tools=tools,
    )


def own_version() -> str:
    """The version of this distribution; another text if only its source tree is there."""
    return _version(DISTRIBUTION) or "unknown (not installed)"


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bf16; without them it computes in bf16 some thirty times slower."""
    try:
        with open("/proc/cpuinfo") as file:
            return bool(_BF16_CPU_FLAGS & set(file.read().split()))
    except OSError:
        return False


def _requirements() -> tuple[dict[str, str], dict[str, list[str]]]:
    """The packages that this distribution needs with their lowest versions, and the packages of each extra."""
    required: dict[str, str] = {}
    extras: dict[str, list[str]] = {}
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}, {}
    for line in lines:  # `NAME>=VERSION` or `NAME>=VERSION; extra == "EXTRA"`
        name, _, least = line.partition(";")[0].partition(">=")
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if extra is None:
            required[name] = least
        elif extra[1] != "dev":
            extras.setdefault(extra[1], []).append(name)
    return required, extras


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_older(version: str | None, least: str) -> bool:
    """Whether a package is installed, but in a version before `least`."""
    numbers, least_numbers = (re.findall(r"\d+", text.partition("+")[0]) for text in (version or least, least))
    return list(map(int, numbers)) < list(map(int, least_numbers))


def _protocols() -> dict[str, bool]:
    if importlib.util.find_spec("fsspec") is None:
        return {}
    import fsspec

    works = dict.fromkeys(("file", "memory", *PROTOCOLS), True)
    for protocol in works:
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError:
            works[protocol] = False
    return works


def _gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    """The CUDA version that torch was built for, and the GPUs that torch sees."""
    if importlib.util.find_spec("torch") is None:
        return None, ()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks the driver, without a CUDA context
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: the doctor reports it
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return torch.version.cuda, tuple(Gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in gpus)


def _gpus_of_nvidia_smi() -> int:
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S607
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
