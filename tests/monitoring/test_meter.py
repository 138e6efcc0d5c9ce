"""Figures between two log lines, against losses put in by hand."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.monitoring.meter import Meter

CPU = torch.device("cpu")
FLOPS = 5e9


def alone(values: Tensor) -> Tensor:
    return values


def test_losses_are_averaged_for_all_timesteps_and_by_quartile() -> None:
    meter = Meter(1000, CPU, FLOPS)
    t = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    meter.add(torch.tensor([1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]), t, torch.tensor(2.0))
    meter.add(torch.tensor([5.0]), torch.tensor([100]), torch.tensor(4.0))
    figures = meter.read(alone, 8)
    assert figures["train/loss"] == pytest.approx((4444 + 5) / 9)
    assert {name: value for name, value in figures.items() if "_t" in name} == {
        "train/loss_t0000-0249": 3.0,
        "train/loss_t0250-0499": 20.0,
        "train/loss_t0500-0749": 200.0,
        "train/loss_t0750-0999": 2000.0,
    }
    assert figures["train/grad_norm"] == 3.0


@pytest.mark.parametrize("timesteps", [2, 3, 5, 10, 999, 1000])
def test_each_timestep_is_in_the_quartile_that_its_name_says(timesteps: int) -> None:
    for t in {0, 1, timesteps // 4, timesteps // 2, 3 * timesteps // 4, timesteps - 1}:
        meter = Meter(timesteps, CPU, FLOPS)
        meter.add(torch.tensor([7.0]), torch.tensor([t]), torch.tensor(0.0))
        ((name, value),) = [(name, value) for name, value in meter.read(alone, 1).items() if "_t" in name]
        first, last = name.removeprefix("train/loss_t").split("-")
        assert int(first) <= t <= int(last) < timesteps
        assert value == 7.0


def test_values_that_are_not_finite_are_ignored() -> None:
    meter = Meter(100, CPU, FLOPS)
    losses = torch.tensor([1.0, float("nan"), float("inf"), 3.0])
    meter.add(losses, torch.tensor([0, 0, 99, 0]), torch.tensor(float("nan")))
    meter.add(torch.tensor([2.0]), torch.tensor([0]), torch.tensor(6.0))
    figures = meter.read(alone, 4)
    assert figures["train/loss"] == 2.0
    assert figures["train/loss_t0000-0024"] == 2.0
    assert "train/loss_t0075-0099" not in figures  # no figure rather than a wrong one
    assert figures["train/grad_norm"] == 6.0  # of the steps that have one


def test_a_value_that_was_never_finite_has_no_figure() -> None:
    meter = Meter(100, CPU, FLOPS)
    meter.add(torch.tensor([float("nan")]), torch.tensor([0]), torch.tensor(float("inf")))
    figures = meter.read(alone, 1)
    assert figures.keys() == {"speed/images_per_s", "speed/data_wait_share", "speed/tflop_per_s"}
    assert figures["speed/images_per_s"] > 0


def test_all_ranks_count_and_bfloat16_losses_are_summed_exactly() -> None:
    meter = Meter(4, CPU, FLOPS)
    for _ in range(3000):  # a bfloat16 sum would stop at 256
        meter.add(torch.ones(1, dtype=torch.bfloat16), torch.tensor([0]), torch.tensor(0.0))
    figures = meter.read(
        lambda values: values + torch.tensor([[0.0, 9000.0, 0, 0], [0, 1000.0, 0, 0]]), 1
    )  # another rank's
    assert figures["train/loss_t0000-0000"] == 1.0
    assert figures["train/loss_t0001-0001"] == 9.0
    assert figures["train/loss"] == 3.0


def test_reading_starts_anew() -> None:
    meter = Meter(4, CPU, FLOPS)
    meter.add(torch.tensor([8.0]), torch.tensor([0]), torch.tensor(8.0))
    meter.read(alone, 1)
    assert not {"train/loss", "train/grad_norm"} & meter.read(alone, 1).keys()
    meter.add(torch.tensor([2.0]), torch.tensor([3]), torch.tensor(1.0))
    figures = meter.read(alone, 1)
    assert (figures["train/loss"], figures["train/grad_norm"]) == (2.0, 1.0)


def test_speed_leaves_pauses_out() -> None:
    started = time.perf_counter()
    meter = Meter(4, CPU, FLOPS)
    for _ in range(2):
        time.sleep(0.025)
        with meter.waiting():
            time.sleep(0.025)
        meter.add(torch.tensor([1.0]), torch.tensor([0]), torch.tensor(1.0))
    with meter.paused():
        time.sleep(0.3)
    figures = meter.read(alone, 10)
    working_s = 20 / figures["speed/images_per_s"]
    assert 0.1 <= working_s <= time.perf_counter() - started - 0.3
    assert 0.05 / working_s <= figures["speed/data_wait_share"] <= 1 - 0.05 / working_s
    assert figures["speed/tflop_per_s"] == pytest.approx(2 * FLOPS / working_s / 1e12)
    assert "speed/mfu" not in figures  # what a CPU can do at most is not known


def waits(share: float) -> dict[str, float]:
    return {"speed/data_wait_share": share}


def advised(*shares: float, workers: int = 0, shards: str = "/data/cats", retries: float = 0) -> list[str | None]:
    meter, told = Meter(4, CPU, FLOPS), []
    for share in shares:
        meter.read(alone, 1)
        told.append(meter.slow_loader_advice(waits(share), workers=workers, shards=shards, retries=retries))
    return told


def test_a_slow_loader_gives_advice_once_and_not_while_its_queue_fills() -> None:
    first, second, third, fourth = advised(0.9, 0.2, 0.5, 0.5)
    assert first is second is fourth is None
    assert third is not None and third.startswith("50% of the time is spent waiting for data; ")


@pytest.mark.parametrize(("options", "cause"), [
    ({}, r"raise data\.workers from 0: there are \d+ cores for each process$"),
    ({"shards": "s3://b/cats"}, r"raise data\.workers from 0: .*, and s3://b/cats is far away$"),
    ({"workers": 4096}, r"4096 workers share \d+ cores: give the job more cores, or shard at the size trained on$"),
    ({"shards": "s3://b/cats", "retries": 3.0}, r"3 reads were repeated: copy s3://b/cats to nearer or more reliable "),
])  # fmt: skip
def test_advice_names_the_likely_cause(options: dict[str, Any], cause: str) -> None:
    told = advised(0.1, 0.5, **options)[1]
    assert told is not None and re.search(cause, told)
