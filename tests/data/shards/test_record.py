"""Which files an index may name, and that the sets of `ddpm index`, older ones too, go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.shards import verify
from pipeline.data.shards.index_file import tar_locations
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import DataError
from pipeline.untrusted import MAX_LOCATIONS, is_allowed, locations_of
from tests.attacks import PNG
from tests.jobs import index, shard


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / f"in/{i}.png").write_bytes(PNG)
    for i in range(2):
        shard([str(tmp_path / "in")], str(tmp_path / f"part{i}"), size=8, shard_samples=2, workers=1, part=f"{i}/2",
              labels="none", quiet=True)  # fmt: skip
    return tmp_path


def _without_places(out: Path) -> None:
    told = json.loads((out / "index.json").read_text())
    del told["places"]
    (out / "index.json").write_text(json.dumps(told))


@pytest.mark.parametrize("is_old", [False, True])
def test_a_joined_set_names_its_parts_and_opens(parts: Path, is_old: bool, capsys: pytest.CaptureFixture[str]) -> None:
    out = parts / "joined"
    index([str(parts / "part0"), str(parts / "part1")], str(out), quiet=True)
    assert json.loads((out / "index.json").read_text())["places"] == ["../part0/", "../part1/"]
    if is_old:
        _without_places(out)
    assert ShardSet.open(str(out)).tar_locations == ("../part0/", "../part1/")
    assert "reads tars in ../part0/, ../part1/" in capsys.readouterr().err
    assert not verify.verify(str(out))


@pytest.mark.parametrize("is_old", [False, True])
def test_an_indexed_set_continues(parts: Path, is_old: bool) -> None:
    for tar in parts.glob("part*/*.tar"):
        (parts / "there").mkdir(exist_ok=True)
        (parts / "there" / tar.name).write_bytes(tar.read_bytes())
    index([str(parts / "there")], str(parts / "set"), quiet=True, workers=1)
    if is_old:
        _without_places(parts / "set")
    assert not verify.verify(str(parts / "set"))


def test_a_recorded_place_binds(parts: Path) -> None:
    out = parts / "joined"
    index([str(parts / "part0"), str(parts / "part1")], str(out), quiet=True)
    told = json.loads((out / "index.json").read_text())
    told["places"] = ["../part0/"]
    (out / "index.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match=r"part1/part1-000001.tar, outside of the set"):
        ShardSet.open(str(out))


@pytest.mark.parametrize(
    "name, allowed, expected",
    [
        ("a-000000.tar", [], True),
        ("below/a.tar", [], True),
        ("../x/a.tar", ["../x/"], True),
        ("../x/y/a.tar", ["../x/"], True),
        ("../xy/a.tar", ["../x/"], False),
        ("../x/../../etc/a", ["../x/"], False),
        ("../../x/a.tar", ["../"], False),
        ("/data/a.tar", ["/data/"], True),
        ("/data//a.tar", ["/data/"], False),
        ("./a.tar", ["./"], False),
        ("/data/a.tar", [], False),
        ("s3://b/x/a.tar", ["s3://b/x/"], True),
        ("s3://b/x/../y/a.tar", ["s3://b/x/"], False),
        ("s3://b/y/a.tar", ["s3://b/x/"], False),
        ("http://b/x/a.tar", ["https://b/x/"], False),
        ("https://b/x/a.tar?download=true", ["https://b/x/"], True),
        ("https://b/x/a::b.tar", ["https://b/x/"], True),
        ("simplecache::s3://b/x/a.tar", ["simplecache::s3://b/x/"], False),
        ("zip://a.tar::/data/x.zip", ["zip://"], False),
        ("s3://b/x/a.tar::file:///etc", ["s3://b/x/"], False),
        ("file:///data/a.tar", [], False),
        ("a\0.tar", [], False),
        ("", [""], False),
        (7, ["7/"], False),
    ],
)
def test_a_name_is_allowed_only_where_it_is_recorded(name: Any, allowed: list[str], expected: bool) -> None:
    assert is_allowed(name, allowed) is expected


def test_places_are_few_and_hold_their_tars() -> None:
    names = [f"s3://bucket/run{i}/part{i % 7}/a-000000.tar" for i in range(500)] + ["../a/b.tar", "c.tar", "/d/e.tar"]
    found = locations_of(names)
    assert len(found) <= MAX_LOCATIONS and all(is_allowed(name, found) for name in names)
    assert locations_of(["a.tar", "b/c.tar"]) == []


@pytest.mark.parametrize(
    "url, name, sidecar, is_read",
    [
        ("/sets/joined", "../part0/a-000000.tar", None, True),
        ("/sets/joined", "../part0/a-000000.tar", "a-000000.npy", False),
        ("/sets/joined", "../part0/passwd", None, False),
        ("/sets/joined", "http://host/a-000000.tar", None, False),
        ("s3://b/joined", "s3://b/part0/a-000000.tar", None, True),
        ("s3://b/joined", "s3://other/part0/a-000000.tar", None, False),
    ],
)
def test_an_old_set_of_parts_is_distinguished_from_one_that_leads_elsewhere(
    url: str, name: str, sidecar: str | None, is_read: bool
) -> None:
    told: dict[str, Any] = {"settings": {}}
    if is_read:
        assert len(tar_locations(url, told, [(name, sidecar)], "index.json")) == 1
    else:
        with pytest.raises(DataError, match="outside of the set"):
            tar_locations(url, told, [(name, sidecar)], "index.json")
