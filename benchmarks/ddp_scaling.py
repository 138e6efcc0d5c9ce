"""What do two processes bring, against accelerate's own data-parallel loop?

    python benchmarks/ddp_scaling.py [--batch N] [--rounds N] [--processes 1 2]

Every rank takes as many images at any number of processes, so with perfect scaling a step takes as long. Ours is the
Trainer's step with the paper's 32-px network in bf16, its gradients sent in float32 and in bf16 (whose sums some
networks need); the peer trains the same network by `accelerator.prepare` and `accelerator.backward`, with AdamW and no
moving average. Ranks talk by NCCL on GPUs; on a CPU by gloo, each rank with one thread on a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from accelerate import Accelerator
from torch import Tensor
from train_step import Step, config_of, ours, random_images
from turns import Turns, autocast

from pipeline.cluster.world import World, init_distributed
from pipeline.config import Config
from pipeline.model.unet import UNet


def of_accelerate(config: Config, images: Tensor, world: World) -> Step:
    accelerator = Accelerator(cpu=world.device.type == "cpu")
    model = UNet(config.model, channels=3, size=(32, 32))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-4))
    loaded = images / 127.5 - 1

    def step() -> None:
        clean = loaded.to(accelerator.device)
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),), device=clean.device)
        with autocast(accelerator.device, config.train.precision):
            output = model(clean + noise, t)
        accelerator.backward(F.mse_loss(output, noise))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(batch: int, rounds: int, answer: Path) -> None:
    """What each rank does; the first one writes the seconds of each step."""
    world = init_distributed("auto", 600)
    if world.device.type == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[world.rank % len(cores)]})
    turns = Turns(world.device, 1, waits=True)
    config = config_of("cifar10.yaml", batch * world.size, "bf16")
    compressing = config_of("cifar10.yaml", batch * world.size, "bf16", gradient_compression="bf16")
    images = random_images(config, batch)
    steps = {"ours": ours(config, images, world), "accelerate": of_accelerate(config, images, world)}
    if world.size > 1:
        steps["ours, bf16 gradients"] = ours(compressing, images, world)
    turns.take(steps, rounds)
    if world.is_main:
        answer.write_text(json.dumps({"seconds": turns.seconds, "where": turns.where()}))
    world.shutdown()


def measured(processes: int, batch: int, rounds: int) -> tuple[Turns, str]:
    """The seconds that so many processes took."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launcher += ["--multi_gpu"] * (processes > 1)  # the way to several ranks also without any GPU
    with tempfile.TemporaryDirectory(prefix="scaling-") as directory:
        answer = Path(directory, "answer.json")
        command = [*launcher, __file__, "--batch", str(batch), "--rounds", str(rounds), "--answer", str(answer)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        told = json.loads(answer.read_text())
    turns = Turns(torch.device("cpu"))
    turns.seconds = told["seconds"]
    return turns, told["where"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=0, help="of a rank; default: 128 on GPUs, 4 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batch = options.batch or (128 if torch.cuda.is_available() else 4)
    if options.answer:
        work(batch, options.rounds, options.answer)
        return
    print(f"{'':24}{'processes':>10}{'ms':>9}{'images/s':>10}{'efficiency':>12}{'x accelerate':>14}")
    alone: dict[str, float] = {}
    for processes in options.processes:
        turns, where = measured(processes, batch, options.rounds)
        for name in turns.seconds:
            seconds = turns.median(name)
            first = alone.setdefault(name.partition(",")[0], seconds)
            speed = f"{seconds * 1e3:9.1f}{batch * processes / seconds:10.2f}{first / seconds:12.0%}"
            print(f"{name:24}{processes:10}{speed}{turns.faster(name, 'accelerate'):14.2f}")
    print(f"{where}, {batch} images a rank, bf16; medians of {options.rounds} rounds")


if __name__ == "__main__":
    main()
