"""The inventory is the listing that it was made of, or none: never another one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.data.sources import inventory
from pipeline.data.sources.inventory import Inventory
from pipeline.data.sources.listing import Listing, Reader, list_inputs
from pipeline.errors import DataError
from tests.data.sources.test_listing import write_directory, write_zip

ALL = (0, 1)


@pytest.fixture
def source(tmp_path: Path) -> str:
    names = [f"{'ab'[i % 2]}/{i:04d}.jpg" for i in range(40)]
    return write_directory(tmp_path / "in", {**{name: name.encode() for name in names}, "a/0002.txt": b"x"})


def published(out: Path, source: str, labels: str = "folder") -> tuple[Inventory, Listing]:
    made, listing = Inventory(str(out), [source], labels), list_inputs([source], labels)
    made.publish(listing)
    return made, listing


def test_it_is_the_same_listing(tmp_path: Path, source: str) -> None:
    made, listing = published(tmp_path / "out", source)
    read = made.open(ALL, listing.fingerprint)
    assert read is not None and list(read.inputs) == list(listing.inputs) and read.inputs[7:9] == listing.inputs[7:9]
    for name in ("classes", "fingerprint", "bytes", "rows_without_input", "labels_from"):
        assert getattr(read, name) == getattr(listing, name), name
    assert Reader(read.sources).read(read.inputs[0]) == b"a/0000.jpg"


def test_it_is_of_these_sources_and_labels_only(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, listing = published(tmp_path / "out", source)
    assert Inventory(str(tmp_path / "out"), [source], "none").open(ALL, None) is None
    assert Inventory(str(tmp_path / "out"), [source + "/a"], "folder").open(ALL, None) is None
    assert Inventory(str(tmp_path / "out"), [source], "folder").open(ALL, "other inputs") is None
    monkeypatch.chdir(tmp_path)
    assert Inventory(str(tmp_path / "out"), ["in"], "folder").open(ALL, listing.fingerprint) is not None
    labels = tmp_path / "labels.csv"
    labels.write_text("0000.jpg,1\n")
    published(tmp_path / "out", source, str(labels))
    assert Inventory(str(tmp_path / "out"), [source], str(labels)).open(ALL, None) is not None
    labels.write_text("0000.jpg,10\n")
    assert Inventory(str(tmp_path / "out"), [source], str(labels)).open(ALL, None) is None


def test_inputs_of_the_part_that_have_changed_are_noticed(tmp_path: Path, source: str) -> None:
    made, _ = published(tmp_path / "out", source)
    for number in range(0, 32, 2):
        os.utime(f"{source}/a/{number:04d}.jpg", (1, 1))
    assert made.open((0, 2), None) is None and made.open((1, 2), None) is not None


def test_a_link_to_nowhere_is_no_change(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "in", {"b.jpg": b""})
    os.symlink("nowhere", f"{source}/a.jpg")
    made, _ = published(tmp_path / "out", source)
    assert made.open(ALL, None) is not None


def test_an_inventory_cut_or_changed_anywhere_is_refused(tmp_path: Path, source: str) -> None:
    made, listing = published(tmp_path / "out", source)
    (path,) = (tmp_path / "out" / ".listing").iterdir()
    data, expected = path.read_bytes(), list(listing.inputs)
    refused = 0
    for at in range(0, len(data), 13):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]):
            path.write_bytes(damaged)
            try:
                read = made.open(ALL, listing.fingerprint)
                assert read is None or list(read.inputs) == expected, at
                refused += read is None
            except DataError as error:
                assert "the list of inputs is damaged" in str(error)
                refused += 1
    assert refused > len(data) / 13 * 1.5
    path.write_bytes(data)
    assert made.open(ALL, listing.fingerprint) is not None


def test_only_whole_directories_have_one(tmp_path: Path, source: str) -> None:
    assert inventory.is_possible([source], "folder") and inventory.is_possible([source, source + "/a"], "none")
    archive = write_zip(tmp_path / "a.zip", {"a.png": b""})
    for others in ([archive], [source, archive], [f"{source}/*"], [f"{source}/a/0000.jpg"], ["https://host/images"]):
        assert not inventory.is_possible(others, "folder"), others
    assert not inventory.is_possible([source], str(tmp_path / "no.csv"))


def test_removing_it_twice_is_no_error(tmp_path: Path, source: str) -> None:
    published(tmp_path / "out", source)
    for _ in range(2):
        inventory.remove(str(tmp_path / "out"))
        assert list((tmp_path / "out").iterdir()) == []
