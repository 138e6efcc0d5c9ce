"""How far from the truth do samplers end after a number of network evaluations, ours and those of diffusers?

    python benchmarks/sampler_truth.py [--prediction-types TYPE ...] [--plot FILE.svg] [--json]

The network is the optimal denoiser of a Gaussian mixture, in closed form (mixture.py), so every error is the sampler's.
The figure is the sliced Wasserstein-1 distance of 20,000 samples to the mixture; lower is better. Draws of the mixture
itself have a distance, too, which the head of the output gives: smaller differences mean little.

All start from the same noise and compute in float32. The schedulers of diffusers get the denoiser at the noise level
that their samples have, not at a timestep rounded from it. Their settings are the ones that each is shipped with and
others with which it does well here; Heun clips, without which it diverges. `exponential` of UniPC and DEIS are equal
distances of log σ, what DPM++ calls `lu`. `σ ≤ 80` is tuned by hand: the cosine schedule itself goes to σ = 20,000.

Heun evaluates the network twice a step, but for the last: it gets as many steps as stay within the evaluations.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from math import log10
from pathlib import Path
from typing import Any, get_args

import diffusers
import mixture
import svg
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from turns import Turns

from pipeline.config import SamplingOptions
from pipeline.diffusion import samplers
from pipeline.diffusion.process import DiffusionProcess, PredictionType
from pipeline.diffusion.schedule import Schedule, make_schedule
from pipeline.diffusion.spacing import best_sampler

BUDGETS = (10, 20, 50, 100)
SHIFT = -1.39  # 2 log(64/128): Hoogeboom et al. 2023, arXiv:2301.11093, for 128 px
CLOSE, NOISE = 1.05, 0.003  # what counts as equal: a ratio, or a difference

KARRAS, EXPONENTIAL, LU = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_lu_lambdas": True}
THIRD, CLIP = {"solver_order": 3}, {"clip_sample": True}
THEIRS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "DDIM trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "DDIM linspace": (DDIMScheduler, {"timestep_spacing": "linspace"}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M karras": (DPMSolverMultistepScheduler, KARRAS),
    "DPM++ 2M lu": (DPMSolverMultistepScheduler, LU),
    "DPM++ 3M lu": (DPMSolverMultistepScheduler, THIRD | LU),
    "UniPC": (UniPCMultistepScheduler, {}),
    "UniPC karras": (UniPCMultistepScheduler, KARRAS),
    "UniPC exponential": (UniPCMultistepScheduler, EXPONENTIAL),
    "UniPC exponential σ ≤ 80": (UniPCMultistepScheduler, EXPONENTIAL | {"sigma_max": 80.0}),
    "DEIS trailing": (DEISMultistepScheduler, {"timestep_spacing": "trailing"}),
    "DEIS exponential": (DEISMultistepScheduler, EXPONENTIAL),
    "DEIS 3 exponential": (DEISMultistepScheduler, THIRD | EXPONENTIAL),
    "Heun": (HeunDiscreteScheduler, CLIP),
    "Heun karras": (HeunDiscreteScheduler, CLIP | KARRAS),
    "Heun exponential": (HeunDiscreteScheduler, CLIP | EXPONENTIAL),
}


@dataclass(frozen=True)
class Row:
    """A figure; `evaluations` are those allowed, and `default` marks what we recommend for them."""

    schedule: str
    prediction_type: PredictionType
    evaluations: int
    name: str
    ours: bool
    default: bool
    sw1: float


def schedules() -> dict[str, tuple[Schedule, dict[str, Any]]]:
    """By name: ours, and the words for the same one of diffusers."""
    linear, cosine = make_schedule("linear", 1000), make_schedule("cosine", 1000)
    moved = make_schedule("cosine", 1000, log_snr_shift=SHIFT)
    return {
        "linear": (linear, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        "cosine": (cosine, {"beta_schedule": "squaredcos_cap_v2"}),
        "shifted cosine": (moved, {"trained_betas": moved.betas.tolist()}),
    }


def _ours(schedule: Schedule, prediction_type: PredictionType, budget: int) -> Iterator[tuple[str, bool, Tensor]]:
    """Name, whether `ddpm sample --steps N` takes it, and its samples; each sampler with its own spacing."""
    process = DiffusionProcess(schedule, prediction_type, "fixed_small")
    for name in ("ddpm", "ddim", "dpmpp", "dpmpp3m", "heun"):
        steps = (budget + 1) // 2 if name == "heun" else budget
        options = SamplingOptions(sampler=name, steps=steps)
        denoiser = mixture.Denoiser(schedule, prediction_type)
        taken = samplers.sample(denoiser, mixture.start(), process, options, mixture.step_noise)
        samples = deque(taken, maxlen=1)[0].x
        assert denoiser.calls <= budget
        yield name, name == best_sampler(budget), samples


def _theirs(make: type, words: dict[str, Any], prediction_type: PredictionType, budget: int) -> Tensor:
    """Samples as a pipeline of diffusers draws them."""
    scheduler = make(num_train_timesteps=1000, prediction_type=prediction_type, **words)
    scheduler.set_timesteps((budget + 1) // 2 if scheduler.order == 2 else budget)
    assert len(scheduler.timesteps) <= budget
    x, has_sigmas = mixture.start() * scheduler.init_noise_sigma, hasattr(scheduler, "sigmas")
    if has_sigmas:
        scheduler.set_begin_index(0)  # it would skip a step where rounding gives the first two the same timestep
    for i, t in enumerate(scheduler.timesteps):
        bar = 1 / (1 + scheduler.sigmas[i].double() ** 2) if has_sigmas else scheduler.alphas_cumprod[t].double()
        seen = scheduler.scale_model_input(x, t)
        output = mixture.predict(seen, bar[None], prediction_type)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def measure(truth: mixture.Truth, prediction_types: list[PredictionType]) -> Iterator[Row]:
    """All figures, by schedule, prediction type and evaluations."""
    for schedule_name, (schedule, words) in schedules().items():
        for prediction_type in prediction_types:
            for budget in BUDGETS:
                for name, default, samples in _ours(schedule, prediction_type, budget):
                    sw1 = truth.distance(samples)
                    yield Row(schedule_name, prediction_type, budget, name, True, default, sw1)
                for name, (make, more) in THEIRS.items():
                    sw1 = truth.distance(_theirs(make, words | more, prediction_type, budget))
                    yield Row(schedule_name, prediction_type, budget, f"diffusers {name}", False, False, sw1)


def floor(truth: mixture.Truth, draws: int = 8) -> float:
    """The mean distance of as many draws of the mixture as there are samples."""
    generator = torch.Generator().manual_seed(2)
    return sum(truth.distance(truth.draw(mixture.SEEDS, generator)) for _ in range(draws)) / draws


def best(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: row.sw1)


def tables(rows: list[Row]) -> Iterator[str]:
    """A block for each schedule and prediction type, then our defaults against the best of theirs."""
    verdicts = []
    for (schedule, prediction_type), group in groupby(rows, lambda row: (row.schedule, row.prediction_type)):
        block = list(group)
        yield f"\n{f'{schedule}, {prediction_type}':36}" + "".join(f"{budget:>10} " for budget in BUDGETS)
        winners = {budget: best([r for r in block if r.evaluations == budget and not r.ours]) for budget in BUDGETS}
        for name in dict.fromkeys(row.name for row in block):
            line = [row for row in block if row.name == name]
            cells = {row.evaluations: f"{row.sw1:10.4f}{_mark(row, winners)}" for row in line}
            yield f"{name:36}" + "".join(cells.get(budget, " " * 11) for budget in BUDGETS)
        for ours in (row for row in block if row.default):
            theirs = winners[ours.evaluations]
            close = ours.sw1 <= theirs.sw1 * CLOSE or ours.sw1 - theirs.sw1 <= NOISE
            verdicts.append(
                f"{schedule}, {prediction_type}, {ours.evaluations}: {ours.name} {ours.sw1:.4f}, {theirs.name}"
                f" {theirs.sw1:.4f}: {'as good or better' if close else 'WORSE'}"
            )
    yield "\n* best of diffusers   + our default\n"
    yield f"Our default against the best of diffusers (as good: within {CLOSE - 1:.0%} or {NOISE}):"
    yield from verdicts


def _mark(row: Row, winners: dict[int, Row]) -> str:
    return "+" if row.default else "*" if row is winners[row.evaluations] else " "


WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 300, 62, 58, 22
LOWEST, HIGHEST = 1e-3, 1.0


def _panel(
    left: float, rows: list[Row], colors: dict[str, str], least: float, title: str, first: bool
) -> Iterator[str]:
    """One schedule: a frame with its ticks, and a line for each contestant."""

    def at(evaluations: float, sw1: float) -> svg.Point:
        across = log10(evaluations / BUDGETS[0]) / log10(BUDGETS[-1] / BUDGETS[0])
        return left + 12 + across * (WIDTH - 24), TOP + log10(HIGHEST / sw1) / log10(HIGHEST / LOWEST) * HEIGHT

    def line(chosen: list[Row]) -> list[svg.Point]:
        return [at(row.evaluations, max(row.sw1, LOWEST)) for row in chosen]

    bottom = TOP + HEIGHT
    yield f'<clipPath id="c{left}"><rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/></clipPath>'
    for power in (1e-3, 1e-2, 1e-1, 1.0):
        y = at(10, power)[1]
        yield svg.line([(left, y), (left + WIDTH, y)], "#e4e4e4", 1)
        if first:
            yield svg.text(left - 7, y + 4, f"{power:g}", "end")
        for digit in range(2, 10) if power < 1 else ():
            y = at(10, power * digit)[1]
            yield svg.line([(left, y), (left + 4, y)], "#555", 0.8)
    for budget in BUDGETS:
        x = at(budget, 1)[0]
        yield svg.line([(x, bottom), (x, bottom - 5)], "#555", 1)
        yield svg.text(x, bottom + 17, str(budget))
    yield svg.text(left + WIDTH / 2, TOP - 9, title, more='font-weight="bold"')
    yield svg.text(left + WIDTH / 2, bottom + 37, "network evaluations")
    yield f'<g clip-path="url(#c{left})" stroke-linejoin="round">'
    yield svg.line([at(10, least), at(100, least)], "#555", 1, 'stroke-dasharray="1 3"')
    names = dict.fromkeys(row.name for row in sorted(rows, key=lambda row: row.ours))
    for name in names:
        chosen = [row for row in rows if row.name == name]
        if not chosen[0].ours:
            yield svg.line(line(chosen), "#b5b5b5", 1, 'stroke-dasharray="4 3"')
            continue
        yield svg.line(line(chosen), colors[name], 2)
        for x, y in line([row for row in chosen if row.default]):
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colors[name]}"/>'
    winners = [best([row for row in rows if row.evaluations == budget and not row.ours]) for budget in BUDGETS]
    yield svg.line(line(winners), "#333", 1.8, 'stroke-dasharray="6 4"')
    yield f'</g><rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#555"/>'


def plot(rows: list[Row], least: float) -> str:
    """The distances over the evaluations as SVG, a panel for each schedule; of the first prediction type."""
    rows = [row for row in rows if row.prediction_type == rows[0].prediction_type]
    names = list(dict.fromkeys(row.schedule for row in rows))
    colors = dict(zip(dict.fromkeys(row.name for row in rows if row.ours), svg.COLORS))
    width, height = LEFT + len(names) * (WIDTH + GAP), TOP + HEIGHT + 50
    parts = [
        svg.text(0, 0, "distance to the truth (SW1)", more=f'transform="translate(15 {TOP + HEIGHT / 2}) rotate(-90)"'),
    ]
    keys = [(name, color, "2", "") for name, color in colors.items()]
    keys += [("best of diffusers", "#333", "1.8", "6 4"), ("other diffusers", "#b5b5b5", "1", "4 3")]
    x = float(LEFT)
    for words, color, stroke, dashes in [*keys, ("draws of the truth", "#555", "1", "1 3")]:
        parts.append(svg.line([(x, 18), (x + 22, 18)], color, float(stroke), f'stroke-dasharray="{dashes}"'))
        parts.append(svg.text(x + 27, 22, words, "start"))
        x += 42 + 7.2 * len(words)
    parts += [f'<circle cx="{x + 8:.1f}" cy="18" r="4" fill="#222"/>', svg.text(x + 18, 22, "our default", "start")]
    for i, name in enumerate(names):
        here = [row for row in rows if row.schedule == name]
        parts += _panel(LEFT + i * (WIDTH + GAP), here, colors, least, name, first=i == 0)
    return svg.document(width, height, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"nargs": "+", "default": ["epsilon", "v_prediction"], "choices": get_args(PredictionType)}
    parser.add_argument("--prediction-types", **kinds)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="of the first prediction type")
    parser.add_argument("--json", action="store_true", help="a list of all figures instead of tables")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    turns, say = Turns(torch.device("cpu"), threads=1), _quiet if options.json else print
    truth = mixture.Truth()
    least = floor(truth)
    say(f"{turns.where()}, diffusers {diffusers.__version__}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    say(f"SW1 of {mixture.SEEDS:,} samples (seeds from 0); of as many draws of the mixture itself: {least:.4f}")
    rows = list(measure(truth, options.prediction_types))
    if options.plot:
        options.plot.write_text(plot(rows, least))
    for line in tables(rows):
        say(line)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))


def _quiet(*_: object) -> None:
    pass


if __name__ == "__main__":
    main()
