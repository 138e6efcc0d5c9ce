"""The learning rate as a pure function of the step, so that no scheduler has a state to restore."""

from __future__ import annotations

import math
from itertools import accumulate

from pipeline.config import TrainSection


def learning_rate(step: int, section: TrainSection) -> float:
    """The rate of step `step` (0 is the first): the schedule times a linear warm-up.

    Args:
        step: finished steps.
        section: with all lengths in steps.
    """
    rate = _scheduled(step, section)
    return rate * min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else rate


def same_past(old: TrainSection, new: TrainSection, steps_done: int) -> bool:
    """Whether both settings give every finished step the same rate; what lies ahead may differ."""
    return all(learning_rate(step, old) == learning_rate(step, new) for step in range(steps_done))


def _scheduled(step: int, section: TrainSection) -> float:
    if section.lr_stages:
        ends = accumulate(length for length, _ in section.lr_stages)
        return next((rate for end, (_, rate) in zip(ends, section.lr_stages) if step < end), section.lr_stages[-1][1])
    if section.lr_schedule == "cosine":
        return section.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, step / section.steps)))
    return section.lr
