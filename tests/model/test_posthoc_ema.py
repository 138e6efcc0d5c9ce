"""Power-function averages: the length that is asked for, and the average that others are combined to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.model.ema import Average
from pipeline.model.posthoc_ema import PowerAverages, Profile, by_length, check_length, coefficients, exponent

LENGTHS = (0.05, 0.1)


def tracked(trajectory: torch.Tensor, lengths: tuple[float, ...]) -> PowerAverages:
    """Averages of a network with one tensor that takes these values, one after the other."""
    averages = PowerAverages(nn.ParameterList([nn.Parameter(torch.zeros_like(trajectory[0]))]), lengths)
    for t, weights in enumerate(trajectory, 1):
        averages.update([weights], t)
    return averages


def test_mean_and_deviation_of_the_profile_are_those_of_its_length() -> None:
    """Of weights that are 1, t and t², so that each update is known by its age."""
    steps, lengths = 1000, (0.03, 0.05, 0.1, 0.2, 0.28)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    averages = by_length(tracked(torch.stack([torch.ones_like(t), t, t**2], 1), lengths).tensors())
    for length in lengths:
        one, mean, square = averages[length]["0"].tolist()
        gamma = exponent(length)
        assert one == pytest.approx(1, abs=1e-12)
        assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1 / steps)
        assert math.sqrt(square - mean**2) == pytest.approx(length, abs=1 / steps)
    assert averages[0.1]["0"][1].item() == pytest.approx(0.888, abs=0.002)  # ema_pytorch: .442 if it takes every tenth


def wandering(steps: int) -> torch.Tensor:
    """Weights that drift and tremble, (steps, 300) float32."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, 300, generator=generator)
    return 0.05 + 0.002 * noise.cumsum(0) + 0.01 * torch.randn(steps, 300, generator=generator)


def test_a_length_made_of_16_snapshots_is_the_one_tracked_directly() -> None:
    """Error of the weights relative to their distance from the last ones; snapshots are stored in float16."""
    bounds = {0.05: 0.002, 0.08: 0.002, 0.1: 0.002, 0.15: 0.002, 0.2: 0.005}
    trajectory, every = wandering(800), 50
    averages = PowerAverages(nn.ParameterList([nn.Parameter(torch.zeros(300))]), tuple(bounds))
    profiles, stored = [], []
    for t, weights in enumerate(trajectory, 1):
        averages.update([weights], t)
        if t % every == 0:
            now = by_length(averages.tensors())
            profiles += [Profile(t, length) for length in LENGTHS]
            stored += [now[length]["0"].half().double() for length in LENGTHS]
    for length, bound in bounds.items():
        solution, distance = coefficients(profiles, Profile(len(trajectory), length))
        made, direct = torch.from_numpy(solution) @ torch.stack(stored), by_length(averages.tensors())[length]["0"]
        error = (made - direct).norm() / (direct - trajectory[-1]).norm()
        print(f"length {length}: error {error:.5f}, distance of profiles {distance:.5f}")
        assert error < bound and distance < 0.05
        assert solution.sum() == pytest.approx(1, abs=1e-12)


def test_few_averages_are_combined_as_closely_as_they_can_be() -> None:
    profiles = [Profile(500, 0.05), Profile(1000, 0.05), Profile(1000, 0.1)]
    solution, distance = coefficients(profiles, Profile(1000, 0.1))
    assert solution == pytest.approx([0, 0, 1], abs=1e-6) and distance < 1e-6
    solution, distance = coefficients(profiles, Profile(1000, 0.02))
    assert solution.sum() == pytest.approx(1) and distance > 0.1  # and normalised all the same


@pytest.mark.parametrize("on_host", [False, True])
def test_they_take_in_what_the_moving_average_takes_in(on_host: bool) -> None:
    model = nn.Linear(2, 1)
    ema = Average(model, 0.9, on_host=on_host, lengths=LENGTHS)
    seen = []
    for step in range(6):
        with ema.track_step():
            model.weight.data += 1.0
        if step == 3:  # a bad step: it changes nothing
            model.weight.data -= 1.0
            continue
        ema.update()
        seen.append(model.weight.detach().clone())
    ema.flush()
    direct = PowerAverages(nn.ParameterList([nn.Parameter(torch.zeros(1, 2))]), LENGTHS)
    for t, weights in enumerate(seen, 1):
        direct.update([weights], t)
    for length in LENGTHS:
        assert torch.equal(by_length(ema.powers.tensors())[length]["weight"], by_length(direct.tensors())[length]["0"])


@pytest.mark.parametrize("length", [0.0, -0.1, 0.29, math.nan])
def test_a_length_that_no_average_has_is_refused(length: float) -> None:
    with pytest.raises(ConfigError, match=r"--ema-length .*: give a length above 0 and up to 0\.28"):
        check_length(length, "--ema-length")
