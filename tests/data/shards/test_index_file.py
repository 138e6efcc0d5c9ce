"""`index.json` of both versions: a list of the shards, or a head with a table beside it."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.loading.batches import Batches, read_all
from pipeline.data.loading.order import Order
from pipeline.data.shards import index_file
from pipeline.data.shards.index_file import TABLE, write_index
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.settings import IndexSettings, ShardSettings
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.shards.verify import verify
from pipeline.errors import DataError
from pipeline.index import index
from pipeline.shard import shard
from pipeline.storage.mapped_file import FileReference
from tests.data.shards.test_shard_set import write_set

NUMBERS, HASHES = 3 * 8, 2 * 32  # bytes a shard in the columns of numbers and of hashes


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of three shards get a table."""
    monkeypatch.setattr(index_file, "MAX_LISTED", 2)


@pytest.fixture
def listed(tmp_path: Path) -> ShardSet:
    """The set of `with_table`, of version 1."""
    return write_set(tmp_path / "listed")


@pytest.fixture
def with_table(tmp_path: Path, listed: ShardSet, small_limit: None) -> ShardSet:
    return write_set(tmp_path / "table")


def table_of(shards: ShardSet) -> Path:
    (path,) = (path for path in Path(shards.url).iterdir() if TABLE.fullmatch(path.name))
    return path


def test_both_versions_say_the_same(listed: ShardSet, with_table: ShardSet) -> None:
    versions = [json.loads((Path(shards.url) / "index.json").read_text())["version"] for shards in (listed, with_table)]
    assert versions == [1, 2]
    assert list(with_table.shards) == list(listed.shards) and with_table.shards == listed.shards
    assert (with_table.sha256, with_table.samples, with_table.settings) == (listed.sha256, 9, listed.settings)
    assert with_table.shards[-1] == listed.shards[2] and with_table.shards[:2] == listed.shards[:2]
    assert tuple(with_table.shard_samples) == (3, 3, 3) and with_table.shards.ends.tolist() == [3, 6, 9]
    with pytest.raises(IndexError):
        with_table.shards[3]
    assert read_all(with_table).images.equal(read_all(listed).images)
    assert verify(with_table.url) == verify(listed.url) == []


def test_the_table_is_as_the_format_page_describes_it(with_table: ShardSet, listed: ShardSet) -> None:
    data, shards = table_of(with_table).read_bytes(), list(listed.shards)
    numbers = np.frombuffer(data[: 3 * NUMBERS], "<u8").reshape(3, 3)
    assert numbers[0].tolist() == [3, 3, 3] and numbers[1].tolist() == [record.bytes for record in shards]
    names = data[3 * (NUMBERS + HASHES) :]
    assert names == b"".join(record.name.encode() for record in shards) and numbers[2].tolist()[-1] == len(names)
    assert data[3 * NUMBERS :][: 3 * HASHES].hex() == "".join(
        [record.sha256 for record in shards] + [record.sidecar_sha256 for record in shards]
    )


def test_a_worker_gets_a_reference_to_the_table(listed: ShardSet, with_table: ShardSet) -> None:
    order = Order(7, with_table.shard_samples, global_batch=3, lanes=3, window=4)
    data = pickle.dumps((with_table, order))
    assert bytes.fromhex(listed.shards[0].sha256) not in data
    copy, copied_order = pickle.loads(data)
    assert copy == with_table and tuple(copied_order.shard_samples) == (3, 3, 3)
    found = []
    for shards, workers in ((listed, 0), (with_table, 2)):
        order = Order(7, shards.shard_samples, global_batch=3, lanes=3, window=4)
        with Batches(shards, order, rank=0, world_size=1, first_sample=0, workers=workers, flip=False) as batches:
            found.append([next(batches).images for _ in range(7)])
    assert all(one.equal(other) for one, other in zip(*found))


def test_the_table_of_an_older_index_is_removed(with_table: ShardSet, tmp_path: Path) -> None:
    old = table_of(with_table)
    write_set(tmp_path / "table", samples=12)
    assert table_of(with_table) != old and len(ShardSet.open(with_table.url).shards) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "does not have the sha256 of the index"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"set-", b"sat-")), "does not have the sha256"),
    ],
)
def test_a_damaged_table_is_refused(with_table: ShardSet, change, message: str) -> None:
    change(table_of(with_table))
    with pytest.raises(DataError, match=message) as error:
        ShardSet.open(with_table.url)
    assert "make the set again with --overwrite" in str(error.value) and "\n" not in str(error.value)
    assert verify(with_table.url) == [str(error.value)]


def rewrite(shards: ShardSet, data: bytes, **head: object) -> None:
    """Another table with the hash that the index says, as somebody who wants to do harm could write it."""
    path = table_of(shards)
    path.write_bytes(data)
    file = Path(shards.url) / "index.json"
    index = json.loads(file.read_text())
    index["shards"]["sha256"], index["shards"]["bytes"] = hashlib.sha256(data).hexdigest(), len(data)
    file.write_text(json.dumps({**index, **head}))


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: number(4) + data[8:], "`samples` is not the sum over the shards"),
        (lambda data: number(2**63) + number(2**63 + 3) + data[16:], "more samples than fit into the bytes"),
        (lambda data: data[:24] + number(2**60) + data[32:], "more samples than fit|damaged"),
        (lambda data: data[:48] + number(30) + data[56:], "another size than its columns need"),
        (lambda data: data + b"x", "another size than its columns need"),
        (lambda data: data[:100], "another size than its columns need"),
    ],
)
def test_impossible_numbers_in_a_table_are_refused(with_table: ShardSet, change, message: str) -> None:
    rewrite(with_table, change(table_of(with_table).read_bytes()))
    with pytest.raises(DataError, match=message):
        ShardSet.open(with_table.url)


@pytest.mark.parametrize(
    "name", [b"../../etc/pass.tar", b"/etc/passwords.tar", b"s3://bucke/xxxx.ta", b"set-000000.\xff\xff\xff"]
)
def test_a_name_that_leads_out_of_the_set_is_not_opened(with_table: ShardSet, name: bytes) -> None:
    data = table_of(with_table).read_bytes()
    rewrite(with_table, data.replace(b"set-000000.tar", name[:14].ljust(14, b"r")))
    shards = ShardSet.open(with_table.url)
    with pytest.raises(DataError, match=r"outside of the set|not UTF-8"):
        shards.tar(0)
    assert shards.shards[1].name == "set-000001.tar"


@pytest.mark.parametrize(
    "head",
    [
        {"shards": None}, {"shards": {}}, {"shards": {"table": "../x.bin"}},
        {"shards": {"table": "index-table-0123456789ab.bin", "sha256": "x"}}, {"version": 3}, {"places": 5},
    ],
)  # fmt: skip
def test_a_head_that_is_not_one_is_refused(with_table: ShardSet, head: dict[str, object]) -> None:
    file = Path(with_table.url) / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **head}))
    with pytest.raises(DataError, match=r"is not the index of a shard set|has format 3, this program reads 1 and 2"):
        ShardSet.open(with_table.url)


def test_jobs_make_read_join_and_remove_sets_with_tables(tmp_path: Path, small_limit: None) -> None:
    source = Path(__file__).parents[3] / "shards" / "digits.zip"
    settings = ShardSettings(size=(8, 8), channels=1, shard_samples=300)
    whole, parts = tmp_path / "whole", [tmp_path / f"part{i}" for i in range(2)]
    made = shard([str(source)], str(whole), settings, workers=1, quiet=True)
    assert made.shards == 6 and len(ShardSet.open(str(whole)).shards) == 6 and verify(str(whole)) == []
    again = shard([str(source)], str(whole), settings, workers=1, quiet=True)
    assert again.shards_made == 0
    for i, part in enumerate(parts):
        shard([str(source)], str(part), settings, workers=1, part=f"{i}/2", quiet=True)
    index([str(part) for part in parts], str(tmp_path / "joined"), IndexSettings(), quiet=True)
    joined = ShardSet.open(str(tmp_path / "joined"))
    assert table_of(joined) and joined.tar_locations == ("../part0/", "../part1/")
    assert read_all(joined).images.equal(read_all(ShardSet.open(str(whole))).images) and verify(joined.url) == []
    shutil.move(parts[1], tmp_path / "moved")
    with pytest.raises(DataError, match="missing"):
        read_all(joined)
    shard(
        [str(source)],
        str(whole),
        settings.model_copy(update={"shard_samples": 900}),
        workers=1,
        overwrite=True,
        quiet=True,
    )
    assert not any(TABLE.fullmatch(path.name) for path in whole.iterdir())


def test_many_shards_are_opened_without_a_copy_of_their_table(tmp_path: Path) -> None:
    one = ShardRecord("big-000000.tar", 1 << 20, "ab" * 32, 1000, "cd" * 32, {})
    count = 200_000
    head = {"size": (64, 64), "channels": 3, "classes": None, "source": "", "settings": {}, "counts": {}}
    write_index(str(tmp_path), itertools.repeat(one, count), **head)
    shards = ShardSet.open(str(tmp_path))
    assert shards.samples == 1000 * count and isinstance(shards.shards.file, FileReference)
    assert len(pickle.dumps(shards)) < 1000
    assert not shards.shards.samples.flags.owndata and not shards.shards.hashes.flags.owndata
