"""Tar archives of any writer: the same members as `tarfile` finds, and the labels of webdatasets."""

from __future__ import annotations

import gc
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile

import pytest

from pipeline.data.images.preprocess import Rejected
from pipeline.data.shards.index_tars import scan
from pipeline.data.shards.settings import IndexSettings
from pipeline.data.sources import tar
from pipeline.data.sources.listing import Reader, list_inputs
from pipeline.errors import ConfigError, DataError
from tests.data.sources.test_listing import FILES, contents, write_tar
from tests.launch import ENVIRONMENT

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), options.get("mtime", 0)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("format", FORMATS)
def test_the_fast_scan_finds_what_tarfile_finds(tmp_path, format):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[format]) as archive:
        for i, name in enumerate(["a.png", "folder/b.png", "d" * 60 + "/" + "e" * 80, "é/ü.png", "x" * 99, "x" * 100]):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 512 * i + i, 1_700_000_000 + i + (0.25 if format == "pax" else 0)
            archive.addfile(info, io.BytesIO(bytes(info.size)))
        for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("other" + kind.decode())
            info.type, info.linkname = kind, "l" * (150 if format != "ustar" else 50)
            archive.addfile(info)
        if format != "ustar":
            archive.addfile(tarfile.TarInfo("y" * 300))
    with path.open("rb") as file:
        found = list(tar._scan(file))
        assert found == list(tar._scan_by_tarfile(file)) and len(found) == (6 if format == "ustar" else 7)


def test_headers_that_only_tarfile_knows_are_left_to_it(tmp_path):
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of a commit"}
    ) as archive:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    with (tmp_path / "a.tar").open("rb") as file, pytest.raises(tar._NeedsTarfile):
        list(tar._scan(file))
    assert [(name, data) for name, _, _, data in contents([str(tmp_path / "a.tar")])] == [
        ("a.png", b"abc"),
        ("b.png", b"abc"),
    ]


def test_a_size_that_a_pax_header_gives_holds(tmp_path):
    record = b"10 size=3\n"
    extended, info = tarfile.TarInfo("x"), tarfile.TarInfo("a.png")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    blocks = [extended.tobuf(), record.ljust(512, b"\0"), info.tobuf(), b"abc".ljust(512, b"\0"), bytes(1024)]
    (tmp_path / "a.tar").write_bytes(b"".join(blocks))
    assert [data for *_, data in contents([str(tmp_path / "a.tar")])] == [b"abc"]


def test_sizes_beyond_8_gib_and_sums_of_signed_bytes_are_understood(tmp_path):
    header = bytearray(tarfile.TarInfo("é.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (1 << 34).to_bytes(11)
    header[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in header)
    header[148:156] = b"%06o\0 " % signed
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(512 + (1 << 34) + 1024)  # sparse
    with path.open("rb") as file:
        name, size, _, place = next(tar._scan(file))
    assert (name, size, place) == ("é.png", 1 << 34, 512)


WEBDATASET = [
    ("a/001.jpg", b"one"),
    ("a/001.cls", b"3"),
    ("a/001.json", b"{}"),
    ("a/002.cls", b"1\n"),
    ("a/002.seg.png", b"two"),
    ("a/002.txt", b"a caption"),
    ("a/photo.1.jpg", b"photo 1"),
    ("a/photo.2.jpg", b"photo 2"),
    ("b/003.webp", b"three"),
    ("notes.txt", b"no companion of any image"),
    ("a/.txt", b"hidden"),
]


def test_companions_of_an_image_are_no_inputs_and_a_cls_is_its_class(tmp_path):
    path = write(tmp_path / "a.tar", WEBDATASET)
    found = {name: (label, data) for name, label, _, data in contents([path])}
    assert found == {
        "a/001.jpg": (3, b"one"),
        "a/002.seg.png": (1, b"two"),
        "a/photo.1.jpg": (None, b"photo 1"),
        "a/photo.2.jpg": (None, b"photo 2"),
        "b/003.webp": (None, b"three"),
        "notes.txt": (None, b"no companion of any image"),
        "a/.txt": (None, b"hidden"),
    }
    assert list_inputs([path]).classes == ("0", "1", "2", "3")
    assert {label for _, label, *_ in contents([path], "none")} == {None} and len(contents([path], "none")) == 7


def test_companions_that_lie_elsewhere_in_the_archive_find_their_image(tmp_path):
    apart = sorted(WEBDATASET, key=lambda member: member[0].rpartition(".")[2])
    assert contents([write(tmp_path / "a.tar", apart)]) == contents([write(tmp_path / "a2.tar", WEBDATASET)])


def test_without_any_cls_the_directory_is_the_class(tmp_path):
    path = write(tmp_path / "a.tar", [("cat/1.jpg", b"1"), ("cat/1.json", b"{}"), ("dog/2.jpg", b"2")])
    assert [(name, label) for name, label, *_ in contents([path])] == [("cat/1.jpg", 0), ("dog/2.jpg", 1)]


def labelled(path, labels="folder", image_extensions=()):
    """Class name of each input, and the reason of those that are no samples."""
    listing = list_inputs([str(path)], labels, image_extensions=frozenset(image_extensions))
    reader, found = Reader(listing.sources), {}
    for item in listing.inputs:
        try:
            reader.read(item)
            found[item.name] = None if item.label is None else (listing.classes or ())[item.label]
        except Rejected as rejected:
            found[item.name] = f"({rejected.reason})"
    return found


def jpg(*names):
    return [(name, name.encode()) for name in names]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([*jpg("1.jpg"), ("1.cls", b"cat"), *jpg("2.jpg"), ("2.cls", b" dog\n")], {"1.jpg": "cat", "2.jpg": "dog"}),
        ([*jpg("1.jpg", "2.jpg"), ("2.json", b'{"Label": 1}'),
        ("1.json", b'{"label": 0}')], {"1.jpg": "0", "2.jpg": "1"}),
        ([*jpg("1.a.jpg"), ("1.b.cls", b"0"), *jpg("2.a.jpg"), ("2.b.cls", b"1")], {"1.a.jpg": "0", "2.a.jpg": "1"}),
        (
            [*jpg("2.5.png", "2.6.png"), ("2.6.cls", b"0"), ("2.5.cls", b"1"), ("2.7.cls", b"2")],
            {"2.5.png": "1", "2.6.png": "0", "2.7.cls": "(label_file)"},
        ),
        (
            [*jpg("a.b.png"), ("a.b.cls", b"1"), *jpg("a.c.png"), ("a.c.cls", b"0")],
            {"a.b.png": "1", "a.c.png": "0"},
        ),
        ([*jpg("1.0.jpg", "1.1.jpg"), ("1.cls", b"0")], {"1.0.jpg": "0", "1.1.jpg": "0"}),
        ([*jpg("p.jpg"), ("p.cls", b"0"), *jpg("p.1.jpg")], {"p.jpg": "0", "p.1.jpg": None}),
        (
            [*jpg("1.jpg", "2.jpg", "1.seg.png", "2.seg.png"), ("1.cls", b"0"), ("2.cls", b"0")],
            {"1.jpg": "0", "2.jpg": "0", "1.seg.png": "(beside_image)", "2.seg.png": "(beside_image)"},
        ),
        (jpg("john.smith.png", "john.doe.png", "jane.doe.png"),
         {"john.smith.png": None, "john.doe.png": None, "jane.doe.png": None}),
        ([("1.png", b"old"), ("1.png", b"new"), ("1.cls", b"0"), ("1.cls", b"0")], {"1.png": "0"}),
        ([*jpg("._1.jpg"), ("._1.cls", b"x"), *jpg("1.jpg"), ("._1.json", b"x"), ("1.cls", b"0")],
         {"._1.jpg": "(system_file)", "._1.cls": "(system_file)", "1.jpg": "0", "._1.json": "(system_file)"}),
    ],
)  # fmt: skip
def test_every_image_has_the_class_of_its_own_name(tmp_path, members, expected):
    assert labelled(write(tmp_path / "a.tar", members)) == expected


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([*jpg("1.jpg"), ("1.cls", b"1"), ("1.cls", b"2")], "is class 1 by 1.cls and 2 by 1.cls: keep one"),
        ([*jpg("1.jpg"), ("1.cls", b"1"), *jpg("2.jpg"), ("1.cls", b"2")], "1.jpg is class 1 by one member and 2 by"),
        ([*jpg("1.jpg"), ("1.a.cls", b"1"), ("1.b.cls", b"2")], "is class 1 by 1.a.cls and 2 by 1.b.cls"),
        (
            [*jpg("1.jpg"), ("1.cls", b"1"), *jpg("2.jpg"), ("2.cls", b"cat")],
            "1 in sample 1.jpg is among names such as 'cat'",
        ),
        ([*jpg("1.jpg"), ("1.0.cls", b"1")], "no image belongs to 1.0.cls"),
    ],
)
def test_classes_that_contradict_each_other_or_are_of_no_image_are_refused(tmp_path, members, told):
    path = write(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=told) as refused:
        labelled(path)
    assert "--labels none" in str(refused.value)
    assert set(labelled(path, "none").values()) <= {None, "(label_file)"}


@pytest.mark.parametrize("names", [("1.jpg", "1.png", "1.cls"), ("1.a.jpg", "1.b.jpg", "2.a.jpg", "2.b.jpg")])
def test_several_images_of_one_name_need_the_option(tmp_path, names):
    path = write(tmp_path / "a.tar", [(name, b"0") for name in names])
    with pytest.raises(DataError, match=r"\d\.\S+ and \d\.\S+ may be an image and .*: --image-ext"):
        labelled(path)
    found = labelled(path, image_extensions=["jpg", "a.jpg"])
    assert found["1." + names[0][2:]] != "(beside_image)" == found[names[1]]


def test_links_lead_to_what_they_name_or_have_a_line(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, link in [
            ("d/3.png", tarfile.SYMTYPE, "../a/1.png"), ("d/4.png", tarfile.SYMTYPE, "3.png"),
            ("a/1.png", tarfile.REGTYPE, ""),
            ("a/1.cls", tarfile.REGTYPE, ""), ("a/2.png", tarfile.LNKTYPE, "a/1.png"),
            ("a/2.cls", tarfile.SYMTYPE, "1.cls"),
            ("b.png", tarfile.SYMTYPE, "b.png"), ("c.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("e.png", tarfile.CONTTYPE, ""),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 0 if link else 1
            archive.addfile(info, io.BytesIO(b"0"))
    no = "(unreadable)"
    assert labelled(tmp_path / "a.tar") == {
        "a/1.png": "0", "a/2.png": "0", "b.png": no, "c.png": no, "d/3.png": None, "d/4.png": None, "e.png": None,
    }  # fmt: skip


def block(name, size, kind=b"0"):
    data = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    data[124:136], data[156:157] = size.ljust(12, b"\0"), kind
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        block("a.png", b"-0000001000") + bytes(1536),
        block("a.png", b"-1") + bytes(1536),
        block("a.png", b"\xff" * 12) + bytes(1536),
        block("x", b"%011o" % 13, b"x") + b"13 mtime=inf\n".ljust(512, b"\0") + block("a.png", b"0") + bytes(1024),
        block("x", b"%011o" % 13, b"x") + b"13 mtime=nan\n".ljust(512, b"\0") + block("a.png", b"0") + bytes(1024),
        block("x", b"%011o" % 13, b"x") + b"13 size=-512\n".ljust(512, b"\0") + block("a.png", b"0") + bytes(1024),
        block("L", b"77777777777", b"L") + bytes(1024),
        (block("L", b"%011o" % 1, b"L") + b"a".ljust(512, b"\0")) * 3000
        + block("a.cls", b"-0000001000", b"1")
        + bytes(1024),
    ],
)
def test_what_headers_claim_ends_in_one_refusal(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a.tar"):
        list_inputs([str(tmp_path / "a.tar")])
    with pytest.raises(DataError, match=r"a.tar"):
        if b"mtime" in data:  # which nothing reads there
            raise DataError("a.tar")
        scan(str(tmp_path / "a.tar"), IndexSettings(), lambda: None)


def test_the_fingerprint_tells_labels_that_do_not_show_in_paths(tmp_path):
    urls = [
        write(tmp_path / f"{i}.tar", [("1.jpg", b"1"), ("1.cls", b"%d" % i), ("2.jpg", b"1"), ("2.cls", b"3")])
        for i in (1, 2)
    ]
    assert len({list_inputs([url]).fingerprint for url in urls}) == 2
    assert len({list_inputs([url], "none").fingerprint for url in urls}) == 1


# --- compressed ---


def write_zst(path, files=FILES):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: pip install 'ddpm-pipeline[zstd]'")
    plain = write_tar(path.with_suffix(".tmp"), files)
    with open(plain, "rb") as file:
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(file.read()))
    os.unlink(plain)
    return str(path)


def test_zstd_is_the_same_inputs_and_refused_when_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.tar.zst"
    assert contents([write_zst(path)]) == contents([write_tar(tmp_path / "a.tar")])
    whole = path.read_bytes()
    for data in (whole[:-20], whole[: len(whole) // 2], b"no zstd at all", whole[:40] + b"\xff" * 40 + whole[80:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read as a tar archive"):
            list_inputs([str(path)])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"pip install 'ddpm-pipeline\[zstd\]'"):
        list_inputs([str(path)])


@pytest.fixture
def no_unpacked_file() -> None:
    """Since Python 3.13 a refused archive may stay in a reference cycle, and its temporary file open, until this."""
    gc.collect()


@pytest.mark.usefixtures("no_unpacked_file")
@pytest.mark.parametrize("ending", ["tar.gz", "tar.zst"])
def test_workers_read_what_was_unpacked_once_and_nothing_is_left_behind(tmp_path, monkeypatch, ending):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = (write_tar if ending == "tar.gz" else write_zst)(tmp_path / f"a.{ending}")
    listing = list_inputs([path])
    os.unlink(path)  # nobody unpacks it again
    assert os.listdir(scratch) == []
    script = "import pickle, sys; sources, items = pickle.load(sys.stdin.buffer)\n"
    script += "from pipeline.data.sources.listing import Reader\n"
    script += "sys.stdout.buffer.write(b'|'.join(map(Reader(sources).read, items)))"
    given = pickle.dumps((listing.sources, listing.inputs[:]))
    worker = subprocess.run(
        [sys.executable, "-c", script], input=given, capture_output=True, env=ENVIRONMENT, check=True
    )
    assert worker.stdout == b"|".join(data for _, data in sorted(FILES.items()))
    assert held(scratch) == 2  # the file, and a place in it
    del listing
    gc.collect()
    assert held(scratch) == 0


def held(directory):
    """Open files of this process in a directory."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(str(directory) in os.readlink(link) for link in links if os.path.lexists(link))


@pytest.mark.usefixtures("no_unpacked_file")
def test_a_full_disk_is_told_with_the_variable_that_helps(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar.gz", {"big.png": os.urandom(1 << 20)})
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115  every write is ENOSPC
    with pytest.raises(DataError, match=r"a.tar.gz: no space left in .* to unpack it: .* variable TMPDIR"):
        list_inputs([path])
