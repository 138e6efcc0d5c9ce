"""A store that fails is asked again; what cannot heal is told in one line."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import ConfigError, DataError
from pipeline.storage import files


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
    files.write_bytes("memory://unwell/poem", bytes(range(200)))
    yield "memory://unwell/poem"
    files.remove("memory://unwell")


def test_a_stream_that_breaks_or_ends_early_is_taken_up_where_it_was_good(
    poem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files.retries()
    Unwell(monkeypatch, ConnectionResetError("reset"), 70, 0, TimeoutError("late"), 1)
    with files.open_read(poem, 10) as file:
        assert file.read() == bytes(range(10, 200))
    assert files.retries() == before + 5


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError])
def test_what_cannot_heal_is_not_tried_again(
    poem: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    unwell = Unwell(monkeypatch, error("no"))
    with pytest.raises((DataError, FileNotFoundError, TypeError)):
        files.read_bytes(poem)
    assert unwell.asked == 1


def test_a_store_that_stays_unwell_is_given_up_in_time_and_named(poem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_IO_TIMEOUT", "0.5")
    unwell = Unwell(monkeypatch, *[OSError("the store\nis unwell")] * 100_000)
    with pytest.raises(DataError) as caught:
        files.read_bytes(poem)
    assert str(caught.value).startswith(f"cannot read {poem}: the store is unwell: tried for 0.5 s; run the same")
    assert unwell.asked > 1
    for text in ("soon", "nan", "inf"):
        monkeypatch.setenv("DDPM_IO_TIMEOUT", text)
        with pytest.raises(ConfigError, match=f"DDPM_IO_TIMEOUT is '{text}': give seconds, such as 60"):
            files.read_bytes(poem)


@pytest.mark.parametrize("method", ["info", "ls", "find", "pipe_file", "put_file", "rm_file"])
def test_every_remote_operation_is_repeated(poem: str, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    good, failed = getattr(MemoryFileSystem, method), []

    def fail_once(fs: MemoryFileSystem, *arguments: object, **settings: object) -> object:
        if not failed:
            failed.append(arguments)
            raise OSError("unwell")
        return good(fs, *arguments, **settings)

    directory, before = poem.removesuffix("/poem"), files.retries()
    monkeypatch.setattr(MemoryFileSystem, method, fail_once)
    assert files.listdir(directory) == ["poem"]
    assert files.find(directory)["poem"]["size"] == 200
    files.write_bytes(f"{directory}/small", b"1")
    with files.publishing(f"{directory}/large") as file:
        file.write(b"2")
    files.remove(poem)
    assert files.listdir(directory) == ["large", "small"]
    assert failed and files.retries() == before + 1


def test_retries_are_noted_once_a_minute_in_one_line(
    poem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.monotonic() + 1000
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for later in (0, 1, 59, 2):  # seconds since the one before
        now += later
        Unwell(monkeypatch, OSError("un\nwell"), OSError("worse"))
        files.read_bytes(poem)
    assert capsys.readouterr().err == f"retrying {poem}: un well\n" * 2


def test_a_server_without_parts_is_an_error(poem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda fs, path, start, end: bytes(range(200)))
    assert files.read_bytes(poem) == bytes(range(200))
    with pytest.raises(DataError, match="gives whole files only, not parts"), files.open_read(poem, 10) as file:
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
    assert files.create("memory://unwell/lease", b"mine")
    assert len(asked) == 2
    assert not files.create("memory://unwell/lease", b"yours")
    files.remove("memory://unwell")


def test_a_store_without_exclusive_creation_looks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    upload = MemoryFileSystem.pipe_file

    def pipe_file(fs: MemoryFileSystem, path: str, value: bytes) -> None:
        upload(fs, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    assert files.create("memory://unwell/lease", b"mine")
    assert not files.create("memory://unwell/lease", b"yours")
    assert files.read_bytes("memory://unwell/lease") == b"mine"
    files.remove("memory://unwell")
