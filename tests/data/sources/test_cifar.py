"""The published CIFAR files: exact pixels and classes, and no program in a pickle runs."""

from __future__ import annotations

import io
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sources.listing import list_inputs
from pipeline.errors import DataError
from tests.data.sources.test_listing import contents

TEN = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
EXPECTED = PIXELS.transpose(0, 2, 3, 1)


def python_2(value):
    """A pickle as Python 2 wrote them, protocol 2: its strings are bytes, its arrays of `numpy.core.multiarray`."""
    if isinstance(value, bytes):
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
    if isinstance(value, int):
        return b"M" + struct.pack("<H", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python_2(key) + python_2(part) for key, part in value.items()) + b"u"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R"
    dtype = b"cnumpy\ndtype\nU\2u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    rows, width = value.shape
    shape = python_2(rows) + python_2(width) + b"\x86"
    return made + b"(K\1" + shape + dtype + b"\x89" + python_2(value.tobytes()) + b"tb"


def pickled(value):
    return b"\x80\2" + python_2(value) + b"."


def write_python(directory, batches, meta, hundred=False):
    directory.mkdir()
    kind = b"fine_labels" if hundred else b"labels"
    for name, (first, last) in batches.items():
        data = PIXELS[first:last].reshape(last - first, -1)
        batch = {b"batch_label": name.encode(), kind: list(range(first, last)), b"data": data, b"filenames": [b"a.png"]}
        (directory / name).write_bytes(pickled(batch))
    (directory / ("meta" if hundred else "batches.meta")).write_bytes(pickled(meta))
    return directory


def write_binary(directory, batches, names, hundred=False):
    directory.mkdir()
    for name, (first, last) in batches.items():
        head = [bytes([1, i]) if hundred else bytes([i]) for i in range(first, last)]
        (directory / name).write_bytes(b"".join(h + PIXELS[i].tobytes() for h, i in zip(head, range(first, last))))
    place = directory / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    place.write_bytes(b"\n".join(names) + b"\n\n")
    return directory


def all_pixels(found):
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for *_, data in found])


SPLIT = {"data_batch_1": (0, 3), "test_batch": (3, 6)}
HUNDRED = [b"class %d" % i for i in range(100)]


def directories(tmp_path):
    """Folder, and the names of its classes."""
    bin_split = {f"{name}.bin": rows for name, rows in SPLIT.items()}
    ten, hundred = [name.decode() for name in TEN], [name.decode().replace(" ", "_") for name in HUNDRED]
    names = [name.encode() for name in hundred]
    python, binary = tmp_path / "cifar-100-python", tmp_path / "cifar-100-binary"
    return [
        (write_python(tmp_path / "cifar-10-batches-py", SPLIT, {b"label_names": TEN}), ten),
        (write_binary(tmp_path / "cifar-10-batches-bin", bin_split, TEN), ten),
        (write_python(python, {"test": (0, 3), "train": (3, 6)}, {b"fine_label_names": names}, True), hundred),
        (write_binary(binary, {"test.bin": (0, 3), "train.bin": (3, 6)}, names, True), hundred),
    ]


def test_the_published_directories_give_exact_pixels_and_named_classes(tmp_path):
    for directory, names in directories(tmp_path):
        listing = list_inputs([str(directory)])
        found = contents([str(directory)])
        assert [item.label for item in listing.inputs] == [0, 1, 2, 3, 4, 5]
        assert list(listing.classes) == names
        np.testing.assert_array_equal(all_pixels(found), EXPECTED)
        assert contents([str(directory)], "none")[0][1] is None


def test_single_batches_and_patterns_of_them(tmp_path):
    python = write_python(tmp_path / "py", SPLIT, {b"label_names": TEN})
    binary = write_binary(tmp_path / "bin", {"data_batch_1.bin": (0, 6)}, TEN)
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "test_batch.bin"
    alone.write_bytes((binary / "data_batch_1.bin").read_bytes())
    np.testing.assert_array_equal(all_pixels(contents([str(python / "data_batch_1")])), EXPECTED[:3])
    np.testing.assert_array_equal(all_pixels(contents([str(python / "*_batch*")])), EXPECTED)
    np.testing.assert_array_equal(all_pixels(contents([str(alone)])), EXPECTED)
    assert list_inputs([str(alone)]).classes == ("0", "1", "2", "3", "4", "5")


def test_a_batch_pickled_by_python_3_is_read_too(tmp_path):
    batch = {"labels": [1, 0], "data": PIXELS[:2].reshape(2, -1)}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=4))
    np.testing.assert_array_equal(all_pixels(contents([str(tmp_path / "test_batch")])), EXPECTED[:2])


class Calls:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_no_program_in_a_pickle_is_run(tmp_path, protocol):
    sprung = tmp_path / "sprung"
    traps = [Calls(os.system, f"touch {sprung}"), Calls(eval, f"open({str(sprung)!r}, 'w')")]
    traps += [
        Calls(open, str(sprung), "w"),
        Calls(getattr, "a", "upper"),
        Calls(np.memmap, str(sprung), "u1", "w+", 0, (1,)),
    ]
    for trap in traps:
        for place in ({"labels": [0], "data": trap}, [trap], trap):
            (tmp_path / "test_batch").write_bytes(pickle.dumps(place, protocol=protocol))
            with pytest.raises(DataError, match=r"not a CIFAR batch .*it asks for .*, which is not run") as told:
                list_inputs([str(tmp_path / "test_batch")])
            assert "\n" not in str(told.value)
    assert not sprung.exists()


def test_a_pickle_cannot_call_numpy(tmp_path):
    """Its arrays and types are stand-ins: one that asks for a petabyte, or a type that is not, gets neither."""
    for data in (np.zeros((1, 3072), object), np.zeros((1, 3072), np.float32), np.zeros((2, 99), np.uint8)):
        (tmp_path / "test_batch").write_bytes(pickle.dumps({"labels": [0], "data": data}, protocol=4))
        with pytest.raises(DataError, match="not a CIFAR batch: it holds labels, data"):
            list_inputs([str(tmp_path / "test_batch")])
    huge = b"\x80\2}(U\6labels]U\4datacnumpy\nndarray\n\x8a\6" + (10**12).to_bytes(6, "little") + b"\x85Ru."
    (tmp_path / "test_batch").write_bytes(huge)
    with pytest.raises(DataError, match="not a CIFAR batch"):
        list_inputs([str(tmp_path / "test_batch")])


def test_a_batch_cut_short_is_refused(tmp_path):
    directory = write_python(tmp_path / "py", {"data_batch_1": (0, 3)}, {b"label_names": TEN})
    whole = (directory / "data_batch_1").read_bytes()
    for end in range(2, len(whole), 97):
        (directory / "data_batch_1").write_bytes(whole[:end])
        with pytest.raises(DataError, match="data_batch_1 is not a CIFAR batch"):
            list_inputs([str(directory / "data_batch_1")])
    binary = write_binary(tmp_path / "bin", {"data_batch_1.bin": (0, 3)}, TEN) / "data_batch_1.bin"
    binary.write_bytes(binary.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"\(9218 bytes\) is not a CIFAR batch: these are rows of 3073 or 3074 bytes"):
        list_inputs([str(binary)])
