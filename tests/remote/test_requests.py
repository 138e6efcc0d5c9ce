"""How many requests of a store a set costs: a few a shard when it is written, and a constant number afterwards."""

from __future__ import annotations

import itertools
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config import DataSection
from pipeline.data.loading.batches import Batch, Batches, read_all, read_range
from pipeline.data.loading.order import Order
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError
from pipeline.storage import files
from pipeline.training.datasets import with_cache
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
    assert requests() == {"GET": 8 + 1}
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


def test_later_epochs_and_starts_read_the_cache_of_the_node(
    requests: Callable[[], Counter[str]], tmp_path: Path
) -> None:
    url = shard(300)  # 6 shards
    section = DataSection(shards=url, cache=str(tmp_path / "cache"))
    drawn: list[list[Batch]] = []
    for cached, workers, expected in ((False, 0, None), (True, 0, 12), (True, 2, 0)):
        shards = ShardSet.open(url)
        shards = with_cache(shards, section, lambda line: None) if cached else shards
        order = Order(1, shards.shard_samples, global_batch=120, lanes=4, window=16)
        while requests():  # of shards that the loader before had begun to open
            time.sleep(0.5)
        with Batches(shards, order, rank=0, world_size=1, first_sample=0, workers=workers, flip=False) as batches:
            drawn.append([next(batches) for _ in range(40)])  # more than two epochs
        asked = requests()
        assert expected is None or asked == Counter(GET=expected), asked
    for batch, first, again in zip(*drawn):
        assert batch.images.equal(first.images) and batch.images.equal(again.images)


def test_bytes_that_were_damaged_in_the_store_do_not_stay_in_the_cache(store: Faults, tmp_path: Path) -> None:
    url = shard(900)
    for ending in ("tar", "npy"):
        section = DataSection(shards=url, cache=str(tmp_path / ending))
        shards = with_cache(ShardSet.open(url), section, lambda line: None)
        name = f"{url}/{shards.shards[0].stem}.{ending}"
        data = files.read_bytes(name)
        files.write_bytes(name, data[:2000] + b"damage" + data[2006:])
        with pytest.raises(DataError, match=r"crc32 of the sidecar|sha256 of the index"):
            read_all(shards)
        files.write_bytes(name, data)
        assert len(read_all(shards).images) == 1797


def test_opening_a_shard_costs_two_requests(requests: Callable[[], Counter[str]]) -> None:
    shards = ShardSet.open(shard(300))
    requests()
    read_range(shards, [0, 1, 2])
    assert requests() == {"GET": 2}
