"""A store that fails is asked again; what cannot heal is told in one line."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import storage
from pipeline.errors import ConfigError, DataError


class Unwell:
    """Lets reads from the memory file system fail: one after the other, an error is raised or the bytes are cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Exception | int) -> None:
        self.answers, self.asked = list(answers), 0
        read = MemoryFileSystem.cat_file

        def cat_file(fs: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
            self.asked += 1
            answer = self.answers.pop(0) if self.answers else None
            if isinstance(answer, Exception):
                raise answer
            return read(fs, path, start=start, end=end)[:answer]

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def poem() -> Iterator[str]:
    storage.write_bytes("memory://unwell/poem", bytes(range(200)))
    yield "memory://unwell/poem"
    storage.remove("memory://unwell")


def test_a_stream_that_breaks_or_ends_early_is_taken_up_where_it_was_good(
    poem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = storage.retries()
    Unwell(monkeypatch, ConnectionResetError("reset"), 70, 0, TimeoutError("late"), 1)
    with storage.open_read(poem, 10) as file:
        assert file.read() == bytes(range(10, 200))
    assert storage.retries() == before + 5


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError])
def test_what_cannot_heal_is_not_tried_again(
    poem: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    unwell = Unwell(monkeypatch, error("no"))
    with pytest.raises((DataError, FileNotFoundError, TypeError)):
        storage.read_bytes(poem)
    assert unwell.asked == 1


def test_a_store_that_stays_unwell_is_given_up_in_time_and_named(poem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_IO_TIMEOUT", "0.5")
    unwell = Unwell(monkeypatch, *[OSError("the store\nis unwell")] * 100_000)
    with pytest.raises(DataError) as caught:
        storage.read_bytes(poem)
    assert str(caught.value).startswith(f"cannot read {poem}: the store is unwell: tried for 0.5 s; run the same")
    assert unwell.asked > 1
    monkeypatch.setenv("DDPM_IO_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="DDPM_IO_TIMEOUT is 'soon': give seconds, such as 60"):
        storage.read_bytes(poem)


@pytest.mark.parametrize("method", ["info", "ls", "find", "pipe_file", "put_file", "rm_file"])
def test_every_remote_operation_is_repeated(poem: str, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    good, failed = getattr(MemoryFileSystem, method), []

    def fail_once(fs: MemoryFileSystem, *arguments: object, **settings: object) -> object:
        if not failed:
            failed.append(arguments)
            raise OSError("unwell")
        return good(fs, *arguments, **settings)

    folder, before = poem.removesuffix("/poem"), storage.retries()
    monkeypatch.setattr(MemoryFileSystem, method, fail_once)
    assert storage.listdir(folder) == ["poem"]
    assert storage.find(folder)["poem"]["size"] == 200
    storage.write_bytes(f"{folder}/small", b"1")
    with storage.publishing(f"{folder}/large") as file:
        file.write(b"2")
    storage.remove(poem)
    assert storage.listdir(folder) == ["large", "small"]
    assert failed and storage.retries() == before + 1


def test_retries_are_noted_once_a_minute_in_one_line(
    poem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.monotonic() + 1000
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for later in (0, 1, 59, 2):  # seconds since the one before
        now += later
        Unwell(monkeypatch, OSError("un\nwell"), OSError("worse"))
        storage.read_bytes(poem)
    assert capsys.readouterr().err == f"retrying {poem}: un well\n" * 2


def test_a_server_without_parts_is_told_instead_of_misread(poem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda fs, path, start, end: bytes(range(200)))
    assert storage.read_bytes(poem) == bytes(range(200))
    with pytest.raises(DataError, match="gives whole files only, not parts"), storage.open_read(poem, 10) as file:
        file.read(5)


def test_creation_whose_answer_was_lost_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    upload = MemoryFileSystem.pipe_file
    asked = []

    def lose_answer(fs: MemoryFileSystem, path: str, value: bytes, mode: str) -> None:
        asked.append(path)
        upload(fs, path, value, mode=mode)
        if len(asked) == 1:
            raise ConnectionResetError("reset")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lose_answer)
    assert storage.create("memory://unwell/lease", b"mine")
    assert len(asked) == 2
    assert not storage.create("memory://unwell/lease", b"yours")
    storage.remove("memory://unwell")


def test_a_store_without_exclusive_creation_looks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    upload = MemoryFileSystem.pipe_file

    def pipe_file(fs: MemoryFileSystem, path: str, value: bytes) -> None:
        upload(fs, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    assert storage.create("memory://unwell/lease", b"mine")
    assert not storage.create("memory://unwell/lease", b"yours")
    assert storage.read_bytes("memory://unwell/lease") == b"mine"
    storage.remove("memory://unwell")
