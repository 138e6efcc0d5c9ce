"""The model of benchmarks/simulated_cluster.py sends the requests of the real loader, one by one."""

from __future__ import annotations

import time

import pytest

from benchmarks import simulated_cluster
from benchmarks.counting_store import Request
from tests.remote.faults import Faults


class Recorder:
    """The requests that come to the store of these tests."""

    def __init__(self, store: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
        self.latency_s = 0.0
        self._taken: list[Request] = []
        monkeypatch.setattr(store, "draw", self._draw)

    def _draw(self, request: str) -> str:
        method, path, ranged = request.split(" ", 2)
        self._taken.append(Request(0.0, method, path, ranged))
        time.sleep(self.latency_s)
        return ""

    def take(self) -> list[Request]:
        taken, self._taken = self._taken, []
        return taken


def test_the_model_sends_the_requests_of_the_loader(store: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = simulated_cluster.check(Recorder(store, monkeypatch), latency_s=0.02)
    assert checked["equal"], checked
    assert checked["requests"] > 30
    # The time depends on the machine, which other tests use too; the benchmark prints it with a longer latency.
    assert 1 / 3 < checked["seconds"] / checked["predicted_seconds"] < 3, checked
