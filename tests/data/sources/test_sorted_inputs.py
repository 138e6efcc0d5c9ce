"""The sorted list of inputs lies on the disk: what memory held before, and no memory that grows with it."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import fsspec
import pytest

from pipeline.data.sources import listing as listing_module
from pipeline.data.sources import row_file, row_sort, sorted_inputs
from pipeline.data.sources.directory import Directory
from pipeline.data.sources.listing import list_inputs
from pipeline.data.sources.row_sort import Sorter
from pipeline.errors import DataError
from pipeline.storage import files, remote_walk
from tests.data.sources.fingerprint import fingerprint_0_1
from tests.data.sources.test_listing import write_directory, write_zip

LETTERS = ["a", "Z", ".", "-", "/", "é", "\udcff", "\ud83d", "\U0001f600", "\uffff", "10", "9"]
"""Surrogates are what Python makes of names that are not UTF-8."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four rows, and runs of eight, so that a few names need several levels of merging."""
    for module in (row_file, row_sort, sorted_inputs):
        monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(row_sort, "_RUN_ROWS", 8)
    monkeypatch.setattr(row_sort, "_FAN_IN", 3)
    monkeypatch.setattr(row_file, "_IN_MEMORY", 1 << 10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("count", [0, 1, 4, 7, 8, 9, 64, 500])
@pytest.mark.parametrize("order", ["sorted", "random"])
def test_names_are_sorted_as_python_sorts_them(count: int, order: str) -> None:
    chance = random.Random(count)
    names = list({"".join(chance.choices(LETTERS, k=chance.randrange(1, 9))): None for _ in range(count)})
    found = Sorter()
    for name in sorted(names) if order == "sorted" else names:
        found.add(name, len(name), hash(name))
    rows = found.sorted()
    got = [row for block in rows.blocks() for row in zip(block.names, *block.columns[1:3].tolist())]
    assert got == [(name, len(name), hash(name)) for name in sorted(names)] and len(rows) == len(names)
    assert len(found._runs) <= 1 or order == "random"  # nothing to merge
    for first in range(0, len(names), 3):
        part = [name for block in rows.parts(first, min(first + 5, len(names))) for name in block.names]
        assert part == sorted(names)[first : first + 5]


@pytest.mark.usefixtures("small_blocks")
def test_long_names_end_a_run_before_its_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sort, "_RUN_CHARACTERS", 25)
    names, found = [f"{i:06}" for i in range(50)], Sorter()
    for name in names:
        found.add(name, int(name), 0)
    rows = found.sorted()
    assert [name for first in range(50) for block in rows.parts(first, first + 1) for name in block.names] == names


@pytest.mark.usefixtures("small_blocks")
def test_directories_in_order_make_one_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However their files come."""
    made = list[Sorter]()
    done = Sorter.directory_done
    monkeypatch.setattr(Sorter, "directory_done", lambda self: made.append(self) or done(self))
    names = {f"{directory:02}/{i * 7 % 5}.png": b"" for directory in range(9) for i in range(5)}
    listing = list_inputs([write_directory(tmp_path / "in", names)])
    assert [item.name for item in listing.inputs] == sorted(names)
    assert len(made[0]._runs) == 1


@pytest.mark.usefixtures("small_blocks")
def test_many_sources_are_merged_in_their_order(tmp_path) -> None:
    """More than are merged at once; equal names stay in the order of the sources, and the last of an archive counts."""
    urls = []
    for number in range(8):
        place = tmp_path / str(number) / "same"
        urls.append(write_directory(place, {f"{i % 3}/{i}.png": b"x" * number for i in range(number, 11)}))
    listing = list_inputs([*urls, write_zip(tmp_path / "z.zip", {"same/1/4.png": b"", "a.png": b""})])
    keys = [(item.name, item.source) for item in listing.inputs]
    assert keys == sorted(keys) and len(keys) == sum(range(4, 12)) + 2
    assert all(item.size == item.source for item in listing.inputs if item.source < 8)
    assert listing.classes == ("0", "1", "2")
    assert listing.fingerprint == fingerprint_0_1(listing.inputs[:], listing.classes, piece_rows=4)


def test_the_fingerprint_is_that_of_version_0_1(tmp_path) -> None:
    """Over more than one piece, with labels, label files and a member that came twice."""
    files_of = {f"{'ab'[i % 2]}/{i:05d}.jpg": b"" for i in range(9000)} | {"a/00002.json": b"{}", "note.txt": b""}
    directory = write_directory(tmp_path / "many", files_of)
    listing = list_inputs([directory])
    assert len(listing.inputs) == 9002 and listing.classes == ("a", "b")
    assert listing.fingerprint == fingerprint_0_1(listing.inputs[:], listing.classes)
    found = {item.name: item.rejection for item in listing.inputs if item.rejection}
    assert found == {"a/00002.json": ("label_file", "")}
    assert [item.label for item in listing.inputs[4499:4503]] == [0, 0, 1, 1]


class Imagined(Directory):
    """A directory of so many files that are nowhere, in no order."""

    def __init__(self, count: int) -> None:
        super().__init__("/imagined")
        self._count = count

    def _walk(self, found: Sorter, check_stop: Callable[[], None]) -> None:
        for i in range(self._count):
            number = i * 7919 % self._count
            found.add(f"class_{number % 10}/img.{number:09d}.{'txt' if number % 2 else 'jpg'}", i, i)


def peak_bytes(count: int) -> int:
    tracemalloc.start()
    try:
        listing = list_inputs([str(count)], "none")
        assert len(listing.inputs) == count
        assert [item.name for item in listing.inputs[count // 2 : count // 2 + 2]]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_module, "open_sources", lambda names: [Imagined(int(names[0]))])
    for module in (row_file, row_sort, sorted_inputs):
        monkeypatch.setattr(module, "ROWS", 128)
    monkeypatch.setattr(row_sort, "_RUN_ROWS", 1024)
    monkeypatch.setattr(row_file, "_IN_MEMORY", 1 << 14)
    monkeypatch.setattr(row_sort, "_FAN_IN", 4)
    peak_bytes(100)  # modules, and tables that are made once
    few, many = peak_bytes(5_000), peak_bytes(20_000)
    assert many < 1.1 * few + 8 * 20_000 / 128 * 8, (few, many)  # where each block begins


def test_a_full_disk_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def full(*_: object) -> object:
        raise OSError(28, "No space left on device")

    class Full:
        tell, write = staticmethod(lambda: 0), staticmethod(full)

    monkeypatch.setattr(row_sort, "temporary", Full)
    with pytest.raises(DataError, match=r"cannot write .*: no space left: free some"):
        list_inputs([write_directory(tmp_path / "in", {"a.png": b""})])


def test_a_store_is_walked_to_what_find_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    names = ["top.jpg", "a/1.jpg", "a/b/2.jpg", "a/b.jpg", "a b/é.jpg", "z/deep/er/3.jpg"]
    for number, name in enumerate(names):
        store.pipe_file(f"/walked/{name}", bytes(number))
    pages = list(remote_walk.pages("memory://walked"))
    found = {path: info["size"] for page in pages for path, info in page.items()}
    assert found == {path: info["size"] for path, info in files.find("memory://walked").items()}
    assert found == {name: number for number, name in enumerate(names)} and len(pages) > 1
    assert list(remote_walk.pages("memory://nowhere")) == []
