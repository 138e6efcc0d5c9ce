"""Parquet: rows in order, whoever wrote the table, and never more of it in memory than a batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from pipeline.data.images import Rejected
from pipeline.data.sources import list_inputs
from pipeline.errors import ConfigError, DataError
from tests.test_sources import contents, opened

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'ddpm-pipeline[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [b"row %d" % i for i in range(25)]
NUMBERS = [i % 3 for i in range(25)]


def hugging_face(names=("cat", "dog", "ant"), **more):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}, **more}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write(path, columns, metadata=None, **options):
    table = pyarrow.table(columns)
    parquet.write_table(table.replace_schema_metadata(metadata), path, **{"row_group_size": 10, **options})
    return str(path)


def structs(rows=ROWS):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([None if row is None else {"bytes": row, "path": "a.png"} for row in rows], kind)


def test_the_layout_of_hugging_face_gives_rows_in_order_and_named_classes(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": structs(), "label": NUMBERS}, hugging_face())
    found = contents([path])
    assert [data for *_, data in found] == ROWS and [label for _, label, *_ in found] == NUMBERS
    assert [name for name, *_ in found] == [f"{i:02d}" for i in range(25)]
    assert list_inputs([path]).classes == ("cat", "dog", "ant")
    assert {label for _, label, *_ in contents([path], "none")} == {None}


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        (NUMBERS, NUMBERS, ("0", "1", "2")),
        ([("cat", "dog", "ant")[i] for i in NUMBERS], [(1, 2, 0)[i] for i in NUMBERS], ("ant", "cat", "dog")),
        ([-1] * 5 + [None] + NUMBERS[6:], [None] * 6 + NUMBERS[6:], ("0", "1", "2")),
        (None, [None] * 25, None),
    ],
)
@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_plain_columns_are_read_too(tmp_path, kind, labels, expected, classes):
    columns = {"jpg": pyarrow.array(ROWS, getattr(pyarrow, kind)()), "width": [0.5] * 25}
    path = write(tmp_path / "a.parquet", columns if labels is None else {**columns, "class": labels})
    found = contents([path])
    assert [data for *_, data in found] == ROWS and [label for _, label, *_ in found] == expected
    assert list_inputs([path]).classes == classes


def test_rows_are_read_in_any_order_and_from_a_store(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": structs(), "label": NUMBERS}, hugging_face())
    listing, reader = opened([path])
    assert [reader.read(listing.inputs[i]) for i in (24, 3, 11, 3, 0)] == [ROWS[i] for i in (24, 3, 11, 3, 0)]
    with open(path, "rb") as file:
        fsspec.filesystem("memory").pipe("/tables/a.parquet", file.read())
    assert contents(["memory://tables/a.parquet"]) == contents([path])


def test_shards_of_a_table_match_a_pattern_and_join(tmp_path):
    for i in range(2):
        columns = {"image": structs(ROWS[10 * i : 10 * i + 10]), "label": NUMBERS[:10]}
        write(tmp_path / f"train-0000{i}-of-00002.parquet", columns, hugging_face())
    found = contents([f"{tmp_path}/train-*.parquet"])
    assert [data for *_, data in found] == ROWS[:20] and found[10][0] == "train-00001-of-00002.parquet/0"


def test_a_row_without_bytes_is_unreadable_and_the_next_is_not(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": structs([b"1", None, b"3"])})
    listing, reader = opened([path])
    first, second, third = reader.read_ahead(listing.inputs[:])
    assert (first, third) == (b"1", b"3") and isinstance(second, Rejected) and second.reason == "unreadable"


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": ["a"], "label": [0]}, "no column of bytes is the pictures: .* text string, label int64"),
        ({"left": [b"a"], "right": [b"b"]}, "several columns may be the pictures: .* left binary, right binary"),
    ],
)
def test_a_table_without_a_column_of_pictures_is_told(tmp_path, columns, reason):
    with pytest.raises(DataError, match=reason):
        list_inputs([write(tmp_path / "a.parquet", columns)])


def test_several_columns_of_classes_are_told(tmp_path):
    of_classes = {name: {"_type": "ClassLabel", "names": ["a"]} for name in ("shape", "colour")}
    features = {"image": {"_type": "Image"}, **of_classes}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path = write(tmp_path / "a.parquet", {"image": structs([b"1"]), "shape": [0], "colour": [0]}, metadata)
    with pytest.raises(DataError, match="shape, colour may all be the class"):
        list_inputs([path])
    assert len(list_inputs([path], "none").inputs) == 1


def test_a_damaged_table_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, {"image": structs()})
    whole = path.read_bytes()
    for data in (whole[:-20], whole[: len(whole) // 2], b"", b"x" * 5000, whole[:-12] + b"\xff" * 4 + whole[-8:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.parquet cannot be read as a Parquet table") as told:
            list_inputs([str(path)])
        assert "\n" not in str(told.value)


def test_damaged_pages_cost_their_rows(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [os.urandom(2000) for _ in range(30)]
    write(path, {"image": structs(rows)}, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[2000:3000] = bytes(1000)
    path.write_bytes(data)
    listing, reader = opened([str(path)])
    read = list(reader.read_ahead(listing.inputs[:]))
    assert isinstance(read[0], Rejected) and read[10:] == rows[10:]


def test_a_missing_package_is_told_with_its_name(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": structs()})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'ddpm-pipeline\[parquet\]' to read it"):
        list_inputs([path])


def test_going_back_within_a_row_group_finds_the_right_rows(tmp_path):
    rows = [bytes([i]) * (1 << 20) for i in range(20)]
    listing, reader = opened([write(tmp_path / "a.parquet", {"image": structs(rows)}, row_group_size=20)])
    for i in (19, 0, 12, 11):
        assert reader.read(listing.inputs[i]) == rows[i]


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """What Arrow reads ahead takes about 110 MiB of any group."""
    few, many = (_peak_mib(tmp_path / f"{rows}.parquet", rows) for rows in (96, 288))
    assert many - few < 64  # of 192 MiB more
    assert many < 165  # of 288


def _peak_mib(path, rows):
    """What reading one row group of as many MiB adds to the most that a process held."""
    column = structs([np.random.default_rng(i).bytes(1 << 20) for i in range(rows)])
    url = write(path, {"image": column}, row_group_size=1000, compression="none", write_batch_size=8)
    script = f"""
from pipeline.data.sources import Reader, list_inputs
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
listing = list_inputs([{url!r}])
before = peak()
reader = Reader(listing.sources)
assert sum(len(reader.read(item)) for item in listing.inputs) == {rows} << 20
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024
