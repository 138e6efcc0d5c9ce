"""The day a GPU is there: use of the machine, memory, and speed beside diffusers, in one table and one JSON file.

    python benchmarks/gpu.py [--out DIR] [--tiny]

It runs cost.py (32, 64 and 128 px, without and with checkpointing, eager and compiled), memory.py (measured against
planned memory), train_step.py (against diffusers) and sampling.py, one after the other, with a time limit each, and
writes their tables to DIR/gpu.md and DIR/gpu.json. A script that fails or takes too long is named there, and the exit
code is 1. With --tiny it takes minutes on a CPU, so that it is known to work before there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LIMIT_S = 240
SCRIPTS = {
    "cost, eager": ("cost.py", "--checkpointing", "none", "blocks", "--rounds", "5"),
    "cost, compiled": ("cost.py", "--checkpointing", "none", "--compile", "--rounds", "5"),
    "memory": ("memory.py",),
    "training step": ("train_step.py", "--only", "ours", "diffusers", "--rounds", "8"),
    "sampling": ("sampling.py", "--rounds", "3"),
}
TINY = {
    "cost, eager": ("--batches", "1", "--configs", "cifar10.yaml", "--rounds", "1"),
    "cost, compiled": ("--batches", "1", "--configs", "cifar10.yaml", "--rounds", "1"),
    "memory": ("--only", "32 px"),
    "training step": ("--batch", "2", "--rounds", "1", "--only", "ours, bf16", "diffusers, bf16"),
    "sampling": ("--batch", "2", "--steps", "1", "--rounds", "1"),
}


def main() -> int:
    """Run the scripts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("torch sees no CUDA device here: give --tiny to try the scripts on the CPU", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
                              "tiny": options.tiny, "scripts": {}}  # fmt: skip
    lines = [f"# {device}, torch {torch.__version__}, {result['date']}{', tiny' * options.tiny}", ""]
    for name, (script, *arguments) in SCRIPTS.items():
        ran = _run([script, *arguments, *(TINY[name] if options.tiny else ())])
        result["scripts"][name] = ran
        print(f"{name}: {ran['problem'] or 'done'}, {ran['seconds']} s", flush=True)
        lines += [f"## {name}", f"`{ran['command']}`, {ran['seconds']} s", "", ran["problem"] or ran["printed"], ""]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.md").write_text("\n".join(lines))
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(any(ran["problem"] for ran in result["scripts"].values()))


def _run(command: list[str]) -> dict[str, Any]:
    """Run a script: what it printed, its tables as lists of rows, and what went wrong."""
    started, problem, printed = time.monotonic(), "", ""
    try:
        done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True, text=True,
                              timeout=LIMIT_S, check=False)  # fmt: skip
        printed = done.stdout
        if done.returncode:
            problem = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
    except subprocess.TimeoutExpired:
        problem = f"took more than {LIMIT_S} s"
    return {"command": "python benchmarks/" + " ".join(command), "seconds": round(time.monotonic() - started, 1),
            "problem": problem, "printed": printed, "tables": tables(printed)}  # fmt: skip


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables in a text: rows of column → cell."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[dict(zip(rows[0], row)) for row in rows[2:]] for rows in found if len(rows) > 2]


if __name__ == "__main__":
    sys.exit(main())
