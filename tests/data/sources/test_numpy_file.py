"""Arrays: every pixel is read, row by row; an array of something else is refused in one line."""

from __future__ import annotations

import io
import pickle
import zipfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources.listing import Reader, list_inputs
from pipeline.data.sources.numpy_file import image_file
from pipeline.errors import DataError
from tests.data.sources.test_listing import contents, opened


def random(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


LAYOUTS = {
    "grey": ((5, 7, 6), lambda row: row),
    "grey, a channel": ((5, 7, 6, 1), lambda row: row[..., 0]),
    "colour": ((5, 7, 6, 3), lambda row: row),
    "transparent": ((5, 7, 6, 4), lambda row: row),
    "grey, channel first": ((5, 1, 7, 6), lambda row: row[0]),
    "color, channels first": ((5, 3, 7, 6), lambda row: row.transpose(1, 2, 0)),
    "transparent, channels first": ((5, 4, 7, 6), lambda row: row.transpose(1, 2, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_an_array_arrives_to_the_pixel(tmp_path, layout):
    shape, expected = LAYOUTS[layout]
    rows = random(*shape)
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "a.npz", rows)
    np.savez_compressed(tmp_path / "b.npz", images=rows)
    for name in ("a.npy", "a.npz", "b.npz"):
        found = contents([str(tmp_path / name)])
        assert [name for name, *_ in found] == ["0", "1", "2", "3", "4"]
        for row, (*_, data) in zip(rows, found):
            np.testing.assert_array_equal(pixels(data), expected(row))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_keep_their_white(tmp_path, order):
    np.save(tmp_path / "a.npy", np.array([[[0, 255, 65535, 0, 255]] * 5], order))
    ((*_, data),) = contents([str(tmp_path / "a.npy")])
    assert data == b"P5 5 5 65535\n" + b"\0\0\0\xff\xff\xff\0\0\0\xff" * 5
    color = random(2, 3, 3, dtype=np.uint16)
    assert image_file(color) == b"P6 3 2 65535\n" + color.astype(">u2").tobytes()
    # Pillow keeps the upper byte of 16-bit color with transparency.
    transparent = random(2, 3, 4, dtype=np.uint16)
    np.testing.assert_array_equal(pixels(image_file(transparent)), transparent >> 8)


def test_the_names_sort_as_the_rows_do(tmp_path):
    rows = np.arange(120, dtype=np.uint8).repeat(25).reshape(120, 5, 5)
    np.save(tmp_path / "a.npy", rows)
    assert [data[-1] for *_, data in contents([str(tmp_path / "a.npy")])] == list(range(120))


PUBLISHED = {
    "mnist": ({"x_train": 4, "x_test": 2}, {"y_train": [3, 1, 0, 2], "y_test": [9, 9]}, [9, 9, 3, 1, 0, 2]),
    "medmnist": (
        {"train_images": 3, "val_images": 1, "test_images": 1},
        {"train_labels": [[0], [2], [1]], "val_labels": [[2]], "test_labels": [[0]]},
        [0, 0, 2, 1, 2],
    ),
    "images": ({"images": 2}, {"labels": [1, 0]}, [1, 0]),
    "data": ({"data": 2}, {"labels": [1, 0]}, [1, 0]),
    "unnamed": ({"arr_0": 2}, {"arr_1": [1, 0]}, [1, 0]),
    "by its length": ({"pics": 2}, {"target": [1, 0]}, [1, 0]),
    "below 0": ({"images": 2}, {"labels": [-1, 0]}, [None, 0]),
}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_of_arrays_as_people_have_them(tmp_path, kind, save):
    counts, labels, expected = PUBLISHED[kind]
    arrays = {name: random(count, 8, 8) for name, count in counts.items()}
    save(tmp_path / "a.npz", **arrays, **{name: np.array(values) for name, values in labels.items()})
    found = contents([str(tmp_path / "a.npz")])
    assert [label for _, label, *_ in found] == expected
    rows = np.concatenate([arrays[name] for name in sorted(arrays)])
    np.testing.assert_array_equal(np.stack([pixels(data) for *_, data in found]), rows)
    assert {label for _, label, *_ in contents([str(tmp_path / "a.npz")], "none")} == {None}


def test_names_of_classes_in_an_archive_are_numbered_in_their_order(tmp_path):
    np.savez(tmp_path / "a.npz", images=random(3, 8, 8), labels=np.array(["dog", "cat", "dog"]))
    listing = list_inputs([str(tmp_path / "a.npz")])
    assert listing.classes == ("cat", "dog") and [item.label for item in listing.inputs] == [1, 0, 1]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 8, 8), np.float32), r"float32 \(2, 8, 8\): not uint8 or uint16"),
        (np.zeros((2, 8, 8), np.int64), r"int64 \(2, 8, 8\): not uint8"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\): not of the shape"),
        (np.zeros((2, 5, 4, 7), np.uint8), r"not of the shape \(N, H, W\)"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\): one image"),
        (np.zeros((8, 3, 8, 3), np.uint8), r"channels are first or last"),
        (np.zeros((2, 4, 5), np.uint8, order="F"), r"in Fortran's order"),
    ],
)
def test_what_is_no_array_of_images_is_told(tmp_path, array, reason):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", images=array)
    with pytest.raises(DataError, match=rf"a.npy is .*{reason}"):
        list_inputs([str(tmp_path / "a.npy")])
    with pytest.raises(DataError, match=r"a.npz holds images .*: no array of images"):
        list_inputs([str(tmp_path / "a.npz")])


def test_ambiguous_archives_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", photos=random(2, 8, 8), masks=random(2, 8, 8))
    with pytest.raises(DataError, match=r"photos uint8 \(2, 8, 8\), masks uint8 \(2, 8, 8\): several arrays may be"):
        list_inputs([str(tmp_path / "a.npz")])
    np.savez(tmp_path / "b.npz", images=random(2, 8, 8), labels=np.eye(2))
    with pytest.raises(DataError, match=r"labels float64 \(2, 2\) beside images .*--labels none"):
        list_inputs([str(tmp_path / "b.npz")])
    assert len(list_inputs([str(tmp_path / "b.npz")], "none").inputs) == 2


def test_nothing_pickled_in_an_array_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    traps = np.array([Trap(), Trap()], dtype=object)
    np.save(tmp_path / "a.npy", traps)
    np.savez(tmp_path / "a.npz", images=random(2, 8, 8), labels=traps)
    with pytest.raises(DataError, match="not uint8"):
        list_inputs([str(tmp_path / "a.npy")])
    with pytest.raises(DataError, match="labels object"):
        list_inputs([str(tmp_path / "a.npz")])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, name):
    rows = random(3, 8, 8)
    path = tmp_path / name
    np.save(path, rows) if name == "a.npy" else np.savez_compressed(path, rows)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=name):
            list_inputs([str(path)])


def test_a_damaged_archive_costs_the_rows_behind_the_damage_only(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=random(200, 32, 32) & 7)
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].compress_size
    data = bytearray(path.read_bytes())
    data[size // 2 : size // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    listing, reader = opened([str(path)])
    read = list(reader.read_ahead(listing.inputs[:]))
    assert isinstance(read[0], bytes) and isinstance(read[-1], Rejected) and read[-1].reason == "unreadable"
    assert read[-1].detail == "the archive is damaged before it"  # without unpacking it up to there each time


def test_remote_arrays_are_read_at_their_rows(tmp_path):
    np.save(tmp_path / "a.npy", random(5, 7, 6))
    np.savez_compressed(tmp_path / "a.npz", images=random(5, 7, 6), labels=[0, 1, 2, 3, 4])
    memory = fsspec.filesystem("memory")
    for name in ("a.npy", "a.npz"):
        memory.pipe(f"/arrays/{name}", (tmp_path / name).read_bytes())
        assert contents([f"memory://arrays/{name}"]) == contents([str(tmp_path / name)])


def test_an_array_that_changes_after_the_listing_is_noticed(tmp_path):
    np.save(tmp_path / "a.npy", random(2, 5, 6))
    listing = list_inputs([str(tmp_path / "a.npy")])
    before = listing.fingerprint
    np.save(tmp_path / "a.npy", random(2, 6, 5))
    with pytest.raises(Rejected, match="source_changed"):
        Reader(pickle.loads(pickle.dumps(listing.sources))).read(listing.inputs[0])
    assert list_inputs([str(tmp_path / "a.npy")]).fingerprint != before


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("target", np.array([0.0, 1, 2]), [0, 1, 2]),
        ("labels", np.array([[0.0], [np.nan], [1]]), [0, None, 1]),
        ("y", np.array([True, False, True]), [1, 0, 1]),
        ("labels", np.array([b"dog", b"cat", b"cat"]), [1, 0, 0]),
        ("Label", np.array(["0", "10", "-1"]), [0, 10, None]),
        ("labels", np.array([2, 0, 1], np.uint64), [2, 0, 1]),
    ],
)
def test_labels_of_any_type_are_read(tmp_path, name, values, expected):
    np.savez(tmp_path / "a.npz", images=random(3, 8, 8), other=random(7), **{name: values})
    listing = list_inputs([str(tmp_path / "a.npz")])
    assert [item.label for item in listing.inputs] == expected and name in listing.labels_from


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"labels": np.eye(3, dtype=np.uint8)}, r"labels uint8 \(3, 3\) beside images"),
        ({"labels": np.array([0.5, 1, 2])}, "0.5 in row 0 is not a whole number"),
        ({"labels": np.array([0, 1])}, r"labels int64 \(2,\) beside images"),
        ({"labels": np.array(["0", "1", "x"])}, "'x' in row 2 is among numbers"),
        ({"one": np.arange(3), "two": np.arange(3)}, "may all be the classes"),
        ({"target": np.arange(3), "category": np.arange(3)}, "may all be the classes"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path, arrays, reason):
    np.savez(tmp_path / "a.npz", images=random(3, 8, 8), **arrays)
    with pytest.raises(DataError, match=f"{reason}.*--labels none"):
        list_inputs([str(tmp_path / "a.npz")])
    assert list_inputs([str(tmp_path / "a.npz")], "none").classes is None


def test_images_alone_say_why_they_have_no_classes(tmp_path):
    np.save(tmp_path / "a.npy", random(3, 8, 8))
    np.savez(tmp_path / "b.npz", images=random(3, 8, 8), score=np.array([0.1, 0.2, 0.3]))
    assert "array called labels, as .npz" in list_inputs([str(tmp_path / "a.npy")]).labels_from
    assert list_inputs([str(tmp_path / "b.npz")]).labels_from == "b.npz has no array called labels (score)"
