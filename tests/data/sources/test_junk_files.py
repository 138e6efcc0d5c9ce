"""Junk files of operating systems: recognized by name in all sources, and not confused with images."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources.junk_files import is_junk
from pipeline.data.sources.listing import Reader, list_inputs

DEBRIS = [
    ".DS_Store", "cats/._1.png", "__MACOSX/data/cats/._1.png", "cats/Thumbs.db", "cats/thumbs.db", "dogs/Desktop.ini",
    "@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "cats/.ipynb_checkpoints/1-checkpoint.png", ".Trash-1000/files/1.png",
    ".thumbnails/normal/1.png", "$RECYCLE.BIN/S-1-5/1.png", "cats/Icon\r", "cats/1.png:Zone.Identifier", ".git/HEAD",
    ".cache/huggingface/download/1.png.metadata", "cats/.1.png.swp", "cats/1.png~", ".dropbox.cache/1.png",
]  # fmt: skip
IMAGES = [
    "cats/1.png",
    "dogs/.hidden.png",
    "cats/thumbs.png",
    "recycler/1.png",
    "Trash/1.png",
    "cats/_1.png",
    "cats/.1.png",
]


@pytest.mark.parametrize("path", DEBRIS)
def test_junk_is_known_by_its_name(path: str) -> None:
    assert is_junk(path)


@pytest.mark.parametrize("path", IMAGES)
def test_what_may_be_meant_is_no_junk(path: str) -> None:
    assert not is_junk(path)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "remote"])
def test_junk_is_a_line_of_its_own_and_no_class(tmp_path: Path, kind: str) -> None:
    place = tmp_path / f"source.{kind}"
    for name in (*DEBRIS, *IMAGES):
        file = place / name
        if kind in ("folder", "remote"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
    if kind == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name in (*DEBRIS, *IMAGES):
                archive.writestr(name, b"x")
    if kind == "tar":
        with tarfile.open(place, "w") as packed:
            for name in (*DEBRIS, *IMAGES):
                info = tarfile.TarInfo(name)
                info.size = 1
                packed.addfile(info, io.BytesIO(b"x"))
    url = str(place)
    if kind == "remote":
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").put(str(place), "/debris", recursive=True)
        url = "memory://debris"
    listing = list_inputs([url])
    reader, reasons = Reader(listing.sources), {}
    for item in listing.inputs:
        try:
            reader.read(item)
        except Rejected as rejected:
            reasons[item.path] = rejected.reason
    assert len(listing.inputs) == len(DEBRIS) + len(IMAGES)
    assert reasons == dict.fromkeys(DEBRIS, "system_file")
    assert listing.classes == ("Trash", "cats", "dogs", "recycler")
