"""Sources: the same inputs from a directory or an archive; no file is lost in silence."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import fsspec
import pytest

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources.listing import Reader, list_inputs
from pipeline.errors import ConfigError, DataError

FILES = {
    "cats/a#b.jpg": b"hash",
    "cats/photo.1.jpg": b"one",
    "cats/photo.2.jpg": b"two",
    "cats/.hidden": b"dot",
    "dogs/deep/er/name with spaces.png": b"spaces",
    "dogs/" + "x" * 200 + ".png": b"long",
    "ünïcode/ärger.webp": "ö".encode(),
    "README": b"no extension, no folder",
    "empty.jpg": b"",
}


def write_directory(root, files=FILES):
    for name, data in files.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    return str(root)


def write_zip(path, files=FILES):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def write_tar(path, files=FILES, prefix=""):
    with tarfile.open(path, "w:gz" if str(path).endswith("gz") else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def contents(urls, labels="folder"):
    listing = list_inputs(urls, labels)
    # A worker gets the sources pickled and opens their files itself; the listing's own stay untouched.
    reader = Reader(pickle.loads(pickle.dumps(listing.sources)))
    data = [reader.read(item) for item in listing.inputs]
    assert data == list(reader.read_ahead(listing.inputs[:]))
    return [(item.name, item.label, item.size, content) for item, content in zip(listing.inputs, data)]


def opened(urls):
    listing = list_inputs(urls)
    return listing, Reader(listing.sources)


def test_directories_and_archives_of_the_same_files_are_the_same_inputs(tmp_path):
    directory = write_directory(tmp_path / "folder")
    expected = contents([directory])
    assert [(name, data) for name, _, _, data in expected] == sorted(FILES.items())
    assert contents([write_zip(tmp_path / "a.zip")]) == expected
    for name, prefix in [("a.tar", ""), ("b.tar", "./"), ("a.tar.gz", ""), ("a.tgz", "")]:
        assert contents([write_tar(tmp_path / name, prefix=prefix)]) == expected


def test_the_class_is_the_directory_that_a_file_lies_in(tmp_path):
    directory = write_directory(tmp_path / "folder")
    listing = list_inputs([directory])
    assert listing.classes == ("cats", "dogs", "er", "ünïcode")
    found = {item.name: item.label for item in listing.inputs}
    assert found["cats/a#b.jpg"] == 0 and found["dogs/deep/er/name with spaces.png"] == 2 and found["README"] is None
    assert list_inputs([directory], "none").classes is None
    flat = list_inputs([write_directory(tmp_path / "flat", {"1.png": b"1"})])
    assert flat.classes is None and flat.inputs[0].label is None


def test_names_that_are_not_utf8_are_read(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9", b"\xff\xfe.png")
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(b"data")
    ((name, _, _, data),) = contents([str(tmp_path)])
    assert os.fsencode(name) == b"caf\xe9/\xff\xfe.png" and data == b"data"


def test_sources_mix_and_equal_paths_in_two_of_them_stay_two(tmp_path):
    one = write_zip(tmp_path / "one.zip", {"cats/1.png": b"in one"})
    two = write_directory(tmp_path / "two", {"cats/1.png": b"in two", "dogs/1.png": b"dog"})
    assert contents([one, two]) == [
        ("one.zip/cats/1.png", 0, 6, b"in one"),
        ("two/cats/1.png", 0, 6, b"in two"),
        ("two/dogs/1.png", 1, 3, b"dog"),
    ]


def test_of_equal_names_in_one_archive_the_last_counts(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"first")
        archive.writestr("a.png", b"second")
    listing, reader = opened([str(tmp_path / "a.zip")])
    with pytest.raises(Rejected, match="scattered"):
        reader.read(listing.inputs[0])
    assert reader.read(listing.inputs[1]) == b"second" and len(listing.inputs) == 2


def test_the_fingerprint_tells_names_sizes_and_times(tmp_path):
    directory = write_directory(tmp_path / "folder")
    before = list_inputs([directory]).fingerprint
    assert list_inputs([directory]).fingerprint == before
    seen = {before}
    os.utime(f"{directory}/README", (1, 1))
    seen.add(list_inputs([directory]).fingerprint)
    os.rename(f"{directory}/README", f"{directory}/README2")
    seen.add(list_inputs([directory]).fingerprint)
    with open(f"{directory}/empty.jpg", "wb") as file:
        file.write(b"1")
    seen.add(list_inputs([directory]).fingerprint)
    assert len(seen) == 4
    same_size = [write_zip(tmp_path / f"{text}.zip", {"a.png": text.encode()}) for text in ("abc", "abd")]
    assert len({list_inputs([url]).fingerprint for url in same_size}) == 2


def test_links_are_followed_but_not_in_circles(tmp_path):
    directory = write_directory(tmp_path / "folder", {"a/1.png": b"1"})
    os.symlink("1.png", f"{directory}/a/2.png")
    os.symlink("..", f"{directory}/a/up")
    os.symlink("a", f"{directory}/b")
    os.symlink("nowhere", f"{directory}/broken.png")
    listing, reader = opened([directory])
    assert [item.name for item in listing.inputs] == ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "broken.png"]
    assert reader.read(listing.inputs[1]) == b"1"
    with pytest.raises(Rejected, match="source_changed"):
        reader.read(listing.inputs[4])


def test_only_regular_members_of_a_tar_are_inputs_and_hard_links_are(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, link in [
            ("a/1.png", tarfile.REGTYPE, ""),
            ("a/2.png", tarfile.LNKTYPE, "a/1.png"),
            ("a/passwd", tarfile.SYMTYPE, "/etc/passwd"),
            ("a/null", tarfile.CHRTYPE, ""),
            ("../../etc/cron.d/x", tarfile.REGTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"abc"))
    listing = list_inputs([str(tmp_path / "a.tar")])
    reader, items = Reader(listing.sources), listing.inputs[:]
    assert [(item.name, item.rejection) for item in items] == [
        ("../../etc/cron.d/x", None),
        ("a/1.png", None),
        ("a/2.png", None),
        ("a/passwd", ("unreadable", "a link to no file of its archive")),
    ]
    assert [reader.read(item) for item in items[:3]] == [b"abc"] * 3
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_tar_cut_or_damaged_anywhere_is_refused(tmp_path, ending):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.png": bytes([i]) * 600 for i in range(1, 4)})
    sound = path.read_bytes()
    end = 3 * (512 + 1024)
    target = tmp_path / f"b{ending}"

    def refused(data: bytes) -> bool:
        target.write_bytes(data if ending == ".tar" else gzip.compress(data))
        try:
            list_inputs([str(target)])
        except DataError as error:
            assert str(target) in str(error)
            return True
        return False

    assert not refused(sound)
    for cut in range(0, end + 1, 512):
        assert refused(sound[:cut]), cut
    for header in range(0, end, 1536):
        zeroed, flipped = bytearray(sound), bytearray(sound)
        zeroed[header : header + 512] = bytes(512)
        flipped[header + 3] ^= 1
        assert refused(bytes(zeroed)) and refused(bytes(flipped)), header


def test_a_gzip_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.tar.gz"
    write_tar(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as a tar archive"):
        list_inputs([str(path)])


@pytest.mark.parametrize(
    "system, flags, name, expected",
    [
        (0, 0, b"pets\\cats\\1.png", "pets/cats/1.png"),
        (3, 0, b"pets\\1.png", "pets\\1.png"),
        (0, 0, b"a/b\\1.png", "a/b\\1.png"),
        (3, 0, "Küche/猫.png".encode(), "Küche/猫.png"),
        (3, 0, b"K\x81che.png", "Küche.png"),
        (3, 1 << 11, b"K\x81.png", "K\udc81.png"),
        (0, 0, b"1.png\0.exe", "1.png"),
    ],
)
def test_names_in_a_zip_are_as_they_were_meant(tmp_path, system, flags, name, expected):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x" * len(name), b"abc")
    data = bytearray((tmp_path / "a.zip").read_bytes().replace(b"x" * len(name), name))
    at = data.index(b"PK\1\2")
    data[at + 5], data[at + 8 : at + 10] = system, flags.to_bytes(2, "little")
    (tmp_path / "a.zip").write_bytes(data)
    assert [item.name for item in list_inputs([str(tmp_path / "a.zip")], "none").inputs] == [expected]


def test_a_zip_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read as a zip archive"):
        list_inputs([str(path)])


def test_damaged_and_encrypted_members_are_unreadable(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad.png", b"payload")
        archive.writestr("locked.png", b"payload")
    data = bytearray(path.read_bytes())
    data[data.index(b"payload")] ^= 1
    for mark, flags in [(b"PK\3\4", 6), (b"PK\1\2", 8)]:  # the second entry's local and central header
        data[data.index(mark, data.index(mark) + 1) + flags] |= 1
    path.write_bytes(data)
    listing, reader = opened([str(path)])
    for item in listing.inputs:
        with pytest.raises(Rejected, match="unreadable"):
            reader.read(item)


@pytest.mark.parametrize("change", ["longer", "shorter", "rewritten", "removed"])
def test_a_file_that_changes_after_the_listing_is_noticed(tmp_path, change):
    path = tmp_path / "a.png"
    path.write_bytes(b"12345")
    listing, reader = opened([str(tmp_path)])
    (item,) = listing.inputs
    os.utime(path, ns=(1, item.stamp))
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes({"longer": b"123456", "shorter": b"1234", "rewritten": b"54321"}[change])
        if change != "rewritten":
            os.utime(path, ns=(1, item.stamp))
        else:
            os.utime(path, ns=(1, item.stamp + 1))
    with pytest.raises(Rejected, match="source_changed"):
        reader.read(item)


def test_missing_empty_and_foreign_sources_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no such file or directory: check the name"):
        list_inputs([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"not a single file in it"):
        list_inputs([str(tmp_path)])
    (tmp_path / "a.rar").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"a.rar is not of a kind that is read: give a directory, .zip, .*pattern"):
        list_inputs([str(tmp_path / "a.rar")])


def test_remote_sources_are_the_same_inputs(tmp_path):
    expected = contents([write_directory(tmp_path / "folder")])
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/set/{name}": data for name, data in FILES.items()})
    memory.pipe("/a.zip", Path(write_zip(tmp_path / "a.zip")).read_bytes())
    memory.pipe("/a.tar", Path(write_tar(tmp_path / "a.tar")).read_bytes())
    for url in ("memory://set", "memory://a.zip", "memory://a.tar"):
        assert contents([url]) == expected
    with pytest.raises(ConfigError, match="no such file or directory"):
        list_inputs(["memory://other"])


def test_reading_ahead_is_in_order_and_survives_bad_inputs(tmp_path):
    files = {f"{i:03d}.png": b"%d" % i for i in range(100)}
    listing, reader = opened([write_zip(tmp_path / "a.zip", files)])
    items = listing.inputs[:]
    items[7] = items[7]._replace(stamp=items[7].stamp ^ 1)
    items[9] = items[9]._replace(size=1 << 40)
    read = list(reader.read_ahead(items))
    assert read.pop(9).reason == "too_many_bytes" and read.pop(7).reason == "source_changed"
    assert read == [data for name, data in files.items() if name not in ("007.png", "009.png")]
    assert list(reader.read_ahead([])) == []


@pytest.mark.parametrize(("size", "most"), [(1, 33), (1 << 23, 9), (1 << 27, 2)])
def test_reading_ahead_holds_no_more_than_it_says(tmp_path, size, most):
    listing, _ = opened([write_directory(tmp_path / "folder", {f"{i:03d}.png": b"" for i in range(100)})])
    items = [item._replace(size=size) for item in listing.inputs]
    read = 0

    class Counted:
        parallel = False

        def read(self, item):
            nonlocal read
            read += 1
            return b""

    for position, _ in enumerate(Reader([Counted()]).read_ahead(items)):
        if position in (0, 50):
            time.sleep(0.5)  # in which a reader without bounds reads all
            assert read - position <= most
    assert read == 100


def test_an_object_that_changes_after_the_listing_is_noticed(tmp_path):
    directory = write_directory(tmp_path / "folder", {"a.png": b"123", "b.png": b"456"})
    listing, reader = opened([f"local://{directory}"])
    assert reader.read(listing.inputs[0]) == b"123"
    os.utime(f"{directory}/a.png", (1, 1))
    os.unlink(f"{directory}/b.png")
    for item in listing.inputs:
        with pytest.raises(Rejected, match="source_changed"):
            reader.read(item)


def test_reading_ahead_ends_with_its_reader_and_passes_errors_of_stores_on(tmp_path):
    listing, reader = opened([write_directory(tmp_path / "folder")])
    before = threading.active_count()
    ahead = reader.read_ahead(listing.inputs[:])
    next(ahead)
    ahead.close()
    assert threading.active_count() <= before  # a thread of an earlier test may end meanwhile

    class Gone:
        parallel = True

        def read(self, item):
            raise DataError("out of reach")

    with pytest.raises(DataError, match="out of reach"):
        list(Reader([Gone()]).read_ahead(listing.inputs[:]))
    assert threading.active_count() <= before  # a thread of an earlier test may end meanwhile


def test_objects_of_a_store_are_read_by_several_threads_at_once(tmp_path):
    listing, _ = opened([write_directory(tmp_path / "folder", {f"{i:02d}.png": b"%d" % i for i in range(32)})])
    together = threading.Barrier(8, timeout=60)

    class Store:
        parallel = True

        def read(self, item):
            together.wait()
            return item.name.encode()

    names = [data.decode() for data in Reader([Store()]).read_ahead(listing.inputs[:])]
    assert names == [item.name for item in listing.inputs]


def test_a_stop_is_heard_while_listing(tmp_path):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    sources = [write_directory(tmp_path / "folder"), write_zip(tmp_path / "a.zip"), write_tar(tmp_path / "a.tar.gz")]
    for url in [*sources, write_tar(tmp_path / "a.tar"), f"{sources[0]}/*/*.jpg"]:
        with pytest.raises(Stop):
            list_inputs([url], check_stop=stop)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_that_is_replaced_after_the_listing_is_noticed(tmp_path, name):
    path = tmp_path / name
    write = write_zip if name == "a.zip" else write_tar
    write(path, {"1.png": b"before"})
    listing = list_inputs([str(path)])
    given = pickle.dumps(listing.sources)
    write(path, {"1.png": b"afterwards"})
    reader = Reader(pickle.loads(given))
    if name == "a.tar.gz":  # unpacked already
        assert reader.read(listing.inputs[0]) == b"before"
    else:
        with pytest.raises(Rejected, match="source_changed"):
            reader.read(listing.inputs[0])


def test_an_archive_behind_other_bytes_and_with_a_64_bit_directory_is_read(tmp_path, monkeypatch):
    plain = Path(write_zip(tmp_path / "a.zip"))
    (tmp_path / "b.zip").write_bytes(b"#!a program that unpacks itself\n" + plain.read_bytes())
    assert contents([str(tmp_path / "b.zip")]) == contents([str(plain)])
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    large = Path(write_zip(tmp_path / "c.zip"))
    assert b"PK\6\6" in large.read_bytes()
    assert contents([str(large)]) == contents([str(plain)])


def test_every_way_to_pack_a_zip_is_read_or_unreadable(tmp_path):
    files = {name: name.encode() * 50 for name in ("stored", "deflated", "bzip2", "lzma", "unknown")}
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, method in zip(files, (0, 8, 12, 14, 0)):
            archive.writestr(name, files[name], method)
    data = bytearray(path.read_bytes())
    data[data.index(b"unknown") - 22] = 99  # the method in its own header
    path.write_bytes(data)
    listing, reader = opened([str(path)])
    read = {item.name: data for item, data in zip(listing.inputs, reader.read_ahead(listing.inputs[:]))}
    assert read.pop("unknown").reason == "unreadable"
    assert read == {name: data for name, data in files.items() if name != "unknown"}


def test_a_zip_cut_or_flipped_anywhere_is_refused_or_costs_members(tmp_path):
    path = Path(write_zip(tmp_path / "a.zip", {f"{i}.png": bytes([i]) * 40 for i in range(4)}))
    whole = path.read_bytes()
    sound = {data for *_, data in contents([str(path)])}
    for at in range(len(whole)):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]):
            path.write_bytes(data)
            try:
                listing, reader = opened([str(path)])
            except DataError:
                continue
            assert len(data) == len(whole)
            for item in reader.read_ahead(listing.inputs[:]):
                assert isinstance(item, Rejected) or item in sound
