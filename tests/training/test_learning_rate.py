"""Rates against numbers worked out by hand."""

from __future__ import annotations

import pytest

from pipeline.config import TrainSection
from pipeline.training.learning_rate import learning_rate, same_past


def rates(at: range | list[int], /, **values: object) -> list[float]:
    section = TrainSection.model_validate({"lr": 1e-3, "warmup_steps": 0, "steps": 8, **values})
    return [learning_rate(step, section) for step in at]


def test_warm_up_rises_in_equal_steps_from_the_first_step_on() -> None:
    assert rates(range(6), lr=1.0, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates([0, 4998, 4999, 5000, 10**6], lr=2e-4, warmup_steps=5000, steps=800_000) == pytest.approx(
        [4e-8, 2e-4 * 4999 / 5000, 2e-4, 2e-4, 2e-4], rel=1e-12
    )


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates(range(3)) == [1e-3] * 3


def test_the_cosine_falls_to_zero_at_the_last_step() -> None:
    """cos at 0, 45, 60, 90, 120, 135 and 180 degrees."""
    expected = [1.0, (1 + 2**-0.5) / 2, 0.75, 0.5, 0.25, (1 - 2**-0.5) / 2, 0.0, 0.0]
    got = rates([0, 6, 8, 12, 16, 18, 24, 30], lr=1.0, lr_schedule="cosine", steps=24)
    assert got == pytest.approx(expected, abs=1e-12)


def test_warm_up_multiplies_whatever_the_schedule_says() -> None:
    assert rates([0, 6, 12], lr=1.0, lr_schedule="cosine", steps=24, warmup_steps=10) == pytest.approx(
        [0.1, 0.7 * (1 + 2**-0.5) / 2, 0.5], rel=1e-12
    )


def test_stages_follow_each_other_and_the_last_one_stays() -> None:
    stages = [[3, 1e-3], [2, 2e-4], [1, 2e-5]]
    assert rates(range(9), lr=9.0, lr_stages=stages) == [1e-3, 1e-3, 1e-3, 2e-4, 2e-4, 2e-5, 2e-5, 2e-5, 2e-5]
    assert rates([0, 1, 2], lr_stages=[[3, 1.0], [1, 0.5]], warmup_steps=2) == [0.5, 1.0, 1.0]


def test_the_past_is_what_was_done() -> None:
    old = TrainSection.model_validate({"lr": 1.0, "warmup_steps": 0})
    new = TrainSection.model_validate({"lr_stages": [[10, 1.0], [1, 0.1]], "warmup_steps": 0})
    assert same_past(old, new, 0) and same_past(old, new, 10)
    assert not same_past(old, new, 11)
