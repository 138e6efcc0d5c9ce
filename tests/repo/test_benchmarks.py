"""The simulated cluster against closed forms, and benchmarks/scale.py in its quick form."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulated_cluster
from benchmarks.cluster_model import Cluster, ReaderModel, Shard, StoreModel, simulate
from pipeline.data.loading.order import Order
from tests.warm import ENVIRONMENT

ROOT = Path(__file__).parents[2]
LATENCY_S = 0.1
EXACT = StoreModel(latency_s=LATENCY_S, spread=0.0, rate=1e9, connection_bps=1e18, node_bps=1e18, total_bps=1e18)


LATE = ReaderModel(opens_ahead=False)


def small(shards: int, **changes: object) -> Cluster:
    """One rank with one lane; shards of 8 samples of 1 KiB, which are one block each, and one step for each shard."""

    def shard(_: int) -> Shard:
        return Shard([1024 * (i + 1) for i in range(8)], 10_240, 480)

    order = Order(1, (8,) * shards, global_batch=8, lanes=1, window=1)
    run = Cluster(order, shard, ranks=1, workers=0, steps=shards, step_s=10.0, decode_s_per_byte=0.0, store=EXACT)
    return replace(run, **changes)


@pytest.mark.parametrize(("asks", "round_trips"), [(True, 3), (False, 2)])
def test_a_shard_opens_in_round_trips_one_after_another(asks: bool, round_trips: int) -> None:
    result = simulate(small(4, reader=replace(LATE, asks_for_size=asks)))
    assert result.waits_s == pytest.approx(round_trips * LATENCY_S)
    assert len(result.log) == 4 * round_trips
    assert result.begun_s == pytest.approx([i * 10.0 + (i + 1) * round_trips * LATENCY_S for i in range(4)])


def test_a_worker_or_an_open_shard_ahead_leaves_only_the_first_wait() -> None:
    for changes in ({"workers": 1, "reader": LATE}, {"reader": ReaderModel()}):
        result = simulate(small(4, **changes))
        assert result.waits_s[0] == pytest.approx([2 * LATENCY_S, 0, 0, 0])


def test_a_store_answers_no_more_than_its_rate() -> None:
    order = Order(1, (8,) * 64, global_batch=512, lanes=64, window=1)
    run = small(64, order=order, ranks=64, steps=1, reader=LATE, store=replace(EXACT, rate=20.0))
    result = simulate(run)
    answered = len(result.log)
    assert answered == 2 * 64 == len(result.arrivals_s) - result.refused
    assert result.refused > 64 and result.begun_s[0] > answered / 20.0 - 1


def test_a_decoder_that_is_too_slow_is_waited_for() -> None:
    result = simulate(small(4, workers=1, reader=LATE, step_s=1.0, decode_s_per_byte=2.0 / 8192))
    assert np.diff(result.begun_s) == pytest.approx(2.0 + 2 * LATENCY_S)


@pytest.mark.parametrize("sizes", [simulated_cluster.equal, simulated_cluster.unequal, simulated_cluster.giant])
def test_each_lane_gives_as_many_samples_a_step_whatever_the_shards(sizes: object) -> None:
    order = Order(1, tuple(map(int, sizes(8, 2) // 16 + 1)), global_batch=32, lanes=8, window=16)  # type: ignore[operator]
    streams = [order.lane_stream(lane, 0) for lane in range(8)]
    for step in range(2 * order.samples // 32):
        positions = [item.position for stream in streams for item in islice(stream, 4)]
        assert sorted(positions) == list(range(32 * step, 32 * (step + 1)))


def test_scale_runs_in_its_quick_form(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--quick", "--most", "1000"]
    options = ["--json", str(tmp_path / "scale.json"), "--plot", str(tmp_path / "scale.svg"), "--work", str(tmp_path)]
    ended = subprocess.run(
        [*command, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "| 1,000 |" in ended.stdout and "without --peers-python" in ended.stdout
    measured = json.loads((tmp_path / "scale.json").read_text())
    assert [row["shards"] for row in measured["reading"]] == [10, 1000]
    assert all(row[name]["seconds"] > 0 for row in measured["reading"] for name in ("open", "order", "batch 0", "show"))
    assert (tmp_path / "scale.svg").read_text().startswith("<svg")
    assert list(tmp_path.glob("scale-*")) == []
