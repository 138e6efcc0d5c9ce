"""Learned variance (Nichol & Dhariwal 2021, arXiv:2102.09672) against a direct evaluation that shares no code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pipeline.config import DiffusionSection, SamplingOptions
from pipeline.diffusion.objective import loss
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.samplers import sample
from pipeline.diffusion.schedule import make_schedule
from tests.launch import TINY, ddpm

T = 1000
SHAPE = (1, 3, 2)


def chain(bars: Tensor, i: int) -> tuple[float, float, float]:
    """β, ᾱ and ᾱ before the i-th of the visited timesteps (ascending): the textbook's."""
    before = float(bars[i - 1]) if i else 1.0
    return 1 - float(bars[i]) / before, float(bars[i]), before


def learned_log_variance(bars: Tensor, i: int, mixture: Tensor) -> Tensor:
    """Eq. 15: the mixture, in [-1, 1], interpolates between log β̃ and log β; β̃ of the first is that of the second."""
    beta, _, _ = chain(bars, i)
    beta_small, bar_small, before_small = chain(bars, max(i, 1))
    small = math.log((1 - before_small) / (1 - bar_small) * beta_small)
    share = (mixture + 1) / 2
    return share * math.log(beta) + (1 - share) * small


def posterior_mean(bars: Tensor, i: int, x0: Tensor, xt: Tensor) -> Tensor:
    beta, bar, before = chain(bars, i)
    return (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * xt) / (1 - bar)


def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of 256 levels, noise, and a raw network output for them, float64."""
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randint(0, 256, (count, *SHAPE), generator=generator).double() / 127.5 - 1
    noise = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    prediction = noise + 0.05 * torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    mixture = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    return x0, noise, torch.cat((prediction, mixture), 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_both_losses_are_the_bound_evaluated_directly(schedule: str) -> None:
    process = DiffusionProcess(make_schedule(schedule, T), "epsilon", "learned")  # type: ignore[arg-type]
    bars, steps = process.schedule.alphas_cumprod, [0, 1, 2, 300, 700, 990]
    x0, noise, output = draw(len(steps))
    expected = []
    for row, t in enumerate(steps):
        bar = float(bars[t])
        xt = math.sqrt(bar) * x0[row] + math.sqrt(1 - bar) * noise[row]
        guess = (xt - math.sqrt(1 - bar) * output[row, :1]) / math.sqrt(bar)
        model = Normal(posterior_mean(bars, t, guess, xt), (learned_log_variance(bars, t, output[row, 1:]) / 2).exp())
        if t == 0:  # the decoder: the probability of the level's bin, of infinite width at both ends
            up = torch.where(x0[row] > 0.999, torch.inf, x0[row] + 1 / 255)
            low = torch.where(x0[row] < -0.999, -torch.inf, x0[row] - 1 / 255)
            nats = -(model.cdf(up) - model.cdf(low)).log()
        else:
            beta, bar, before = chain(bars, t)
            true = Normal(posterior_mean(bars, t, x0[row], xt), math.sqrt((1 - before) / (1 - bar) * beta))
            nats = kl_divergence(true, model)
        expected.append(T * nats.mean() / math.log(2))
    bound, t = torch.stack(expected), torch.tensor(steps)

    def got(weighting: str) -> Tensor:
        return loss(lambda x, t: output, x0, t, noise, process, DiffusionSection(loss_weighting=weighting))  # type: ignore[arg-type]

    error = (output[:, :1] - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(got("vlb"), bound, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got("hybrid"), error + 0.001 * bound, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got("simple"), got("hybrid"), rtol=0, atol=0)  # nothing else would train the variance


@pytest.mark.parametrize(("steps", "spacing"), [(T, "uniform"), (50, "uniform"), (7, "quadratic"), (10, "logsnr")])
def test_strided_sampling_is_the_chain_of_the_visited_timesteps(steps: int, spacing: str) -> None:
    """Section 4: the variance is interpolated between the bounds of the shorter chain, not of the full one."""
    process = DiffusionProcess(make_schedule("cosine", T), "epsilon", "learned", clip=False)
    start, noise, _ = draw(2)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0.9 * x, torch.cos(3 * x + t.reshape(-1, 1, 1, 1) / 100)), 1)

    options = SamplingOptions(sampler="ddpm", steps=steps, spacing=spacing)  # type: ignore[arg-type]
    taken = list(sample(denoise, start, process, options, lambda t: noise))
    visited = sorted(step.t for step in taken)
    assert len(visited) == steps
    bars, x = process.schedule.alphas_cumprod[visited], start
    for step in taken:
        i = visited.index(step.t)
        bar, out = float(bars[i]), denoise(x, torch.full((2,), step.t))
        guess = (x - math.sqrt(1 - bar) * out[:, :1]) / math.sqrt(bar)
        expected = posterior_mean(bars, i, guess, x)
        if i:
            expected = expected + (learned_log_variance(bars, i, out[:, 1:]) / 2).exp() * noise
        torch.testing.assert_close(step.x, expected, rtol=1e-9, atol=1e-9)
        x = step.x


@pytest.mark.parametrize("weighting", ["hybrid", "vlb"])
def test_a_run_learns_its_variance_and_is_sampled_in_few_steps(weighting: str, digits: Path, tmp_path: Path) -> None:
    learned = ("model.learned_variance=true", f"diffusion.loss_weighting={weighting}", f"data.shards={digits}")
    ran = ddpm("train", *TINY, *learned, f"run.dir={tmp_path}/run", "train.steps=4")
    assert ran.returncode == 0, ran.stderr
    drawn = ("--sampler", "ddpm", "--steps", "20", "--seeds", "0-3", "--out", tmp_path / "drawn")
    assert ddpm("sample", tmp_path / "run", *drawn).returncode == 0
    fixed = ddpm("train", *TINY, *learned[1:], f"run.dir={tmp_path}/fixed")
    assert fixed.returncode == 2
    assert f"diffusion.loss_weighting={weighting} needs model.learned_variance=true" in fixed.stderr
