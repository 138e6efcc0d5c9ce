"""Class numbers: numbers stay, names are sorted, and a CSV file matches the inputs or is refused."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from pipeline.data.sources.listing import list_inputs
from pipeline.errors import ConfigError, DataError
from tests.data.sources.test_listing import write_directory, write_tar, write_zip

FILES = {"1.png": b"1", "a/2.png": b"2", "b/3.x.jpg": b"3", "b/10.png": b"10"}


def labelled(tmp_path, text, files=FILES, encoding="utf-8", directory="images"):
    """Name → class of each input, and the listing."""
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode(encoding))
    listing = list_inputs([write_directory(tmp_path / directory, files)], str(path))
    names = [None if item.label is None else listing.classes[item.label] for item in listing.inputs]
    return dict(zip([item.name for item in listing.inputs], names)), listing


EXPECTED = {"1.png": "cat", "a/2.png": "dog", "b/10.png": None, "b/3.x.jpg": "cat"}


@pytest.mark.parametrize(
    "text",
    [
        "filename,label\n1.png,cat\na/2.png,dog\nb/3.x.jpg,cat\n",
        "label,width,image\ncat,3,1.png\ndog,4,2.png\ncat,5,3.x.jpg\n",
        "id,breed\n1,cat\n2,dog\n3.x,cat\n",
        "ID;Class\r\n1;cat\r\n2;dog\r\n3.x;cat\r\n",
        "name\tcategory\n1\tcat\n2\tdog\n3.x\tcat",
        "1.png,cat\n2.png,dog\n\n./b/3.x.jpg,cat\n",
        "image,emotion\n1.png,cat\n2.png,dog\n3.x,cat\n",
        '"file","class"\n"1.png","cat"\n"2.png","dog"\n"3.x.jpg","cat"\n10.png,\n',
        "\ufeff1.png,cat\n2.png,dog\n3.x.jpg,cat\n",
        "\ufefffile,class\n1.png, cat\n2.png, dog\n3.x.jpg, cat\n",
    ],
)
def test_a_csv_names_files_by_path_name_or_stem(tmp_path, text):
    found, listing = labelled(tmp_path, text)
    assert found == EXPECTED and listing.classes == ("cat", "dog") and listing.rows_without_input == 0


def test_names_beyond_ascii_and_rows_of_no_input(tmp_path):
    found, listing = labelled(tmp_path, "ä.png,Kätzchen\nnowhere.png,Hund\n", {"ä.png": b"1"})
    assert (
        found == {"ä.png": "Kätzchen"} and listing.classes == ("Hund", "Kätzchen") and listing.rows_without_input == 1
    )


def test_whole_numbers_are_the_numbers_of_the_classes(tmp_path):
    _, listing = labelled(tmp_path, "id,level\n1,0\n2,10\n10,3\n")
    assert [item.label for item in listing.inputs] == [0, 10, 3, None]
    assert listing.classes == tuple(map(str, range(11)))
    _, listing = labelled(tmp_path, "id,level\n1,1000000\n2,2000000\n", directory="two")
    assert [item.label for item in listing.inputs] == [0, 1, None, None] and listing.classes == ("1000000", "2000000")


def test_a_better_fit_wins_and_equal_ones_are_refused(tmp_path):
    found, _ = labelled(tmp_path, "1.png,top\na/1.png,inner\n", {"1.png": b"", "a/1.png": b""})
    assert found == {"1.png": "top", "a/1.png": "inner"}
    found, _ = labelled(tmp_path, "1.png,top\n", {"1.png": b"", "a/1.png": b""}, directory="two")
    assert found == {"1.png": "top", "a/1.png": None}
    with pytest.raises(ConfigError, match=r"'1.png' fits 'a/1.png' and 'b/1.png': write paths, not names"):
        labelled(tmp_path, "1.png,top\n", {"b/1.png": b"", "a/1.png": b""}, directory="three")


@pytest.mark.parametrize(
    ("text", "encoding", "reason"),
    [
        ("ä.png,Kätzchen\n", "latin-1", r"labels.csv is not UTF-8 \(byte 0\): save it as UTF-8"),
        ("1.png,cat\n", "utf-16", r"labels.csv is not UTF-8"),
        ("file,width,height\n1.png,3,4\n", "utf-8", r"no column of classes among file, width, height: call one label"),
        (
            "width,height,label\n3,4,cat\n",
            "utf-8",
            r"no column of file names among width, height, label: call one filename",
        ),
        ("only\n1.png\n", "utf-8", r"no column of file names among only"),
        ("file,label\n1.png\n", "utf-8", r"line 2 has 1 columns, not 2"),
        ("file,label\n1.png,1,0\n", "utf-8", r"line 2 has 3 columns, the first line 2"),
        ("1.png,cat\n1.png,dog\n", "utf-8", r"line 2 says 'dog' of '1.png', an earlier one 'cat'"),
        ("", "utf-8", r"labels.csv is empty"),
        ("7.png,cat\n", "utf-8", r"not one of its 1 names, such as '7.png', is among the inputs, such as '.*'"),
        ("file,label\n", "utf-8", r"not one of its 0 names"),
    ],
)
def test_a_csv_that_does_not_fit_is_told_in_one_line(tmp_path, text, encoding, reason):
    with pytest.raises(ConfigError, match=reason) as told:
        labelled(tmp_path, text, encoding=encoding)
    assert "\n" not in str(told.value)


def test_a_csv_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"--labels .*nowhere.csv: there is no such file: give folder, none or a CSV"):
        list_inputs([write_directory(tmp_path / "a", FILES)], str(tmp_path / "nowhere.csv"))


def test_the_fingerprint_covers_labels_from_a_csv(tmp_path):
    directory, path = write_directory(tmp_path / "images", FILES), tmp_path / "labels.csv"
    prints = []
    for name in ("x", "y", "x"):
        path.write_text(f"1.png,{name}\n2.png,xy\n10.png,z\n")
        prints.append(list_inputs([directory], str(path)).fingerprint)
    assert prints[0] == prints[2] != prints[1]


def digits(path, labels):
    np.savez(path, images=np.zeros((len(labels), 8, 8), np.uint8), labels=np.array(labels))
    return str(path)


def of(urls):
    listing = list_inputs(urls)
    return [item.label for item in listing.inputs], listing.classes


def test_orders_that_begin_alike_are_one(tmp_path):
    three, five = digits(tmp_path / "a.npz", [0, 2]), digits(tmp_path / "b.npz", [4, 1])
    assert of([three, five]) == ([0, 2, 4, 1], ("0", "1", "2", "3", "4"))
    eleven = digits(tmp_path / "c.npz", [10, 2])
    assert of([five, eleven]) == ([4, 1, 10, 2], tuple(map(str, range(11))))
    directory = write_directory(tmp_path / "folder", {"0/a.png": b"", "1/b.png": b""})
    assert of([three, directory]) == ([0, 2, 0, 1], ("0", "1", "2"))


def test_orders_that_differ_give_way_to_the_sorted_names(tmp_path):
    numbers = digits(tmp_path / "a.npz", [0, 2])
    names = write_zip(tmp_path / "b.zip", {"cat/a.png": b"", "1/b.png": b""})
    assert of([numbers, names]) == ([0, 2, 1, 3], ("0", "1", "2", "cat"))
    without = write_tar(tmp_path / "c.tar", {"c.png": b""})
    assert of([numbers, without]) == ([0, 2, None], ("0", "1", "2"))


def csv_classes(tmp_path, text, count=12):
    return labelled(tmp_path, text, {f"img{i:02d}.png": b"" for i in range(count)})


NUMBERS = {f"img{i:02d}.png": str(i) for i in range(12)}


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("fname,emotion\n", "img{i:02d}.png,{i}\n"),
        ("emotion,fname\n", "{i},img{i:02d}.png\n"),
        ("", "img{i:02d}.png,{i}\n"),
        ("sep=;\r\nDatei;Klasse\r\n", "img{i:02d}.png;{i}\r\n"),
        ('"sep=,"\nFile Name,Label\n', "img{i:02d}.png,{i}.0\n"),
        ("sep=\t\r\nfile\tlabel\r\n", "img{i:02d}.png\t{i}\r\n"),
        ("file;label\n", "img{i:02d}.png;{i},0\n"),
        ("file,label\n", "img{i:02d}.png,{i}.00\n"),
        ("split,stem,label\n", "train,img{i:02d},{i}\n"),
        ("path,label\n", ".\\img{i:02d}.png,{i}\n"),
    ],
)
def test_numbers_of_a_csv_stay_numbers_in_their_order(tmp_path, head, row):
    found, listing = csv_classes(tmp_path, head + "".join(row.format(i=i) for i in range(12)))
    assert found == NUMBERS and listing.classes == tuple(map(str, range(12)))
    assert listing.rows_without_input == 0


@pytest.mark.parametrize("nothing", ["-1", "", "nan", "NaN", "NA", "N/A", "null", "None", "-1.0", "<NA>"])
def test_missing_values_are_no_class(tmp_path, nothing):
    found, listing = csv_classes(tmp_path, f"file,label\nimg00.png,{nothing}\nimg01.png,1\nimg02.png,0\n", 3)
    assert found == {"img00.png": None, "img01.png": "1", "img02.png": "0"} and listing.classes == ("0", "1")


@pytest.mark.parametrize(
    ("slip", "reason"),
    [
        ("cat", "'cat' in line 4 is among numbers such as '0'"),
        ("0.5", "'0.5' in line 4 is not a whole number"),
        ("-7", "'-7' in line 4 is below -1"),
        ("inf", "'inf' in line 4 is not a whole number"),
        ('"1,0"', "'1,0' in line 4 is not one class number but several"),
        ("\x1b[31m", "in line 4 is no class name"),
        ("x" * 257, "in line 4 is no class name"),
    ],
)
def test_a_slip_among_numbers_is_named(tmp_path, slip, reason):
    text = "file,label\n" + "".join(f"img{i:02d}.png,{slip if i == 2 else i}\n" for i in range(12))
    with pytest.raises(DataError, match=reason):
        csv_classes(tmp_path, text)


def test_a_number_among_names_is_the_slip(tmp_path):
    with pytest.raises(DataError, match="'3' in line 3 is among names such as 'cat'"):
        csv_classes(tmp_path, "img00.png,cat\nimg01.png,dog\nimg02.png,3\n")


def test_a_first_row_of_an_absent_file_is_no_head(tmp_path):
    _, listing = csv_classes(tmp_path, "absent.jpg,9\nimg00.png,1\nimg01.png,0\n")
    assert listing.rows_without_input == 1 and len(listing.classes) == 10


def test_names_that_look_the_same_are_one_in_a_csv_directories_and_archives(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Käse") for form in ("NFC", "NFD"))
    found, listing = labelled(
        tmp_path, f"{composed}.png,{apart}\nb.png,{composed}\n", {f"{apart}.png": b"", "b.png": b""}
    )
    assert set(found.values()) == {composed} and listing.classes == (composed,)
    two = [
        write_directory(tmp_path / "x", {f"{apart}/1.png": b"", "z/2.png": b""}),
        write_zip(tmp_path / "y.zip", {f"{composed}/1.png": b"", "z/2.png": b""}),
    ]
    assert of(two) == ([0, 1, 0, 1], (composed, "z"))
    # A set that was begun with the other letters keeps them.
    assert list_inputs(two[:1], existing_classes=[apart, "z"]).classes == (apart, "z")


def test_directories_of_numbers_are_in_the_order_of_the_numbers(tmp_path):
    directory = write_directory(tmp_path / "f", {f"{i}/a.png": b"" for i in (0, 2, 10, 100)})
    assert of([directory])[1] == ("0", "2", "10", "100")
    padded = write_directory(tmp_path / "p", {f"{i}/a.png": b"" for i in ("01", "2", "10")})
    assert of([padded])[1] == ("01", "10", "2")
