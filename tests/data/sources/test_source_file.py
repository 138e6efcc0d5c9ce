"""Few files stay open, and all unpacked archives share one."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from pipeline.data.sources import source_file
from pipeline.data.sources.listing import Reader, list_inputs
from tests.attacks import PNG


def _tar(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    return file.getvalue()


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_more_archives_than_files_may_be_open(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_file, "_MOST_OPEN", 4)
    for i in range(12):
        data = _tar(f"{i}.png")
        (tmp_path / f"{i:02d}.{ending}").write_bytes(gzip.compress(data) if ending == "tar.gz" else data)
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = list_inputs([str(tmp_path / f"*.{ending}")], "none")
    reader = Reader(found.sources)
    assert [reader.read(item) for item in [*found.inputs, *reversed(found.inputs)]] == [PNG] * 24
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 5


def test_unpacked_bytes_are_freed_with_their_last_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = source_file._TemporaryFile()
    monkeypatch.setattr(source_file, "_TEMPORARY", store)
    (tmp_path / "a").write_bytes(b"x")
    file = source_file.SourceFile(str(tmp_path / "a"))
    assert file.unpack([b"one", b"two"]).read() == b"onetwo"
    kept = store.file
    assert kept.seek(0, 2) == 6
    del file
    assert store.file is not kept
