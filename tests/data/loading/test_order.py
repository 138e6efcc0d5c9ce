"""The order of the data: each law derived from whole epochs and whole lanes, never from the windowed arithmetic."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from hashlib import blake2b
from itertools import groupby, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loading import order as order_module
from pipeline.data.loading.order import (
    Item,
    Order,
    Place,
    allowed_worlds,
    check_world,
    default_lanes,
    rank_lanes,
    shuffled,
)
from pipeline.errors import ConfigError, DataError
from pipeline.keyed_random import Use, uniforms

settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("quick")


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Empty shards, shards of one, fewer samples than a batch or than lanes, windows of one and beyond a lane."""
    shards = draw(st.lists(st.one_of(st.sampled_from([0, 0, 1]), st.integers(0, 40)), min_size=1, max_size=9))
    if sum(shards) == 0:
        shards.append(draw(st.integers(1, 5)))
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    return Order(
        seed=draw(st.integers(0, 2**63)),
        shard_samples=tuple(shards),
        global_batch=lanes * draw(st.integers(1, 5)),
        lanes=lanes,
        window=draw(st.sampled_from([1, 2, 3, 7, 30, 1000])),
    )


def all_places(order: Order) -> list[Place]:
    return [Place(shard, row) for shard, rows in enumerate(order.shard_samples) for row in range(rows)]


def first_items(order: Order, count: int) -> list[Item]:
    """Positions [0, count), each taken from its lane."""
    streams = [order.lane_stream(lane, 0) for lane in range(order.lanes)]
    return [next(streams[position % order.lanes]) for position in range(count)]


def lane_epochs(order: Order, lane: int, items: int) -> list[list[Item]]:
    """A lane's first items, cut where an epoch ends."""
    epochs: dict[int, list[Item]] = {}
    for item in islice(order.lane_stream(lane, 0), items):
        epochs.setdefault(item.position // order.samples, []).append(item)
    return list(epochs.values())


@given(orders())
def test_every_epoch_gives_every_sample_exactly_once(order: Order) -> None:
    items = first_items(order, 3 * order.samples)
    assert [item.position for item in items] == list(range(3 * order.samples))
    for epoch in range(3):
        places = [item.place for item in items[epoch * order.samples : (epoch + 1) * order.samples]]
        assert sorted(places) == all_places(order)


@given(orders(), st.data())
def test_a_lane_started_anywhere_continues_as_if_never_stopped(order: Order, data: st.DataObject) -> None:
    lane, start = data.draw(st.integers(0, order.lanes - 1)), data.draw(st.integers(0, 60))
    unbroken = islice(order.lane_stream(lane, 0), start, start + 40)
    resumed = islice(order.lane_stream(lane, start), 40)
    assert [item[:2] for item in resumed] == [item[:2] for item in unbroken]


@given(orders(), st.data())
def test_a_new_start_reads_again_fewer_samples_than_the_window(order: Order, data: st.DataObject) -> None:
    lane, start = data.draw(st.integers(0, order.lanes - 1)), data.draw(st.integers(0, 60))
    epoch = (lane + order.lanes * start) // order.samples

    def reads(items: list[Item]) -> Counter[Place]:
        return Counter(place for item in items if item.position // order.samples == epoch for place in item.reads)

    rest = 2 + order.samples // order.lanes
    whole = list(islice(order.lane_stream(lane, 0), start + rest))
    before, after = reads(whole[:start]), reads(list(islice(order.lane_stream(lane, start), rest)))
    assert (before | after) == reads(whole), "nothing is left out, nothing beyond the lane's slice is read"
    assert (before & after).total() < order.window
    given_before = {item.place for item in whole[:start] if item.position // order.samples == epoch}
    assert not given_before & after.keys()


@given(orders(), st.integers(0, 11))
def test_a_reader_goes_forwards_reads_once_and_holds_less_than_the_window(order: Order, lane: int) -> None:
    for items in lane_epochs(order, lane % order.lanes, 80):
        held: set[Place] = set()
        path: list[Place] = []
        for item in items:
            path += item.reads
            held.update(item.reads)
            held.remove(item.place)
            assert len(held) < order.window
        assert len(path) == len(set(path))
        assert len({place.shard for place in path}) == len([*groupby(path, key=lambda place: place.shard)])
        assert all(b.row == a.row + 1 for a, b in pairwise(path) if a.shard == b.shard)


@given(orders(), st.integers(0, 11))
def test_no_sample_moves_as_far_as_the_window(order: Order, lane: int) -> None:
    straight = Order(order.seed, order.shard_samples, order.global_batch, order.lanes, window=1)
    for mixed, plain in zip(
        lane_epochs(order, lane % order.lanes, 80)[:-1], lane_epochs(straight, lane % order.lanes, 80)[:-1]
    ):
        unmoved = {item.place: i for i, item in enumerate(plain)}
        assert unmoved.keys() == {item.place for item in mixed}
        assert all(abs(i - unmoved[item.place]) < order.window for i, item in enumerate(mixed))


@pytest.mark.parametrize("window", [1, 5, 1000, 1024, 3000])
@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 5000])
def test_windowed_shuffle_is_the_argsort_of_the_whole_lane(length: int, window: int) -> None:
    u = uniforms(9, torch.arange(length), Use.LANE_ORDER).numpy()
    whole = np.argsort(np.arange(length) + window * u, kind="stable")
    for start in {0, 1, 700, 1023, 1024, 1030, 2047, 2048, length // 2, length - 1} & {*range(length)}:
        pieces = list(shuffled(9, length, window, start))
        np.testing.assert_array_equal(np.concatenate([gives for _, gives in pieces]), whole[start:])
        np.testing.assert_array_equal(np.concatenate([reads for reads, _ in pieces]), np.sort(whole[start:]))


def test_how_many_keys_are_drawn_together_does_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(3, (700, 0, 1, 1500), global_batch=8, lanes=2, window=16)
    expected = first_items(order, 3000)
    monkeypatch.setattr(order_module, "_DRAWN_TOGETHER", 1)
    assert first_items(order, 3000) == expected


def test_the_order_is_frozen() -> None:
    """Values of the first version. They hold for every numpy, torch and hash seed: a change would reorder old runs."""
    assert np.concatenate([g for _, g in shuffled(1, 20, 8, 0)]).tolist() == GOLDEN_SHUFFLE
    order = Order(seed=7, shard_samples=(5, 0, 3, 9), global_batch=6, lanes=3, window=4)
    assert [tuple(item.place) for item in first_items(order, 2 * 17)] == GOLDEN_PLACES
    large = Order(seed=2**63, shard_samples=(1000,) * 50, global_batch=64, lanes=16, window=256)
    places = np.array([item.place for item in first_items(large, 120_000)], dtype="<i8")
    assert blake2b(places.tobytes(), digest_size=16).hexdigest() == GOLDEN_HASH


GOLDEN_SHUFFLE = [1, 2, 0, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 15, 18, 14, 16, 19, 17]
GOLDEN_PLACES = [
    *[(3, 0), (3, 7), (0, 4), (3, 1), (3, 8), (2, 0), (3, 2), (3, 6), (0, 3), (3, 4), (0, 0), (2, 1), (3, 3), (0, 1)],
    *[(2, 2), (3, 5), (0, 2), (3, 3), (2, 0), (0, 3), (3, 4), (2, 1), (0, 4), (3, 5), (2, 2), (3, 0), (3, 7), (0, 1)],
    *[(3, 2), (3, 6), (0, 2), (3, 1), (3, 8), (0, 0)],
]
GOLDEN_HASH = "cd45561831575ccb65d0fda10eb9fed6"


def test_epochs_and_seeds_permute_the_shards_differently() -> None:
    """Also (seed, epoch + 1) and (seed + 1, epoch), which collide where the two are added."""
    permutations = set()
    for seed in range(4):
        order = Order(seed, (2,) * 20, global_batch=1, lanes=1, window=1)  # nothing moves within the lane
        permutations |= {tuple(item.place for item in items) for items in lane_epochs(order, 0, 4 * 40)}
    assert len(permutations) == 16


def test_seeds_epochs_and_lanes_shuffle_differently_within_the_window() -> None:
    patterns = set()
    for seed in range(3):
        order = Order(seed, (600,), global_batch=4, lanes=4, window=32)
        for lane in range(4):
            epochs = lane_epochs(order, lane, 3 * 150)
            assert [len(items) for items in epochs] == [150] * 3
            patterns |= {tuple(item.place.row - 150 * lane for item in items) for items in epochs}
    assert len(patterns) == 3 * 4 * 3


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_in_a_batch_are_unrelated(seed: int) -> None:
    order = Order(seed, (100,) * 400, global_batch=128, lanes=64, window=64)
    for epoch in range(2):
        items = first_items(order, (epoch + 1) * order.samples)[epoch * order.samples :]
        ids = np.array([item.place.shard * 100 + item.place.row for item in items], dtype=np.float64)
        # There are 400 shards, each in one piece: the correlation of independent ids would spread by 400**-0.5 = 0.05.
        assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.2


def test_starting_costs_the_same_in_a_hundred_million_samples() -> None:
    tracemalloc.start()
    try:
        for start in (0, 777_777, 123_456_789):
            order = Order(0, (10_000,) * 10_000, global_batch=256, lanes=64, window=256)
            items = list(islice(order.lane_stream(5, start), 100))
            assert items[0].position == 5 + 64 * start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20  # a lane's share of the samples alone would be 12 MB of int64


def test_global_batch_may_change_between_two_starts() -> None:
    small, large = (Order(1, (30, 30), global_batch=g, lanes=4, window=8) for g in (4, 12))
    consumed = 24
    for lane in range(4):
        assert [*islice(small.lane_stream(lane, consumed // 4), 9)] == [
            *islice(large.lane_stream(lane, consumed // 4), 9)
        ]


@pytest.mark.parametrize(
    ("global_batch", "lanes"), [(1, 1), (12, 12), (64, 64), (128, 64), (96, 48), (67, 1), (130, 26)]
)
def test_default_lanes_are_the_largest_divisor_up_to_64(global_batch: int, lanes: int) -> None:
    assert default_lanes(global_batch) == lanes


@pytest.mark.parametrize("lanes", [1, 4, 12, 60, 64])
def test_ranks_share_the_lanes_in_order_and_equally(lanes: int) -> None:
    for world_size in range(1, lanes + 3):
        if world_size in allowed_worlds(lanes):
            shares = [rank_lanes(lanes, rank, world_size) for rank in range(world_size)]
            assert [lane for share in shares for lane in share] == list(range(lanes))
            assert len({len(share) for share in shares}) == 1
        else:
            with pytest.raises(ConfigError):
                check_world(lanes, world_size)


def test_a_world_that_cannot_share_the_lanes_is_refused_with_the_worlds_that_can() -> None:
    with pytest.raises(ConfigError) as refused:
        check_world(12, 8)
    assert str(refused.value) == (
        "8 ranks cannot share data.lanes=12: run with 1, 2, 3, 4, 6, 12 ranks, or start a new run with data.lanes "
        "(a divisor of train.global_batch) a multiple of 8"
    )


def test_an_impossible_order_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes=5 does not divide train\.global_batch=12: .* such as 12"):
        Order(0, (10,), global_batch=12, lanes=5, window=1)
    with pytest.raises(ConfigError, match=r"data\.window=0 must be at least 1"):
        Order(0, (10,), global_batch=12, lanes=4, window=0)
    with pytest.raises(DataError, match="holds no sample"):
        Order(0, (0, 0), global_batch=12, lanes=4, window=1)
