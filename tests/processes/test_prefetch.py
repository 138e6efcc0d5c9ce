"""The thread that goes on while what it gave is worked on: everything arrives, in order, and it ends when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from pipeline.processes.prefetch import prefetch


def counting(count: int, seen: list[int], ended: list[bool]) -> Generator[int, None, None]:
    try:
        for i in range(count):
            seen.append(i)
            yield i
    finally:
        ended.append(True)


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_all_items_arrive_in_order(depth: int) -> None:
    ended: list[bool] = []
    assert list(prefetch(counting(50, [], ended), depth)) == list(range(50))
    assert ended == [True]


def test_no_more_are_taken_than_asked_for() -> None:
    seen: list[int] = []
    items = prefetch(counting(1000, seen, []), 3)
    for given in range(5):
        assert next(items) == given
        time.sleep(0.05)
        assert len(seen) <= given + 1 + 3 + 1  # in hand, waiting, and the one that waits for room
    items.close()


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_closing_ends_the_thread_and_closes_the_source(taken: int) -> None:
    ended: list[bool] = []
    threads = threading.active_count()
    items = prefetch(counting(10**9, [], ended), 2)
    for _ in range(taken):
        next(items)
    items.close()
    assert ended == [True] * bool(taken)  # a generator that never began has nothing to clean up
    assert threading.active_count() == threads


def test_an_error_arrives_after_what_came_before_it() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise ValueError("broken")

    items = prefetch(failing(), 4)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
