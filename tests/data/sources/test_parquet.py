"""Parquet: the rows of any writer in order, with no more in memory than a batch."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources.listing import list_inputs
from pipeline.data.sources.parquet import Table
from pipeline.errors import ConfigError, DataError
from tests.conftest import ROOT
from tests.data.sources.test_listing import contents, opened

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


NAMES = [("cat", "dog", "ant")[i] for i in NUMBERS]
NAMED = [(1, 2, 0)[i] for i in NUMBERS]
GAP = [None, *NUMBERS[1:]]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        *((kind, NAMES, NAMED) for kind in ("string", "large_string", "string_view", "binary")),
        *((kind, GAP, GAP) for kind in ("int8", "uint8", "int64", "uint64", "float16", "float32", "float64")),
        ("bool_", [bool(i % 2) for i in range(25)], [i % 2 for i in range(25)]),
        ("string", list(map(str, NUMBERS)), NUMBERS),
        ("string", [f"{i}.0" for i in NUMBERS], NUMBERS),
        ("decimal128", GAP, GAP),
        ("null", [None] * 25, [None] * 25),
    ],
)
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("head", ["label", "Label", "CLASS"])
def test_a_column_of_labels_of_any_type_is_read(tmp_path, kind, values, expected, encoded, head):
    of_type = getattr(pyarrow, kind)
    column = pyarrow.array(values, of_type(4, 1) if kind == "decimal128" else of_type())
    if encoded and kind not in ("null", "float16", "string_view", "binary"):
        column = column.dictionary_encode()
    path = write(tmp_path / "a.parquet", {"image": structs(), head: column})
    assert [label for _, label, *_ in contents([path])] == expected


@pytest.mark.parametrize("head", [" Label Name ", "class-label"])
def test_a_column_of_labels_is_known_by_its_name_without_regard_to_blanks(tmp_path, head):
    path = write(tmp_path / "a.parquet", {"image": structs([b"1", b"2"]), head: ["b", "a"]})
    assert list_inputs([path]).classes == ("a", "b")


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ([[0], [1, 2], []], " is of list<element: int64>"),
        ([{"a": 1}] * 3, " is of struct<a: int64>"),
        ([0.0, 0.5, 1.0], "0.5 in row 1 is not a whole number"),
        ([0, -2, 1], "-2 in row 1 is below -1"),
        (["0", "cat", "1"], "'cat' in row 1 is among numbers such as '0'"),
        ([b"\xff", b"a", b"b"], "row 0 is not UTF-8"),
        ([datetime.date(2020, 1, 1)] * 3, "in row 0 is not one class"),
    ],
)
def test_a_column_of_labels_that_cannot_be_used_is_named(tmp_path, column, reason):
    path = write(tmp_path / "a.parquet", {"image": structs([b"1", b"2", b"3"]), "label": column})
    with pytest.raises(DataError, match=rf"column label.*{reason}.*--labels none"):
        list_inputs([path])
    assert list_inputs([path], "none").classes is None


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"class": [0], "category": [1]}, "class, category may all be the class"),
        ({"label": [0], "Label": [1]}, "two columns have the name"),
    ],
)
def test_several_columns_of_labels_are_told(tmp_path, columns, reason):
    with pytest.raises(DataError, match=reason):
        list_inputs([write(tmp_path / "a.parquet", {"image": structs([b"1"]), **columns})])


def test_the_column_called_label_is_taken_before_others_and_a_table_without_one_says_so(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": structs([b"1"]), "label": [3], "category": ["x"]})
    assert list_inputs([path]).inputs[0].label == 3
    listing = list_inputs([write(tmp_path / "b.parquet", {"image": structs([b"1"]), "species": ["x"]})])
    assert listing.classes is None and listing.labels_from == "b.parquet has no column called label (species)"


def test_a_label_beyond_the_names_is_told(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": structs([b"1", b"2"]), "label": [0, 3]}, hugging_face())
    with pytest.raises(DataError, match="3 in row 1 is beyond the 3 names of classes"):
        list_inputs([path])


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "dictionary", "struct of large", "capital"])
def test_a_column_of_images_of_any_type_is_read(tmp_path, kind):
    column = pyarrow.array(ROWS, getattr(pyarrow, kind)() if "binary" in kind else pyarrow.binary())
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind == "struct of large":
        fields = [("bytes", pyarrow.large_binary()), ("path", pyarrow.large_string())]
        column = pyarrow.array([{"bytes": row, "path": ""} for row in ROWS], pyarrow.struct(fields))
    path = write(tmp_path / "a.parquet", {"Image" if kind == "capital" else "image": column})
    assert [data for *_, data in contents([path])] == ROWS


def test_two_classes_of_one_name_are_told_apart_or_refused(tmp_path):
    def table(name, names):
        columns = {"image": structs([b"%d" % i for i in range(len(names))]), "label": list(range(len(names)))}
        return write(tmp_path / name, columns, hugging_face(names))

    cranes = table("a.parquet", ["crane", "dog", "crane"])
    assert list_inputs([cranes]).classes == ("crane (0)", "dog", "crane (2)")
    assert list_inputs([cranes, table("b.parquet", ["crane", "dog", "crane"])]).classes[2] == "crane (2)"
    joined = list_inputs([cranes, table("c.parquet", ["dog", "cat"])])
    assert joined.classes == ("cat", "crane (0)", "crane (2)", "dog")
    assert [joined.classes[item.label] for item in joined.inputs] == ["crane (0)", "dog", "crane (2)", "dog", "cat"]
    with pytest.raises(ConfigError, match="'crane' is the name of 2 classes of one source and of a class of another"):
        list_inputs([cranes, table("d.parquet", ["dog", "crane"])])
    # A set that was begun before they were told apart goes on.
    begun = list_inputs([cranes], existing_classes=["crane", "dog", "crane"])
    assert begun.classes == ("crane", "dog", "crane") and begun.fingerprint == list_inputs([cranes]).fingerprint


def test_a_table_with_less_than_a_byte_a_row_is_refused(tmp_path):
    for column in (pyarrow.nulls(100_000, pyarrow.binary()), pyarrow.array([b""] * 100_000)):
        with pytest.raises(DataError, match=r"100000 rows in .* so its column image is empty or has equal values only"):
            list_inputs([write(tmp_path / "a.parquet", {"image": column}, row_group_size=100_000)])


def test_rows_are_read_in_any_order_and_from_a_store(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": structs(), "label": NUMBERS}, hugging_face())
    listing, reader = opened([path])
    assert [reader.read(listing.inputs[i]) for i in (24, 3, 11, 3, 0)] == [ROWS[i] for i in (24, 3, 11, 3, 0)]
    with open(path, "rb") as file:
        fsspec.filesystem("memory").pipe("/tables/a.parquet", file.read())
    stored = Table("memory://tables/a.parquet")  # a store of this process, so no other lists it
    entries = stored.entries(labels=True, check_stop=lambda: None)
    assert [(item.name, item.label) for item in listing.inputs] == list(zip(entries.paths, entries.labels))
    assert stored.read(listing.inputs[7]) == ROWS[7]


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
        ({"text": ["a"], "label": [0]}, "no column of bytes is the images: .* text string, label int64"),
        ({"left": [b"a"], "right": [b"b"]}, "several columns may be the images: .* left binary, right binary"),
    ],
)
def test_a_table_without_a_column_of_images_is_told(tmp_path, columns, reason):
    with pytest.raises(DataError, match=reason):
        list_inputs([write(tmp_path / "a.parquet", columns)])


def test_several_columns_of_classes_are_told(tmp_path):
    of_classes = {name: {"_type": "ClassLabel", "names": ["a"]} for name in ("shape", "color")}
    features = {"image": {"_type": "Image"}, **of_classes}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path = write(tmp_path / "a.parquet", {"image": structs([b"1"]), "shape": [0], "color": [0]}, metadata)
    with pytest.raises(DataError, match="shape, color may all be the class"):
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
        Table(path).entries(labels=True, check_stop=lambda: None)


def test_a_table_that_ends_the_process_which_opens_it_is_refused():
    path = ROOT / "tests" / "fuzz/aborts/size-histogram.parquet"  # found by fuzzing: Arrow calls terminate
    with pytest.raises(DataError, match=r"cannot be read as a Parquet table \(Arrow ends its process"):
        list_inputs([str(path)])


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
from pipeline.data.sources.listing import Reader, list_inputs
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
