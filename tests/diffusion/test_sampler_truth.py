"""Samplers against the truth: a distribution whose optimal denoiser is known in closed form (benchmarks/mixture.py).

The figure is the sliced Wasserstein-1 distance of 20,000 samples to the distribution; independent draws of it have
.0027 on average. `benchmarks/sampler_truth.py` prints the table with the schedulers of diffusers beside ours.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

import pytest

from benchmarks.mixture import Denoiser, Truth, start, step_noise
from pipeline.config import SamplingOptions
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.samplers import sample
from pipeline.diffusion.schedule import make_schedule
from pipeline.diffusion.spacing import advice, best_sampler, resolve

SCHEDULES = {
    "linear": make_schedule("linear", 1000),
    "cosine": make_schedule("cosine", 1000),
    "shifted cosine": make_schedule("cosine", 1000, log_snr_shift=-1.39),
}
TYPES = ["epsilon", "sample", "v_prediction"]
BUDGETS = (10, 20, 50, 100)
"""Network evaluations."""
REACH = {  # sampler → SW1 by evaluations, then at its own number of steps, on any schedule
    "ddpm": (0.08, 0.05, 0.03, 0.018, 0.007),
    "ddim": (0.033, 0.016, 0.006, 0.004, 0.006),
    "dpmpp": (0.027, 0.005, 0.003, 0.003, 0.004),
    "dpmpp3m": (0.012, 0.005, 0.003, 0.003, 0.004),
    "heun": (0.27, 0.032, 0.005, 0.003, 0.005),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


truth = cache(Truth)


@cache  # several tests ask for the same
def measured(schedule: str, prediction_type: Any, options: SamplingOptions) -> tuple[float, int]:
    """The distance of samples to the truth, and how often the network was called for them."""
    denoiser = Denoiser(SCHEDULES[schedule], prediction_type)
    process = DiffusionProcess(SCHEDULES[schedule], prediction_type, "fixed_small")
    steps = sample(denoiser, start(), process, options, step_noise)
    return truth().distance(deque(steps, maxlen=1)[0].x), denoiser.calls


def distance(schedule: str, options: SamplingOptions) -> float:
    return measured(schedule, "epsilon", options)[0]


@every_schedule
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("sampler", REACH)
def test_a_sampler_comes_this_near_to_the_truth(sampler: Any, prediction_type: str, schedule: str) -> None:
    steps = [(budget + 1) // 2 if sampler == "heun" else budget for budget in BUDGETS]
    if prediction_type != "epsilon":
        steps = steps[:2]  # the rest would prove what these prove
    # The sampler's own number of steps: 1000 for ddpm, which take as long as all others together, so on one schedule.
    own = [None] if len(steps) == 4 and (sampler != "ddpm" or schedule == "linear") else []
    for count, reach in zip([*steps, *own], REACH[sampler]):
        found, calls = measured(schedule, prediction_type, SamplingOptions(sampler=sampler, steps=count))
        print(f"\n{sampler}, {schedule}, {prediction_type}: {calls} evaluations, SW1 {found:.4f}")
        assert found <= reach, f"{calls} evaluations"


@every_schedule
def test_the_promised_distances(schedule: str) -> None:
    linear = schedule == "linear"
    promised = {
        ("dpmpp", 20): 0.005 if linear else 0.004,
        ("heun", 20): 0.008,
        ("ddim", 50): 0.006,
        ("dpmpp", 10): 0.012 if schedule == "cosine" else 0.027,
    }
    for (sampler, steps), reach in promised.items():
        assert distance(schedule, SamplingOptions(sampler=sampler, steps=steps)) <= reach, (sampler, steps)


@every_schedule
@pytest.mark.parametrize("steps", BUDGETS)
def test_no_sampler_without_noise_is_clearly_better_than_the_default_for_its_steps(steps: int, schedule: str) -> None:
    distances = {
        sampler: distance(schedule, SamplingOptions(sampler=sampler, steps=steps))
        for sampler in ("ddim", "dpmpp", "dpmpp3m")
    }
    best = min(distances.values())
    assert distances[best_sampler(steps)] <= max(1.05 * best, best + 0.003), distances


@every_schedule
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "dpmpp3m", "heun"])
def test_a_spacing_that_is_called_poor_is_poor(sampler: Any, schedule: str) -> None:
    """And the one that the line names instead is better, as is the sampler named instead of a short ddpm."""
    own, poor = (
        SamplingOptions(sampler=sampler, steps=20),
        SamplingOptions(sampler=sampler, steps=20, spacing="leading"),
    )
    table = SCHEDULES[schedule]
    line = advice(resolve(poor, table), table)
    assert line and f"--spacing {resolve(own, table).spacing} is better" in line
    assert advice(resolve(own, table), table) is None
    assert distance(schedule, poor) > distance(schedule, own)


def test_ddpm_with_few_steps_causes_advice() -> None:
    table, short = SCHEDULES["linear"], SamplingOptions(sampler="ddpm", steps=50)
    line = advice(resolve(short, table), table)
    assert line and "--sampler dpmpp --steps 50" in line
    better = distance("linear", SamplingOptions(sampler="dpmpp", steps=50))
    assert distance("linear", short) > 5 * better
    assert advice(resolve(SamplingOptions(sampler="ddpm"), table), table) is None


@every_schedule
def test_order_1_where_the_ratio_of_steps_makes_order_2_wrong(schedule: str) -> None:
    limited, free = (
        distance(schedule, SamplingOptions(sampler="dpmpp", steps=10, spacing="uniform", max_step_ratio=ratio))
        for ratio in (2.0, None)
    )
    assert limited < 0.5 * free
