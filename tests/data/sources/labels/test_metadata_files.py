"""Label files among the inputs: they are read, or the job ends with one line that names them."""

from __future__ import annotations

import io
import json

import pytest

from pipeline.data.sources.listing import list_inputs
from pipeline.errors import ConfigError, DataError
from tests.data.sources.fingerprint import fingerprint_0_1
from tests.data.sources.test_listing import write_directory, write_tar, write_zip

IMAGES = {f"{i}.png": b"" for i in range(4)}
CATS = {0: "cat", 1: "dog", 2: "cat", 3: "dog"}
SAID = [(f"{i}.png", i % 2) for i in range(4)]


def classes(urls, **options):
    """Input → name of its class, of what is meant as an image."""
    listing = list_inputs(urls if isinstance(urls, list) else [urls], **options)
    inputs = [item for item in listing.inputs if item.rejection is None]
    return {item.name: None if item.label is None else listing.classes[item.label] for item in inputs}, listing


def parquet(columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def table(heads, *numbers):
    return "".join([heads + "\n", *(f"{i}.png,{i % 2}\n" for i in numbers)]).encode()


def dataset(labels):
    return json.dumps({"labels": labels}).encode()


NAMES = ["0.png", "1.png", "2.png", "3.png"]
READ = {
    "stylegan": {**IMAGES, "dataset.json": dataset(SAID)},
    "stylegan in a directory": {f"data/{n}": b for n, b in IMAGES.items()} | {"data/dataset.json": dataset(SAID)},
    "stylegan with chunks": {f"0000{i // 2}/{i}.png": b"" for i in range(4)}
    | {"dataset.json": dataset([(f"0000{i // 2}/{i}.png", i % 2) for i in range(4)])},
    "imagefolder csv": {**IMAGES, "metadata.csv": table("file_name,label", *range(4))},
    "capitals": {**IMAGES, "Metadata.CSV": table("File_Name,Label,text", *range(4))},
    "imagefolder jsonl": {
        **IMAGES,
        "metadata.jsonl": b"".join(b'{"file_name": "%d.png", "label": %d}\n' % (i, i % 2) for i in range(4)),
    },
    "each directory its own": {
        **{"a/0.png": b"", "a/1.png": b"", "a/metadata.csv": table("file_name,label", 0, 1)},
        **{"b/2.png": b"", "b/3.png": b"", "b/metadata.csv": table("file_name,label", 2, 3)},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("write", [write_directory, write_zip, write_tar])
def test_files_of_labels_are_read(tmp_path, kind, write):
    found, listing = classes(
        write(str(tmp_path / ("in" if write is write_directory else f"in.{write.__name__[6:]}")), READ[kind])
    )
    assert {name.rpartition("/")[2]: label for name, label in found.items()} == {
        f"{i}.png": str(i % 2) for i in range(4)
    }
    assert listing.classes == ("0", "1")
    assert "dataset" in listing.labels_from or "metadata" in listing.labels_from.lower()


def test_a_parquet_of_metadata_is_read(tmp_path):
    found, _ = classes(
        write_directory(tmp_path, {**IMAGES, "metadata.parquet": parquet({"file_name": NAMES, "label": list("abab")})})
    )
    assert found == dict(zip(NAMES, "abab"))


CAPTIONS = b"file_name,text\n0.png,a cat\n1.png,a dog\n"
NONE = {
    "null": {**{f"00000/{n}": b"" for n in NAMES}, "dataset.json": dataset(None)},
    "captions": {**IMAGES, "metadata.csv": CAPTIONS},
    "captions of a split": {f"train/{n}": b"" for n in NAMES} | {"train/metadata.csv": CAPTIONS},
    "captions beside": {**IMAGES, **{f"{i}.txt": b"a cat" for i in range(4)}},
    "json without a class": {**IMAGES, **{f"{i}.json": b'{"caption": "label: a cat", "url": "x"}' for i in range(4)}},
}


@pytest.mark.parametrize("kind", NONE)
def test_captions_and_null_are_no_labels(tmp_path, kind):
    found, listing = classes(write_directory(tmp_path, NONE[kind]))
    assert set(found.values()) == {None} and len(found) == 4 and listing.classes is None
    assert listing.labels_from


def test_captions_leave_the_directories_of_classes(tmp_path):
    files = {f"{c}/{i}.png": b"" for i, c in CATS.items()}
    caption = {"metadata.csv": b"file_name,text\ncat/0.png,x\n"}
    inner = {f"{c}/metadata.csv": CAPTIONS for c in ("cat", "dog")}
    for number, more in enumerate((caption, inner)):
        found, _ = classes(write_directory(tmp_path / str(number), files | more))
        assert found == {f"{c}/{i}.png": c for i, c in CATS.items()}


UNUSABLE = {
    "vectors": ({"dataset.json": dataset([(n, [0.0, 1.0]) for n in NAMES])}, "dataset.json.* is not one class"),
    "fractions": ({"dataset.json": dataset([(n, 0.5) for n in NAMES])}, "0.5 in row 0 is not a whole number"),
    "no pairs": ({"dataset.json": dataset([1, 2])}, "not pairs of a name and a class"),
    "of other files": ({"dataset.json": dataset([("x.png", 1)])}, "not one of its names, such as 'x.png'"),
    "lists": ({"metadata.jsonl": b'{"file_name": "0.png", "label": [1, 2]}'}, "metadata.jsonl.* is not one class"),
    "two of them": ({"metadata.csv": table("file,label", 0), "dataset.json": dataset(SAID)}, "both give classes"),
    "damaged": ({"dataset.json": b'{"labels": [['}, "dataset.json is not JSON"),
    "cls": ({"0.cls": b"1"}, "0.cls gives classes"),
    "label": ({"0.label": b"1"}, "0.label gives classes"),
    "class in a txt": ({"0.cls.txt": b"1"}, "0.cls.txt gives classes"),
    "NaN beside the label": ({"0.json": b'{"label": 1, "score": NaN}'}, "'label' of a file beside an image"),
    "a name of two lines": ({"dataset.json": dataset([("0.png", "a\nb")])}, "is no class name"),
    "json beside": ({f"{i}.json": b'{"label": 0}' for i in range(4)}, "'label' of a file beside an image"),
    "json beside, whole name": ({"1.png.json": b'{"Class": "x"}'}, "'Class' of a file beside an image"),
    "coco": ({"instances.json": b'{"images": [], "annotations": []}'}, "COCO"),
    "list of objects": ({"all.json": b'[{"image": "0.png", "class": "x"}]'}, "its field 'class' is not read"),
    "names and classes": ({"labels.json": b'{"0.png": 3}'}, "labels.json gives classes"),
    "another csv": ({"train.csv": b"filename,label\n0.png,cat\n"}, "give it as --labels train.csv"),
    "by its name": ({"imagelabels.mat": b"\0"}, "imagelabels.mat gives classes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_labels_that_cannot_be_used_end_the_job_and_none_works(tmp_path, kind):
    more, reason = UNUSABLE[kind]
    directory = write_directory(tmp_path, IMAGES | more)
    with pytest.raises(DataError, match=reason) as told:
        list_inputs([directory])
    assert "\n" not in str(told.value) and "--labels none" in str(told.value)
    found, listing = classes(directory, labels="none")
    assert {name: found[name] for name in NAMES} == dict.fromkeys(NAMES) and listing.labels_from == "--labels none"


def test_a_csv_that_says_what_the_directories_say_is_no_contradiction(tmp_path):
    files = {f"{c}/{i}.png": b"" for i, c in CATS.items()}
    same = {"all.csv": b"file,label\ncat/0.png,cat\n"}
    assert classes(write_directory(tmp_path / "a", files | same))[1].classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"--labels all\.csv"):
        classes(write_directory(tmp_path / "b", files | {"all.csv": b"file,label\ncat/0.png,lion\n"}))


def test_one_name_with_two_classes_is_told(tmp_path):
    twice = b"file_name,label\n0.png,cat\n./0.png,dog\n"
    with pytest.raises(DataError, match=r"'./0.png' has two classes, 'cat' and 'dog'"):
        list_inputs([write_directory(tmp_path, {**IMAGES, "metadata.csv": twice})])


def test_directories_that_are_named_are_the_classes(tmp_path):
    for i, name in CATS.items():
        write_directory(tmp_path / "data" / name, {f"{i}.png": b""})
    expected = {f"{c}/{i}.png": c for i, c in CATS.items()}
    both = [str(tmp_path / "data/cat"), str(tmp_path / "data/dog")]
    for urls in (both, [f"{tmp_path}/data/*"], [f"{directory}/*.png" for directory in both]):
        assert classes(urls)[0] == expected
    # Files beside the directories have no class; one directory alone is none either.
    write_directory(tmp_path / "data", {"stray.png": b""})
    assert {label for name, label in classes([f"{tmp_path}/data/*"])[0].items() if "stray" in name} == {None}
    assert classes(both[0])[1].classes is None


def test_directories_of_directories_keep_their_inner_classes_and_a_mixture_is_told(tmp_path):
    splits = [
        write_directory(tmp_path / s, {f"{c}/{s}{i}.png": b"" for i, c in CATS.items()}) for s in ("train1", "train2")
    ]
    assert classes(splits)[1].classes == ("cat", "dog")
    flat = write_directory(tmp_path / "lions", IMAGES)
    with pytest.raises(ConfigError, match="lions holds images and train1 holds directories of images"):
        list_inputs([splits[0], flat])
    junk = write_directory(tmp_path / "tigers", IMAGES | {"__MACOSX/x/._0.png": b""})
    assert classes([flat, junk])[1].classes == ("lions", "tigers")


def test_the_order_of_a_set_that_is_begun_stands(tmp_path):
    directory = write_directory(tmp_path, {f"{i}/a.png": b"" for i in range(12)})
    new = list_inputs([directory])
    assert new.classes == tuple(map(str, range(12)))
    old = tuple(sorted(map(str, range(12))))
    continued = list_inputs([directory], existing_classes=old)
    assert continued.classes == old and continued.fingerprint != new.fingerprint
    assert [continued.classes[item.label] for item in continued.inputs] == [
        new.classes[item.label] for item in new.inputs
    ]


def test_files_of_labels_do_not_change_the_fingerprint(tmp_path):
    """A set that was begun when they were bad images goes on."""
    directory = write_directory(tmp_path, {**IMAGES, "0.txt": b"x"})
    listing = list_inputs([directory])
    assert [item.rejection for item in listing.inputs if item.name == "0.txt"] == [("label_file", "")]
    assert fingerprint_0_1([item._replace(rejection=None) for item in listing.inputs]) == listing.fingerprint
