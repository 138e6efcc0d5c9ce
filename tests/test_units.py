"""Epochs count the samples consumed, whatever the global batch was while they were."""

from __future__ import annotations

import pytest

from pipeline.config import Config
from pipeline.training.intervals import Schedule, batch_changed, past_of
from pipeline.units import EpochCounter, all_of

DOUBLED = EpochCounter(60, 24, [(5, 60), (8, 132)])
"""An epoch of 60 samples: one at 12 a step, then 24 a step, now at step 8."""


def test_one_is_not_called_all() -> None:
    assert (all_of(1, "shard"), all_of(1200, "image")) == ("the only shard is", "all 1,200 images are")


@pytest.mark.parametrize(
    ("length", "start", "steps"),
    [
        ("0ep", 0, 0),
        ("0.5ep", 0, 3),
        ("1ep", 0, 5),
        ("2ep", 0, 8),  # 120 samples: within the second batch size
        ("4ep", 0, 13),
        ("10ep", 0, 28),
        ("1ep", 5, 3),
        (7, 5, 7),
    ],
)
def test_a_length_in_epochs_ends_when_its_samples_are_consumed(length: int | str, start: int, steps: int) -> None:
    assert DOUBLED.in_steps(length, start) == steps


def test_steps_for_is_the_inverse_of_samples_after() -> None:
    for course in (DOUBLED, EpochCounter(60, 12), EpochCounter(7, 24, [(3, 5), (4, 100)])):
        for step in range(40):
            assert course.steps_for(course.samples_after(step)) == step


@pytest.mark.parametrize(
    ("interval", "steps"),
    [("1ep", [5, 8, 10, 13, 15]), ("2ep", [8, 13]), (6, [6, 12]), (0, []), ("0ep", []), ("0.1ep", list(range(1, 16)))],
)
def test_an_interval_is_due_when_a_multiple_of_it_is_reached(interval: int | str, steps: list[int]) -> None:
    assert [step for step in range(1, 16) if DOUBLED.is_reached(interval, step)] == steps


def test_lengths_count_the_samples_consumed_before_the_batch_changed() -> None:
    config = Config.model_validate({"train": {"steps": "10ep", "global_batch": 24, "warmup_steps": "2ep",
                                              "lr_stages": [["4ep", 1e-3], ["1ep", 1e-4]]}})  # fmt: skip
    train = config.in_steps(60, [(5, 60)]).train
    assert (train.steps, train.warmup_steps, train.lr_stages) == (28, 8, ((13, 1e-3), (3, 1e-4)))


def test_the_past_of_a_run_is_read_from_its_checkpoint() -> None:
    assert past_of({}) == past_of({"position": {"step": 0, "samples": 0}}) == []
    assert past_of({"position": {"step": 5, "samples": 60}}) == [(5, 60)]  # of a version that knew no changes
    changed = past_of({"position": {"step": 8, "samples": 132, "batch_changes": [[5, 60]]}})
    assert changed == [(5, 60), (8, 132)]
    assert (batch_changed(changed, 24), batch_changed(changed, 12), batch_changed([], 12)) == (False, True, False)


def test_a_milestone_stays_a_milestone_when_intervals_change() -> None:
    run = Config.model_validate({"run": {"keep_every": "1ep"}}).run
    schedule = Schedule(DOUBLED, run)
    assert [step for step in range(1, 11) if schedule.is_milestone(step)] == [5, 8, 10] and schedule.keep_every == 0
    schedule = Schedule(DOUBLED, run.model_copy(update={"keep_every": 6}))
    assert [step for step in range(1, 13) if schedule.is_milestone(step)] == [6, 12] and schedule.keep_every == 6
    assert schedule.due(6, "checkpoint", "keep")
