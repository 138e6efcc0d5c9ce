"""How long does training wait for a save?

    python benchmarks/checkpoint_stall.py [--saves N] [--batch B]

The paper's CIFAR-10 network trains on the device that is there; every few steps its state (weights, average, both
moments: 570 MB) is saved by our Saver and by accelerate's `save_state` in turn, to the same disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from accelerate import Accelerator

from pipeline.checkpoints.async_save import Saver
from pipeline.cluster.world import World
from pipeline.config import Config
from pipeline.data.loading.batches import Batch
from pipeline.training.trainer import Trainer

STEPS_BETWEEN = 3


def _save(trainer: Trainer, saver: Saver) -> None:
    """What the job `train` does at a save."""
    assert trainer.is_sound()
    saver.save(trainer.state.step, trainer.tensors(), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--batch", type=int, default=0, help="0: 128 on a GPU, 8 on a CPU")
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device
    batch = options.batch or (128 if device.type == "cuda" else 8)
    trainer = Trainer(_config(batch), World(accelerator, 0, 1, device))
    for module in (trainer.model, trainer.ema.ema_model):
        accelerator.prepare_model(module)
    accelerator.prepare_optimizer(trainer.optimizer)
    trainer.choose_micro_batch()
    step = partial(_step, trainer, batch)
    times: dict[str, list[float]] = {"step": [], "our save": [], "step while it is written": [], "save_state": []}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="stall-"))
        saver = stack.enter_context(
            Saver(f"{directory}/run", keep_last=2, keep_every=0, generation=1, check_lease=lambda: None,
                  on_saved=lambda: None, warn=print, patience_s=600)
        )  # fmt: skip
        step()
        for _ in range(options.saves):
            times["step"] += [_timed(step, device) for _ in range(STEPS_BETWEEN)]
            times["our save"].append(_timed(partial(_save, trainer, saver), device))
            times["step while it is written"].append(_timed(step, device))
            saver.collect_result(wait=True)
            times["save_state"].append(_timed(lambda: accelerator.save_state(f"{directory}/peer"), device))
    medians = {name: statistics.median(values[1:] or values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:28} {seconds * 1e3:9.1f} ms {seconds / medians['step']:8.2f} steps")
    print(f"{'in the background, flushed':28} {saver.figures['checkpoint/save_s'] * 1e3:9.1f} ms")
    print(f"training waits {medians['save_state'] / medians['our save']:.1f} times shorter than for save_state")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, batch {batch}; medians of {options.saves}, the first of each left out")


def _config(batch: int) -> Config:
    return Config.model_validate({
        "data": {"size": 32},
        "train": {"global_batch": batch, "micro_batch": batch, "device": "auto", "lr": 2e-4},
    })  # fmt: skip


def _step(trainer: Trainer, batch: int) -> None:
    images = torch.zeros(batch, 3, 32, 32, dtype=torch.uint8)
    images = Batch(images, torch.full((batch,), -1), torch.arange(batch) + trainer.state.samples)
    trainer.finish_step(trainer.gradient(images))


def _timed(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
