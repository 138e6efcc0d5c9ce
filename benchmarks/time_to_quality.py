"""Whose images are nearest to CIFAR-10 after half an hour of a core: our recipe's, diffusers' example's, the article's?

python benchmarks/time_to_quality.py WORK train --shards SHARDSET [--minutes 30] [--at-once N]
python benchmarks/time_to_quality.py WORK draw [--parts N ...] [--names NAME ...]
python benchmarks/time_to_quality.py WORK table --against SHARDSET --features FILE [--plot FILE.svg]

All get the same processor time, start included; how many steps that is, is measured before, so that learning rates end
with it. They take turns of a sixth of the time, each in a process of one thread that is stopped between its turns, and
leave a snapshot of their averaged weights at the end of each. Warm-up and average are the same shares of the steps for
all; images are mirrored for all; all are class-conditional and in float32.

Ours is `ddpm train` with configs/64px.yaml (cosine schedule, velocity, min-SNR weights) and the learning rate of the
short run of configs/demo.yaml, 1e-3 and a half cosine; batch 32; no dropout and no hidden labels, as there is little
time and no guidance. That is chosen for a short run, after trials of two minutes; the settings of the others are
those they are published with: AdamW, 1e-4, batch 16, half cosine, clipping (examples/unconditional_image_generation of
diffusers); Adam, 2e-4, batch 128 (the article). Both predict the noise, on the linear schedule. Their images are
decoded before, ours while training. The network of ours and diffusers is the same (1.37 M parameters), the article's
has a fifth of its widths and groups of as many channels (1.23 M), and twice the operations.

What is there already is skipped by `draw` and `table`. The noise, the classes and the sampler are the same for all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import svg
import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from article import ArticleNet
from contest import compete
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_step import CONFIGS, same_in_diffusers

from pipeline import config_file, keyed_random
from pipeline.checkpoints.run_dir import RunDir
from pipeline.config import Config, DiffusionSection, SamplingOptions
from pipeline.data.loading.batches import read_all
from pipeline.data.shards.settings import ShardSettings
from pipeline.data.shards.shard_set import ShardSet
from pipeline.diffusion import samplers
from pipeline.diffusion.process import DiffusionProcess
from pipeline.evaluate import EvaluationRequest, evaluate
from pipeline.keyed_random import Use
from pipeline.model.denoiser import Denoiser
from pipeline.model.interchange import from_diffusers
from pipeline.model.unet import UNet
from pipeline.sampling import pretrained
from pipeline.shard import shard

PARTS = 6
"""Snapshots of a contestant, at equal distances."""
CLASSES = 10
COUNT, BATCH, EVALUATIONS = 2000, 50, 20
"""Samples of a snapshot, how many are drawn together, and evaluations of the network for each."""
WARMUP, AVERAGED = 1 / 50, 1 / 30
"""Shares of the steps: the warm-up, and the time in which the influence of a step on the average falls by e."""


class Recipe(NamedTuple):
    """What a contestant decides."""

    batch: int
    rate: float
    schedule: str
    optimizer: type[torch.optim.Optimizer]
    settings: dict[str, Any]
    clip: float | None


class Row(NamedTuple):
    """A snapshot and the figures of `ddpm evaluate`."""

    name: str
    part: int
    minutes: float
    seen: int
    figures: dict[str, dict[str, float]]


RECIPES = {
    "diffusers": Recipe(16, 1e-4, "cosine", torch.optim.AdamW,
                        {"betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}, 1.0),
    "article": Recipe(128, 2e-4, "constant_with_warmup", torch.optim.Adam, {}, None),
}  # fmt: skip
OURS_BATCH = 32
NAMES = ("ours", *RECIPES)


def batch_of(name: str) -> int:
    return OURS_BATCH if name == "ours" else RECIPES[name].batch


def our_settings(work: Path, shards: str, steps: int) -> list[str]:
    """configs/64px.yaml for images of 32 px, with the network of the contest and what half an hour allows."""
    settings = {
        "data": {"size": 32, "shards": shards, "workers": 0},
        "model": {"base_channels": 16, "channel_mults": [1, 2, 4, 5], "blocks_per_level": 1, "attention_sizes": [8],
                  "head_channels": None, "dropout": 0, "num_classes": CLASSES, "label_dropout": 0},
        "train": {"steps": steps, "global_batch": OURS_BATCH, "micro_batch": OURS_BATCH, "precision": "fp32",
                  "checkpointing": "none", "lr": 1e-3, "lr_schedule": "cosine", "device": "cpu",
                  "warmup_steps": round(steps * WARMUP), "ema_decay": decay(steps)},
        "run": {"dir": str(work / "ours"), "checkpoint_every": steps // PARTS, "keep_every": steps // PARTS,
                "preview_every": 0, "timeout": 1e6},
    }  # fmt: skip
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in settings.items() for key, value in keys.items()]


def decay(steps: int) -> float:
    """Of the moving average of the weights."""
    return round(1 - 1 / max(2, steps * AVERAGED), 6)


def our_config(work: Path, steps: int) -> Config:
    settings = tuple(our_settings(work, "unused", steps))
    return config_file.load(str(CONFIGS / "64px.yaml"), settings, lambda file: Path(file).read_text())


def network_of(name: str, work: Path) -> nn.Module:
    """A peer's network, with random weights."""
    if name == "article":
        return ArticleNet((24, 30, 48, 54), 96, CLASSES)
    return same_in_diffusers(our_config(work, PARTS))


def command(name: str, work: Path, shards: str, steps: int) -> list[str]:
    """What a user would start."""
    if name == "ours":
        given = ["--config", str(CONFIGS / "64px.yaml"), *our_settings(work, shards, steps)]
        return [sys.executable, "-m", "pipeline.train", *given, "--quiet"]
    return [sys.executable, __file__, str(work), "peer", "--names", name, "--steps", str(steps)]


def snapshots(name: str, work: Path, steps: int) -> list[Path]:
    """The files that a contestant leaves, the last one written of each snapshot."""
    at = [steps // PARTS * part for part in range(1, PARTS + 1)]
    if name == "ours":
        return [Path(RunDir(str(work / name)).checkpoint(step)) / "manifest.json" for step in at]
    return [work / name / f"{step}.safetensors" for step in at]


def learn(name: str, work: Path, steps: int) -> None:
    """Train a peer as its authors do, and save the averaged weights. Its images are in memory, decoded before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe, network = RECIPES[name], network_of(name, work)
    optimizer: Any = recipe.optimizer(network.parameters(), recipe.rate, **recipe.settings)  # type: ignore[call-arg]
    rates = get_scheduler(recipe.schedule, optimizer, num_warmup_steps=round(steps * WARMUP), num_training_steps=steps)
    noises = DDPMScheduler(num_train_timesteps=1000)
    ema = EMAModel(network.parameters(), decay=decay(steps), use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    for step, (clean, labels) in zip(range(1, steps + 1), batches(work, recipe.batch)):
        noise, t = torch.randn(clean.shape), torch.randint(0, 1000, (len(clean),))
        output = network(noises.add_noise(clean, noise, t), t, labels)
        F.mse_loss(output if isinstance(output, Tensor) else output.sample, noise).backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        if step % (steps // PARTS) == 0:
            names = [key for key, _ in network.named_parameters()]
            part = work / name / f"{step}.part"
            save_file(dict(zip(names, ema.shadow_params, strict=True)), part)
            part.rename(part.with_suffix(".safetensors"))


def batches(work: Path, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [-1, 1], a random half of them mirrored, and classes; every epoch in another order."""
    images, labels = torch.from_numpy(np.load(work / "images.npy")), torch.from_numpy(np.load(work / "labels.npy"))
    while True:
        for rows in torch.randperm(len(images)).split(size):
            if len(rows) == size:
                clean, mirrored = images[rows].float() / 127.5 - 1, torch.rand(size, 1, 1, 1) < 0.5
                yield torch.where(mirrored, clean.flip(3), clean), labels[rows]


def contest(work: Path, shards: str, steps: dict[str, int], at_once: int) -> dict[str, list[float]]:
    """Train all: contestant → seconds of the processor at each snapshot."""
    for name in steps:
        (work / name).mkdir()
    commands = {name: command(name, work, shards, steps[name]) for name in steps}
    awaited = {name: snapshots(name, work, steps[name]) for name in steps}
    return compete(commands, awaited, work, at_once)


def steps_in(seconds: float, work: Path, shards: str, at_once: int) -> dict[str, int]:
    """How many steps each contestant can take in this time: measured, so that its learning rate ends with the time."""
    images = round(seconds)
    trial = {name: PARTS * max(2, images // PARTS // batch_of(name)) for name in NAMES}
    measured = contest(work / "trial", shards, trial, at_once)
    found = {}
    for name, times in measured.items():
        step = (times[-2] - times[0]) / (PARTS - 2) * PARTS / trial[name]
        found[name] = round((seconds - times[0] + step * trial[name] / PARTS) / step) // PARTS * PARTS
    return found


def train(work: Path, shards: str, minutes: float, at_once: int) -> None:
    """Let the contestants train; what they leave, the other phases read."""
    (work / "trial").mkdir(parents=True, exist_ok=True)
    if not (work / "trial" / "labels.npy").exists():
        everything = read_all(ShardSet.open(shards))
        for name, array in (("images", everything.images), ("labels", everything.labels)):
            np.save(work / f"{name}.npy", array.numpy())
            (work / "trial" / f"{name}.npy").symlink_to(f"../{name}.npy")
    steps = steps_in(60 * minutes, work, shards, at_once)
    (work / "steps.json").write_text(json.dumps(steps))
    (work / "seconds.json").write_text(json.dumps(contest(work, shards, steps, at_once)))


def trained(
    name: str, work: Path, snapshot: Path
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], DiffusionProcess]:
    """(Noisy images, timesteps, classes) → output with the averaged weights of a snapshot, and what it was trained for.

    The weights of diffusers' network are put into ours, which is the same and draws faster.
    """
    if name == "ours":
        model = pretrained.read(str(snapshot.parent), ema=True)
        config, weights, process = model.config, model.weights, DiffusionProcess.of(model.config.diffusion)
    else:
        config, weights, process = our_config(work, PARTS), load_file(snapshot), DiffusionProcess.of(DiffusionSection())
    if name == "article":
        network = network_of(name, work)
    else:
        network = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
        weights = from_diffusers(weights) if name == "diffusers" else weights
    network.load_state_dict(weights)
    return Denoiser(network.eval().to(memory_format=torch.channels_last), "fp32", CLASSES), process  # type: ignore[call-overload]


def draw(work: Path, parts: list[int], names: list[str]) -> None:
    """Draw the same seeds and classes from each snapshot, with DPM-Solver++ in 20 steps; what is there is skipped."""
    torch.set_num_threads(1)
    (work / "samples").mkdir(exist_ok=True)
    steps = json.loads((work / "steps.json").read_text())
    for part, name in product(parts, names):
        file = work / "samples" / f"{name}-{part}.npz"
        snapshot = snapshots(name, work, steps[name])[part - 1]
        if file.exists() or not snapshot.exists():
            continue
        network, process = trained(name, work, snapshot)
        images = [drawn(network, process, torch.arange(first, first + BATCH)) for first in range(0, COUNT, BATCH)]
        np.savez(file, images=torch.cat(images).permute(0, 2, 3, 1).numpy(), labels=np.arange(COUNT) % CLASSES)
        print(f"{file}: {time.process_time():.0f} s of the processor since the start", flush=True)


def drawn(network: Callable[[Tensor, Tensor, Tensor], Tensor], process: DiffusionProcess, seeds: Tensor) -> Tensor:
    """Images of some seeds, whose classes take turns, uint8 (B, C, H, W)."""
    noise = keyed_random.normals(0, seeds, Use.SAMPLE_START, (3, 32, 32))
    labels, options = seeds % CLASSES, SamplingOptions(sampler="dpmpp", steps=EVALUATIONS)
    taken = samplers.sample(lambda x, t: network(x, t, labels), noise, process, options, lambda _: noise)
    return samplers.to_uint8(deque(taken, maxlen=1)[0].x)


def measure(work: Path, against: str, features: str) -> list[Row]:
    """The figures of all samples that have been drawn, by `ddpm evaluate`; features that are there are kept."""
    steps, seconds = (json.loads((work / f"{name}.json").read_text()) for name in ("steps", "seconds"))
    settings = ShardSettings(size=(32, 32), channels=3)
    rows = []
    for name, part in product(NAMES, range(1, PARTS + 1)):
        images, samples = (str(work / "samples" / f"{name}-{part}{ending}") for ending in (".npz", ""))
        if Path(images).exists():
            shard([images], samples, settings, workers=1, quiet=True)
            figures = evaluate(EvaluationRequest(samples, against, features), quiet=True)["figures"]
            seen = steps[name] // PARTS * part * batch_of(name)
            rows.append(Row(name, part, seconds[name][part - 1] / 60, seen, figures))
    return rows


def table(rows: list[Row]) -> Iterator[str]:
    """The figures in Markdown, then ours against those of the others at the same snapshot."""
    yield "| recipe | minutes | images seen | Fréchet distance | at infinity | kernel distance |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        infinity, kernel = (_interval(row.figures[key]) for key in ("frechet_distance_infinity", "kernel_distance"))
        distance = f"{row.figures['frechet_distance']['value']:.2f}"
        yield f"| {row.name} | {row.minutes:.1f} | {row.seen:,} | {distance} | {infinity} | {kernel} |"
    for ours, theirs in product(rows, rows):
        if ours.name == "ours" != theirs.name and ours.part == theirs.part:
            own, other = (row.figures["frechet_distance_infinity"] for row in (ours, theirs))
            verdict = (
                "better" if own["high"] < other["low"] else "WORSE" if own["low"] > other["high"] else "no difference"
            )
            yield f"part {ours.part} of {PARTS}, ours against {theirs.name}: {verdict} beyond the intervals"


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for all that is made")
    parser.add_argument("phase", choices=["train", "draw", "table", "peer"], help="peer is what train starts")
    parser.add_argument("--shards", help="CIFAR-10's training images with their classes")
    parser.add_argument("--minutes", type=float, default=30, help="of the processor for each contestant")
    parser.add_argument("--at-once", type=int, default=1, help="contestants that train at the same time")
    parser.add_argument("--parts", type=int, nargs="+", default=range(1, PARTS + 1), help="snapshots to draw")
    parser.add_argument("--names", nargs="+", default=NAMES, help="contestants to draw")
    parser.add_argument("--against", help="shard set to compare with; default: --shards")
    parser.add_argument("--features", help="as of ddpm evaluate")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--steps", type=int, default=0, help="of a peer")
    options = parser.parse_args()
    if options.phase == "peer":
        learn(options.names[0], options.work, options.steps)
    elif options.phase == "train":
        train(options.work, options.shards, options.minutes, options.at_once)
    elif options.phase == "draw":
        draw(options.work, options.parts, options.names)
    else:
        rows = measure(options.work, options.against or options.shards, options.features)
        print("\n".join(table(rows)))
        if options.plot:
            series: dict[str, list[svg.Measured]] = {name: [] for name in NAMES}
            for row in rows:
                at_infinity = row.figures["frechet_distance_infinity"]
                series[row.name].append((row.minutes, at_infinity["value"], at_infinity["low"], at_infinity["high"]))
            options.plot.write_text(svg.with_intervals(series, "minutes of one core", "Fréchet distance at infinity"))


if __name__ == "__main__":
    main()
