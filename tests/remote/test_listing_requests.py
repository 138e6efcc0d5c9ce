"""A prefix is listed once for all parts of a set, page by page; the other parts read their slice of the list."""

from __future__ import annotations

import fsspec
import pytest

from pipeline.storage import files, remote_walk
from tests.data.shards.test_build import write_images
from tests.launch import ddpm
from tests.remote.faults import Faults

PREFIX = "prefix=listed%2Fin%2F&"


@pytest.fixture
def seen(store: Faults, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    requests: list[str] = []
    monkeypatch.setattr(store, "draw", lambda request: requests.append(request) or "")
    return requests


def listings(seen: list[str]) -> list[str]:
    """Requests for names below the source, other than whether it is a directory."""
    return [request for request in seen if "list-type=2" in request and PREFIX in request and "max-keys" not in request]


OPTIONS = ("--size", 8, "--shard-samples", 10, "--workers", 1, "--quiet")


def part(number: int) -> None:
    done = ddpm("shard", "s3://pool/listed/in", "--out", "s3://pool/listed/set", "--part", f"{number}/4", *OPTIONS)
    assert done.returncode == 0, done.stderr


def test_the_second_of_four_parts_does_not_list_the_prefix_again(seen: list[str], tmp_path) -> None:
    write_images(tmp_path / "in", [f"{i:02}.png" for i in range(40)])
    fsspec.filesystem("s3").put(str(tmp_path / "in") + "/", "s3://pool/listed/in/", recursive=True)
    seen.clear()
    part(0)
    assert len(listings(seen)) == 1, seen
    inventory = [request for request in seen if "/.listing/inputs-" in request]
    assert sum(request.startswith("PUT") for request in inventory) == 1
    for number in (1, 2, 3):
        seen.clear()
        part(number)
        assert listings(seen) == [], seen
        inventory = [request for request in seen if "/.listing/inputs-" in request and request.startswith("GET")]
        assert 1 <= len(inventory) <= 4, inventory
    done = ddpm("shard", tmp_path / "in", "--out", tmp_path / "set", *OPTIONS)
    assert done.returncode == 0, done.stderr
    for path in sorted((tmp_path / "set").glob("*.tar")):
        assert files.read_bytes(f"s3://pool/listed/set/{path.name}") == path.read_bytes()
    assert not files.exists("s3://pool/listed/set/.listing")
    seen.clear()
    part(2)
    assert len(listings(seen)) == 1, "a finished set is compared with its source"


def test_pages_are_what_find_finds_in_as_many_requests(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("s3")
    names = [f"{'ab'[i % 2]}/{i}.jpg" for i in range(25)] + ["é +%2F#.png", "top", "dir/"]
    for name in names:
        store.pipe_file(f"pool/paged/in/{name}", name.encode())
    store.pipe_file("pool/paged/in-beside.jpg", b"")
    call = type(store).call_s3
    monkeypatch.setattr(type(store), "call_s3", lambda *a, **k: call(*a, **k, MaxKeys=10))
    seen.clear()
    pages = list(remote_walk.pages("s3://pool/paged/in"))
    assert len(pages) == len(seen) == 3 and all(len(page) <= 10 for page in pages)
    found = files.find("s3://pool/paged/in")
    together = {name: info for page in pages for name, info in page.items()}
    assert sorted(together) == sorted(found) == sorted(names)
    assert list(together) == sorted(names, key=str.encode), "a store lists in the order in which inputs are sorted"
    for name, info in found.items():
        assert (together[name]["size"], together[name]["ETag"]) == (info["size"], info["ETag"])
    assert list(remote_walk.pages("s3://pool/nothing")) == [{}]
    with pytest.raises(Exception, match="bucket does not exist"):
        list(remote_walk.pages("s3://nobucket/in"))


def test_a_page_that_fails_is_asked_for_again(store: Faults, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    client = fsspec.filesystem("s3")
    for i in range(12):
        client.pipe_file(f"pool/again/{i:02}", b"")
    call = type(client).call_s3
    monkeypatch.setattr(type(client), "call_s3", lambda *a, **k: call(*a, **k, MaxKeys=5))
    failed: list[str] = []

    def draw(request: str) -> str:
        if "continuation-token" in request and not failed:
            failed.append(request)
            return "reset"
        return ""

    monkeypatch.setattr(store, "draw", draw)
    assert [name for page in remote_walk.pages("s3://pool/again") for name in page] == [f"{i:02}" for i in range(12)]
    assert failed
