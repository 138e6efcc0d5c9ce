"""`storage` on a real S3 server, well and failing; and what a user is told of a place that is not there."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from uuid import uuid4

import fsspec
import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.storage import files
from tests.conftest import ROOT
from tests.launch import ENVIRONMENT, ddpm
from tests.remote.faults import Faults


@pytest.fixture
def place(store: Faults, request: pytest.FixtureRequest) -> str:
    return f"s3://pool/{request.node.name}"  # not random, as what fails depends on it


def test_names_and_removal_keep_to_themselves(place: str) -> None:
    for name in ("f", "f2", "tree/a", "tree/sub/b", "tree2/a", "x*", "x1"):
        files.write_bytes(files.join(place, name), b"1")
    assert files.listdir(place) == ["f", "f2", "tree", "tree2", "x*", "x1"]
    assert files.listdir(files.join(place, "tree")) == ["a", "sub"]
    assert files.is_dir(files.join(place, "tree")) and not files.is_dir(files.join(place, "f"))
    for name in ("f", "tree", "x*", "none"):
        files.remove(files.join(place, name))
    assert files.listdir(place) == ["f2", "tree2", "x1"]
    assert files.free_bytes(place) is None
    with pytest.raises(FileNotFoundError):
        files.open_read(files.join(place, "f"))


def test_listings_are_fresh(place: str) -> None:
    """fsspec remembers listings, and others write too."""
    files.write_bytes(files.join(place, "a"), b"1")
    assert files.listdir(place) == ["a"]
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(f"{place}/b", b"22")
    assert files.listdir(place) == ["a", "b"] and files.exists(f"{place}/b") and files.size(f"{place}/b") == 2
    other.rm_file(f"{place}/a")
    assert files.listdir(place) == ["b"] and not files.exists(f"{place}/a")


def test_every_byte_is_read_in_its_place_whatever_fails(place: str, faulty: Faults) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    url, before = files.join(place, "x"), files.retries()
    with files.publishing(url) as file:
        file.write(data)
    assert files.read_bytes(url) == data
    cuts = [0, 1, 100, 99_999, 100_000, 1_500_000, len(data)]
    with files.open_read(url) as file:
        assert [file.read(b - a) for a, b in pairwise(cuts)] == [data[a:b] for a, b in pairwise(cuts)]
        assert file.read(1) == b""
        for offset in (2_999_990, 5, 1_234_567, 1_234_000, 0):
            file.seek(offset)
            assert file.read(2_000) == data[offset : offset + 2_000]
        assert file.seek(-10, 2) == len(data) - 10 and file.read() == data[-10:]
    assert files.retries() > before


def test_small_samples_do_not_cost_a_request_each(place: str, store: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    draw = store.draw
    monkeypatch.setattr(store, "draw", lambda request: (asked.append(request), draw(request))[1])
    files.write_bytes(files.join(place, "x"), bytes(1_000_000))
    with files.open_read(files.join(place, "x"), 100_000) as file:
        for _ in range(900):
            assert len(file.read(1_000)) == 1_000
    assert len(asked) < 10, asked
    starts = sorted(int(r.split("bytes=")[1].split("-")[0]) for r in asked if "bytes=" in r)
    assert starts[0] == 100_000, "and nothing before the offset is read"


def test_the_next_range_is_under_way_while_the_last_is_consumed_and_no_byte_comes_twice(
    place: str, store: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, ranges = np.random.default_rng(1).bytes(20 << 20), list[tuple[int, int]]()
    files.write_bytes(files.join(place, "x"), data)
    monkeypatch.setattr(store, "draw", lambda request: ranges.append(_range(request)) or "")
    with files.open_read(files.join(place, "x"), 0, len(data)) as file:
        for start in range(0, len(data), 5 << 20):
            assert file.read(5 << 20) == data[start : start + (5 << 20)]
            consumed, deadline = start + (5 << 20), time.monotonic() + 20
            while max(end for _, end in ranges) < min(consumed + (1 << 20), len(data)):
                assert time.monotonic() < deadline, "nothing is read ahead"
                time.sleep(0.01)
            assert max(end for _, end in ranges) <= consumed + 2 * (4 << 20)
    # The last range asks for a byte more, to notice a longer file.
    assert sum(end - start for start, end in ranges) == len(data) + 1 and len(ranges) <= 11


def _range(request: str) -> tuple[int, int]:
    start, end = request.split("bytes=")[1].split("-")
    return int(start), int(end) + 1


def test_exactly_one_of_many_creates_a_file(place: str, faulty: Faults) -> None:
    faulty.rate = 0.4  # few requests, of which the uploads are to fail too
    for round in range(5):
        url = files.join(place, str(round))
        together = threading.Barrier(6)

        def attempt(data: bytes, url: str = url, together: threading.Barrier = together) -> bool:
            together.wait()
            return files.create(url, data)

        values = [uuid4().bytes for _ in range(6)]
        with ThreadPoolExecutor(6) as threads:
            made = list(threads.map(attempt, values))
        assert made.count(True) == 1
        assert files.read_bytes(url) == values[made.index(True)]


def test_a_creation_whose_answer_was_lost_counts(place: str, store: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repeated request finds the file there, and it is its own."""
    fates = ["answer lost"]
    monkeypatch.setattr(store, "draw", lambda request: fates.pop() if fates and request.startswith("PUT") else "")
    assert files.create(files.join(place, "x"), b"mine")
    assert not fates
    assert not files.create(files.join(place, "x"), b"yours")
    assert files.read_bytes(files.join(place, "x")) == b"mine"


def test_a_store_that_never_answers_is_given_up(place: str, store: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes(files.join(place, "x"), b"1")
    monkeypatch.setenv("DDPM_IO_TIMEOUT", "1")
    monkeypatch.setattr(store, "draw", lambda request: time.sleep(20) or "")
    with pytest.raises(
        DataError, match=rf"^cannot read {place}/x: FSTimeoutError: tried for 1 s; run the same command"
    ):
        files.read_bytes(files.join(place, "x"))


# --- mistakes of the user ---


def _refused(job: str, *arguments: object) -> str:
    """The one line with which a command refuses a place, with exit code 3."""
    done = ddpm(job, *arguments)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("retrying ")]
    assert done.returncode == 3 and len(lines) == 1, done.stderr
    return lines[0]


def test_a_missing_bucket_is_one_line(store: Faults) -> None:
    advice = "correct the address, or make the bucket"
    reason = f"cannot read s3://nobucket/x: The specified bucket does not exist: {advice}"
    assert reason in _refused("verify", "s3://nobucket/x")
    assert reason in _refused("shard", ROOT / "shards" / "digits.zip", "--size", 8, "--out", "s3://nobucket/x")
    for look in (files.exists, files.is_dir, files.listdir, files.open_read, files.remove):
        with pytest.raises(DataError, match=rf"^cannot (read|remove) s3://nobucket/x: .*{advice}$"):
            look("s3://nobucket/x")
    for write in (files.write_bytes, files.create, _publish):
        with pytest.raises(DataError, match=rf"^cannot write s3://nobucket/x: .*{advice}$"):
            write("s3://nobucket/x", b"1")


def _publish(url: str, data: bytes) -> None:
    with files.publishing(url) as file:
        file.write(data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "DDPM_IO_TIMEOUT": "2"},
            "tried for 2 s; run the same command again",
        ),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "Unable to locate credentials: give some"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, "Invalid endpoint: nonsense: correct the address"),
    ],
    ids=["dead endpoint", "no key", "no endpoint"],
)
def test_a_store_that_cannot_be_used_is_one_line(
    store: Faults, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], reason: str
) -> None:
    for name, value in changes.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    assert reason in _refused("verify", "s3://pool/set")
