"""Sources on a web server: names are decoded, queries are removed, and `::` is part of a name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.sources import urls
from pipeline.data.sources.listing import Listing, Reader, list_inputs
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files
from tests.data.sources.test_listing import write_directory, write_tar, write_zip
from tests.remote.website import Website

FILES = {
    "big cats/1.png": b"1",
    "big cats/a#b.png": b"2",
    "dogs/a::b.png": b"3",
    "dogs/a+b.png": b"4",
    "dogs/50%.png": b"5",
    "dogs/ä.png": b"6",
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Website]:
    """Serves FILES under pics/."""
    write_directory(tmp_path / "pics", FILES)
    with Website(tmp_path) as served:
        yield served


def read(sources: list[str]) -> dict[str, tuple[str | None, bytes]]:
    """Name → class and bytes."""
    listing: Listing = list_inputs(sources)
    reader, classes = Reader(listing.sources), listing.classes or ()
    items = [listing.inputs[i] for i in range(len(listing.inputs))]
    return {item.name: (None if item.label is None else classes[item.label], reader.read(item)) for item in items}


def test_a_pattern_matches_what_the_server_lists(site):
    assert read([f"{site.url}/pics/*/*.png"]) == {name: (name.split("/")[0], data) for name, data in FILES.items()}
    assert read([f"{site.url}/pics/dogs/a*.png"]) == {"a::b.png": (None, b"3"), "a+b.png": (None, b"4")}
    assert read([f"{site.url}/pics/{{dogs/a+b,big%20cats/1}}.png"]) == {
        "dogs/a+b.png": ("dogs", b"4"),
        "big cats/1.png": ("big cats", b"1"),
    }
    with pytest.raises(ConfigError, match="nothing matches"):
        read([f"{site.url}/pics/dogs/*.gif"])


@pytest.mark.parametrize(
    ("path", "name", "data"),
    [
        ("big%20cats/a%23b.png", "a#b.png", b"2"),
        ("big cats/a#b.png", "a#b.png", b"2"),
        ("dogs/a::b.png", "a::b.png", b"3"),
        ("dogs/a%3A%3Ab.png", "a::b.png", b"3"),
        ("dogs/a+b.png?x=y", "a+b.png", b"4"),
        ("dogs/50%25.png?to=/a/b.zip", "50%.png", b"5"),
        ("dogs/%C3%A4.png", "ä.png", b"6"),
    ],
)
def test_one_file_by_its_url(site, path, name, data):
    assert read([f"{site.url}/pics/{path}"]) == {name: (None, data)}


def test_archives_with_a_query(site, tmp_path):
    write_zip(tmp_path / "a b.zip", {"c0/1.png": b"z"})
    write_tar(tmp_path / "b.tar", {"c0/1.png": b"t"})
    write_tar(tmp_path / "c.tar.gz", {"c0/1.png": b"g"})
    for name, data in (("a%20b.zip", b"z"), ("b.tar", b"t"), ("c.tar.gz", b"g")):
        assert read([f"{site.url}/{name}?download=true&to=/x/y.png"]) == {"c0/1.png": ("c0", data)}
    together = read([f"{site.url}/a%20b.zip?a=1", f"{site.url}/b.tar?b"])
    assert set(together) == {"a b.zip/c0/1.png", "b.tar/c0/1.png"}


@pytest.mark.parametrize(
    "url",
    [
        "zip://1.png::http://127.0.0.1:9/a.zip",
        "simplecache::http://127.0.0.1:9/1.png",
        "http://127.0.0.1:9/a.png::file:///etc/passwd",
        "zip://1.png::/tmp/a.zip",
        "zip://1.png",
    ],
)
def test_chains_of_file_systems_are_refused(url):
    with pytest.raises((ConfigError, DataError)) as caught:
        list_inputs([url])
    assert "give the path of the file itself" in str(caught.value) and "\n" not in str(caught.value)


def test_a_chain_is_never_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"s")
    files.write_bytes("memory://chains/a::b.png", b"m")
    assert files.read_bytes("memory://chains/a::b.png") == b"m"
    with pytest.raises(ConfigError):
        files.exists(f"memory://chains/x::file://{tmp_path}/secret.png")


def test_names_are_decoded_where_they_stay_names():
    assert urls.names(["a%20b/c%2Fd.png", "%2e%2e/x", "e%0a.png", "%E9.png", "f.png?x=/y"]) == {
        "a%20b/c%2Fd.png": "a b/c%2Fd.png",
        "%2e%2e/x": "%2e%2e/x",
        "e%0a.png": "e%0a.png",
        "%E9.png": "%E9.png",
        "f.png?x=/y": "f.png",
    }
    assert urls.names(["get?id=1", "get?id=2", "a b", "a%20b"]) == {
        one: one for one in ("get?id=1", "get?id=2", "a b", "a%20b")
    }
    assert len(set(urls.names(["a%2520b", "a%20b", "a b"]).values())) == 3
    assert urls.name("s3://bucket/a%20b?c") == "a%20b?c"
