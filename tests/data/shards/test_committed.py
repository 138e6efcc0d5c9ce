"""The count of a set that several processes draw: right for each of them, and cheap to ask for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.data.shards import committed
from pipeline.data.shards.committed import CommittedSeeds
from pipeline.data.shards.seeds import parse_seeds
from pipeline.storage import files
from tests.data.shards.test_sample_set import draw, sample_set

ASKED = parse_seeds("2-29,40")  # 2 + 6 · 4 + 2 + 1 seeds in shards of 4


def test_each_process_counts_what_all_have_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committed, "_SHARE_OF_TIME", math.inf)  # the next look may follow at once
    first, second = sample_set(str(tmp_path)), sample_set(str(tmp_path))
    draw(first, "0-2", only=[0])  # an earlier command, with two seeds that this one does not ask for
    counts = [CommittedSeeds(target, ASKED, target.check(), every_s=0) for target in (first, second)]
    assert [count.count for count in counts] == [1, 1]
    draw(first, "2-29,40", only=[0, 3, 10])
    requests: list[str] = []
    for name in ("listdir", "read_json"):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda url, name=name, real=real: requests.append(name) or real(url))
    for count in counts:
        count.look()
        assert count.count == 2 + 4 + 1
    assert requests == ["listdir", *["read_json"] * 3] * 2
    del requests[:]
    counts[0].look()
    assert requests == ["listdir"]  # complete shards are not read again


def test_images_count_before_they_are_committed_and_only_once(tmp_path: Path) -> None:
    target = sample_set(str(tmp_path))
    draw(target, "2-3", only=[0])
    count = CommittedSeeds(target, ASKED, target.check(), every_s=0)
    seen = []
    for seed, _ in count.counted(0, ((seed, None) for seed in range(4))):  # the whole shard is drawn anew
        seen.append((seed, count.count))
    assert seen == [(0, 2), (1, 2), (2, 2), (3, 2)]
    for seed, _ in count.counted(1, ((seed, None) for seed in range(4, 8))):
        assert count.count == 2 + seed - 3
    draw(target, "4-7", only=[1])
    count.look()  # another process has been faster
    assert count.count == 6
    count.note(1, range(4, 8))
    assert count.count == 6


def test_looks_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, target = [0.0], sample_set(str(tmp_path))
    monkeypatch.setattr("pipeline.data.shards.committed.time.monotonic", lambda: now[0])
    looks: list[float] = []

    def slow(url: str) -> list[str]:
        looks.append(now[0])
        now[0] += 2.0  # seconds for a listing
        return []

    count = CommittedSeeds(target, ASKED, {}, every_s=10)
    monkeypatch.setattr(files, "listdir", slow)
    for _ in range(1000):
        count.look()
        now[0] += 0.1
    assert len(looks) == 3 and looks[0] >= 10 and looks[1] - looks[0] >= 40


def test_a_store_that_cannot_be_read_does_not_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = CommittedSeeds(sample_set(str(tmp_path)), ASKED, {}, every_s=0)

    def failing(url: str) -> list[str]:
        raise OSError("gone")

    monkeypatch.setattr(files, "listdir", failing)
    count.look()
    assert count.count == 0
