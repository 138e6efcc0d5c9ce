"""How many requests of a store a set costs: a few a shard when it is written, and a constant number afterwards."""

from __future__ import annotations

import itertools
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.shard_set import ShardSet
from tests.conftest import ROOT
from tests.launch import ddpm
from tests.remote.faults import Faults

READS, WRITES = ("GET", "HEAD"), ("PUT", "POST", "DELETE")


@pytest.fixture
def requests(store: Faults, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """Counts the requests by method since the last call."""
    seen: list[str] = []
    monkeypatch.setattr(store, "draw", lambda request: seen.append(request) or "")

    def count() -> Counter[str]:
        counted = Counter(request.split()[0] for request in seen)
        seen.clear()
        return counted

    return count


def shard(samples: int, *options: str) -> str:
    url = f"s3://pool/requests-{samples}"
    made = ddpm("shard", ROOT / "shards" / "digits.zip", "--out", url, "--size", 8, "--channels", 1,
                "--shard-samples", samples, "--quiet", *options)  # fmt: skip
    assert made.returncode == 0, made.stderr
    return url


def test_a_shard_costs_three_writes_and_two_reads_and_a_finished_set_none(
    requests: Callable[[], Counter[str]],
) -> None:
    costs: dict[str, list[Counter[str]]] = {"write": [], "again": [], "open": []}
    for samples, shards in ((400, 5), (120, 15)):
        requests()
        url = shard(samples)
        costs["write"].append(requests())
        shard(samples)
        costs["again"].append(requests())
        assert len(ShardSet.open(url).shards) == shards
        costs["open"].append(requests())
    few, many = costs["write"]
    assert sum(many[method] - few[method] for method in WRITES) <= 3 * (15 - 5), costs
    assert sum(many[method] - few[method] for method in READS) <= 2 * (15 - 5), costs
    assert costs["again"][0] == costs["again"][1] and sum(costs["again"][0].values()) <= 25, costs
    assert costs["open"][0] == costs["open"][1] and sum(costs["open"][0].values()) <= 3, costs


def test_a_node_reads_a_table_of_shards_once(
    requests: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    record, url = ShardRecord("big-000000.tar", 1 << 20, "ab" * 32, 1000, "cd" * 32, {}), "s3://pool/table"
    head = {"size": (64, 64), "channels": 3, "classes": None, "source": "", "settings": {}, "counts": {}}
    write_index(url, itertools.repeat(record, 150_000), **head)
    requests()
    with ThreadPoolExecutor(8) as threads:
        sets = list(threads.map(ShardSet.open, [url] * 8))
    assert {shards.samples for shards in sets} == {150_000_000}
    assert requests() == {"HEAD": 8, "GET": 8 + 1}
    assert pickle.loads(pickle.dumps(sets[0])).shards[149_999] == record
    assert requests() == {}


def test_a_part_reads_the_records_of_its_own_shards_only(requests: Callable[[], Counter[str]]) -> None:
    shard(100, "--part", "0/2")  # 9 shards
    requests()
    shard(100, "--part", "0/2")
    again = requests()
    assert again["GET"] < 9 + 15, again
    shard(100, "--part", "1/2")
    second = requests()
    assert second["PUT"] == 3 * 9 + 2, second
