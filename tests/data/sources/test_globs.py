"""Patterns: all images that match are one source, local or remote; an existing name is no pattern."""

from __future__ import annotations

import fsspec
import pytest

from pipeline.data.sources.listing import list_inputs
from pipeline.errors import ConfigError
from tests.data.sources.test_listing import contents, write_directory, write_tar, write_zip

FILES = {"cat/1.jpg": b"1", "cat/2.png": b"2", "dog/1.jpg": b"3", "dog/old/4.jpg": b"4", "notes.txt": b"5"}


@pytest.fixture(params=["local", "store"])
def place(request, tmp_path):
    """A directory with the files, local or on a store."""
    if request.param == "local":
        return str(tmp_path / "set")
    store = fsspec.filesystem("memory")
    store.rm("/patterns", recursive=True) if store.exists("/patterns") else None
    return "memory://patterns"


def fill(place, files):
    if place.startswith("memory://"):
        fsspec.filesystem("memory").pipe({f"/patterns/{name}": data for name, data in files.items()})
    else:
        write_directory(place, files)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*/*.jpg", [("cat/1.jpg", 0, b"1"), ("dog/1.jpg", 1, b"3")]),
        ("**/*.jpg", [("cat/1.jpg", 0, b"1"), ("dog/1.jpg", 1, b"3"), ("dog/old/4.jpg", 2, b"4")]),
        ("cat/[0-1].*", [("1.jpg", None, b"1")]),
        ("cat/?.png", [("2.png", None, b"2")]),
        ("{cat,dog}/1.jpg", [("cat/1.jpg", 0, b"1"), ("dog/1.jpg", 1, b"3")]),
        ("{cat,dog}/*.jpg", [("cat/1.jpg", 0, b"1"), ("dog/1.jpg", 1, b"3")]),
        ("dog/{1,old/4}.jpg", [("1.jpg", None, b"3"), ("old/4.jpg", 0, b"4")]),
        ("dog/**", [("1.jpg", None, b"3"), ("old/4.jpg", 0, b"4")]),
        ("no*.txt", [("notes.txt", None, b"5")]),
    ],
)
def test_a_pattern_is_one_source_and_its_directories_are_classes(place, pattern, expected):
    fill(place, FILES)
    url = f"{place}/{pattern}"
    assert [(name, label, data) for name, label, _, data in contents([url])] == expected
    assert len(list_inputs([url]).sources) == 1


@pytest.mark.parametrize("pattern", ["*.gif", "{cat,cow}/1.jpg", "cat/[7-9].jpg", "part-{0..3}.tar"])
def test_a_pattern_without_a_match_is_an_error(place, pattern):
    fill(place, FILES)
    with pytest.raises(ConfigError, match="nothing matches: check the name"):
        list_inputs([f"{place}/{pattern}"])


def test_a_server_out_of_reach_is_mentioned():
    with pytest.raises(ConfigError, match=r"check the name, and that its server answers$"):
        list_inputs(["http://127.0.0.1:9/x-{0..1}.tar"])


def test_braces_that_do_not_close_are_an_error_or_a_name(tmp_path):
    with pytest.raises(ConfigError, match=r"a\{b: "):
        list_inputs([str(tmp_path / "a{b")])


def test_an_existing_name_is_no_pattern(tmp_path):
    for name in ("[ab]", "a*", "x{1,2}", "a?b"):
        write_directory(tmp_path / name, {"1.png": name.encode()})
    write_directory(tmp_path / "a", {"1.png": b"matched by the pattern"})
    for name in ("[ab]", "a*", "x{1,2}", "a?b"):
        assert [data for *_, data in contents([str(tmp_path / name)])] == [name.encode()]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1[0].png").write_bytes(b"brackets")
    assert [data for *_, data in contents([str(tmp_path / "set" / "1[0].png")])] == [b"brackets"]


def test_archives_and_directories_that_match_are_sources_of_their_own(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"train-{i:06d}.tar", {f"{i}.png": b"%d" % i})
    for pattern in ("train-{000000..000002}.tar", "train-*.tar"):
        names = [name for name, *_ in contents([f"{tmp_path}/{pattern}"])]
        assert names == [f"train-{i:06d}.tar/{i}.png" for i in range(3)]
    write_zip(tmp_path / "b.zip", {"z.png": b"z"})
    write_directory(tmp_path / "folder", {"cat/f.png": b"f"})
    (tmp_path / "single.png").write_bytes(b"s")
    found = [name for name, *_ in contents([f"{tmp_path}/*"])]
    assert {"b.zip/z.png", "folder/cat/f.png", f"{tmp_path.name}/single.png"} < set(found) and len(found) == 6


def test_images_named_one_by_one_are_as_their_pattern(tmp_path):
    directory = write_directory(tmp_path / "set", FILES)
    spelt_out = contents([f"{directory}/cat/1.jpg", f"{directory}/dog/1.jpg"])
    assert spelt_out == contents([f"{directory}/*/1.jpg"])
    assert [name for name, *_ in contents([f"{directory}/cat/1.jpg"])] == ["1.jpg"]


def test_a_pattern_in_the_current_directory(tmp_path, monkeypatch):
    write_directory(tmp_path, FILES)
    monkeypatch.chdir(tmp_path)
    assert [name for name, *_ in contents(["*/1.jpg"])] == ["cat/1.jpg", "dog/1.jpg"]
    assert [name for name, *_ in contents(["cat/1.jpg", "dog/old/4.jpg"])] == [
        "cat/1.jpg",
        "dog/old/4.jpg",
    ]


def test_single_images_of_a_store(tmp_path):
    fsspec.filesystem("memory").pipe({"/singles/cat/1.jpg": b"1", "/singles/dog/2.jpg": b"2"})
    found = contents(["memory://singles/cat/1.jpg", "memory://singles/dog/2.jpg"])
    assert [(name, label) for name, label, *_ in found] == [("cat/1.jpg", 0), ("dog/2.jpg", 1)]
