"""Files appear complete or not at all, the same on a disk and on an object store."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.storage import files
from pipeline.storage.files import join


@pytest.fixture(params=["path", "file://", "memory://"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty directory, by each kind of name."""
    if request.param == "memory://":
        url = f"memory://{uuid.uuid4().hex}"
        yield url
        files.remove(url)
    else:
        yield ("file://" if request.param == "file://" else "") + str(tmp_path / "place")


# --- both kinds alike ---


def test_what_is_written_is_read(place: str) -> None:
    url = join(place, "a", "b.bin")
    assert not files.exists(url)
    files.write_bytes(url, bytes(range(256)))
    assert files.exists(url) and not files.is_dir(url)
    assert files.is_dir(join(place, "a"))
    assert files.size(url) == 256
    assert files.read_bytes(url) == bytes(range(256))
    with files.open_read(url, 250) as file:
        assert file.read(3) == bytes([250, 251, 252])
        assert file.read() == bytes([253, 254, 255])


def test_names_are_listed_sorted_and_without_what_lies_deeper(place: str) -> None:
    assert files.listdir(place) == []
    for name in ("b", "a", "c/deep/x", "c.txt"):
        files.write_bytes(join(place, name), b"1")
    assert files.listdir(place) == ["a", "b", "c", "c.txt"] == files.listdir(place + "/")
    assert files.listdir(join(place, "c")) == ["deep"]
    assert files.listdir(join(place, "a")) == []  # a file


def test_a_file_appears_only_when_the_block_ends_well(place: str) -> None:
    url = join(place, "x")
    with files.publishing(url) as file:
        file.write(b"half")
        file.flush()
        assert not files.exists(url)
    assert files.read_bytes(url) == b"half"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_leaves_nothing_new_and_the_old_untouched(place: str, error: type[BaseException]) -> None:
    files.write_bytes(join(place, "old"), b"old")
    for name in ("old", "new"):
        with pytest.raises(error), files.publishing(join(place, name)) as file:
            file.write(b"half a fi")
            raise error
    assert files.listdir(place) == ["old"]
    assert files.read_bytes(join(place, "old")) == b"old"


def test_a_reader_sees_the_old_or_the_new_file_and_nothing_between(place: str) -> None:
    url = join(place, "x")
    files.write_bytes(url, b"old" * 1000)
    with files.publishing(url) as file:
        file.write(b"new" * 500)
        assert files.read_bytes(url) == b"old" * 1000
        file.write(b"new" * 500)
    assert files.read_bytes(url) == b"new" * 1000


def test_a_file_that_is_open_keeps_its_content_when_replaced(tmp_path: Path) -> None:
    url = str(tmp_path / "x")
    files.write_bytes(url, b"old")
    with files.open_read(url) as file:
        files.write_bytes(url, b"new")
        assert file.read() == b"old"


def test_remove_takes_files_and_trees_and_nothing_else(place: str) -> None:
    for name in ("f", "f2", "tree/a", "tree/sub/b", "tree2/a"):
        files.write_bytes(join(place, name), b"1")
    files.remove(join(place, "f"))
    files.remove(join(place, "tree"))
    files.remove(join(place, "never was"))
    assert files.listdir(place) == ["f2", "tree2"]
    assert not files.exists(join(place, "tree", "sub", "b"))


@pytest.mark.parametrize("name", ["run*", "run?", "run[12]"])
def test_a_name_that_looks_like_a_pattern_is_a_name(place: str, name: str) -> None:
    for each in (name, "run1"):
        files.write_bytes(join(place, each), b"1")
    files.remove(join(place, name))
    assert files.listdir(place) == ["run1"]


def test_two_files_may_be_written_at_once(place: str) -> None:
    with pytest.raises(RuntimeError), files.publishing(join(place, "outer")) as file:
        file.write(b"half")
        files.write_bytes(join(place, "inner"), b"whole")
        raise RuntimeError
    assert files.listdir(place) == ["inner"]


def test_a_missing_file_is_an_error(place: str) -> None:
    for look in (files.read_bytes, files.open_read, files.size, files.read_json):
        with pytest.raises(FileNotFoundError):
            look(join(place, "none"))


@pytest.mark.parametrize("name", ["a#b", "a b", "a%20b", "ä", "a?b", "a:b", ".hidden"])
def test_no_character_of_a_name_is_special(place: str, name: str) -> None:
    files.write_bytes(join(place, name), b"1")
    assert files.listdir(place) == [name]
    assert files.read_bytes(join(place, name)) == b"1"


def test_json_round_trips_and_equal_values_give_equal_bytes(place: str) -> None:
    value = {"a": [1, 2.5, None, True], "ü": {"b": "x\ny"}}
    files.write_json(join(place, "1.json"), value)
    files.write_json(join(place, "2.json"), json.loads(json.dumps(value)))
    assert files.read_json(join(place, "1.json")) == value
    data = files.read_bytes(join(place, "1.json"))
    assert data == files.read_bytes(join(place, "2.json"))
    assert data.isascii() and data.endswith(b"\n")


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b"\x00" * 64, b"\xff\xfe"])
def test_json_that_is_damaged_is_reported_in_one_line(place: str, data: bytes) -> None:
    url = join(place, "x.json")
    files.write_bytes(url, data)
    with pytest.raises(DataError) as caught:
        files.read_json(url)
    message = str(caught.value)
    what = "has only 0 bytes" if files.is_remote(url) and not data else "is not JSON"
    assert url in message and what in message and "restore it" in message and "\n" not in message


def test_make_dirs_may_be_repeated(place: str) -> None:
    for _ in range(2):
        files.make_dirs(join(place, "a", "b"))
    assert files.is_dir(join(place, "a", "b")) or files.is_remote(place)  # object stores have no directories


def test_a_file_is_created_once(place: str) -> None:
    url = join(place, "deep", "lease")
    assert files.create(url, b"mine")
    assert not files.create(url, b"yours")
    assert files.read_bytes(url) == b"mine"
    assert files.listdir(join(place, "deep")) == ["lease"]
    files.remove(url)
    assert files.create(url, b"yours")


def test_what_need_not_last_is_as_whole_as_the_rest(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise AssertionError("nobody asked to wait for the disk")

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_bytes(join(place, "beat"), b"1", durable=False)
    files.write_bytes(join(place, "beat"), b"2", durable=False)
    assert files.read_bytes(join(place, "beat")) == b"2" and files.listdir(place) == ["beat"]


# --- exclusive creation on a disk ---


def test_of_many_processes_one_creates_a_file_and_none_sees_a_part(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pipeline.storage import files\n"
        "made, torn, size = 0, 0, 200_000\n"
        "for i in range(40):\n"
        "    made += files.create(f'{sys.argv[1]}/{i}', os.urandom(size))\n"
        "    torn += len(files.read_bytes(f'{sys.argv[1]}/{i}')) != size\n"
        "print(made, torn)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    crowd = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    counts = [tuple(map(int, process.communicate()[0].split())) for process in crowd]
    assert sum(made for made, _ in counts) == 40 and all(torn == 0 for _, torn in counts)
    assert len(os.listdir(tmp_path)) == 40


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES])
def test_a_file_system_without_links_creates_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    assert files.create(str(tmp_path / "x"), b"mine")
    assert not files.create(str(tmp_path / "x"), b"yours")
    assert (tmp_path / "x").read_bytes() == b"mine" and os.listdir(tmp_path) == ["x"]


def test_a_link_that_was_made_although_it_is_said_to_exist_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS says when it has repeated a request."""
    link = os.link

    def repeat(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeat)
    assert files.create(str(tmp_path / "x"), b"mine")


def test_a_place_that_refuses_creation_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DataError) as caught:
        files.create(str(tmp_path / "x"), b"1")
    _one_line(caught, str(tmp_path / "x"), "no space left")
    assert os.listdir(tmp_path) == []


def test_free_space_is_that_of_the_disk_the_place_will_be_on(tmp_path: Path) -> None:
    free = files.free_bytes(str(tmp_path / "not" / "yet"))
    there = os.statvfs(tmp_path)
    assert free is not None and abs(free - there.f_bavail * there.f_frsize) < 1 << 30
    assert files.free_bytes("memory://x") is None


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_directories_that_cannot_be_synced_are_let_off_and_failing_disks_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    if code == errno.EIO:
        with pytest.raises(DataError, match="Input/output"):
            files.sync_dir(str(tmp_path))
    else:
        files.sync_dir(str(tmp_path))


# --- names ---


def test_only_other_protocols_are_remote() -> None:
    remote = {"s3://b/k", "memory://x", "gs://b", "zip://a::file:///b.zip"}
    assert {url for url in remote | {"a/b", "/a", "file:///a", "C:/x", "a:b"} if files.is_remote(url)} == remote


def test_join_keeps_protocols() -> None:
    assert join("s3://b/p/", "x", "y") == "s3://b/p/x/y"
    assert join("a", "b") == "a/b"


def test_an_unknown_protocol_is_a_mistake_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"^s9://b/k: .*give a local path, or install the fsspec package of this URL"):
        files.exists("s9://b/k")


# --- a disk that fails ---


def _one_line(caught: pytest.ExceptionInfo[DataError], url: str, reason: str) -> None:
    message = str(caught.value)
    assert message.startswith(f"cannot write {url}: {reason}") and "\n" not in message


def test_a_file_where_a_directory_is_needed_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name, reason in (
        ("file/x", "a file of this name is in the way"),
        ("file/y/x", "a part of this path is a file"),
    ):
        with pytest.raises(DataError) as caught:
            files.write_bytes(str(tmp_path / name), b"1")
        _one_line(caught, str(tmp_path / name), reason)
    with pytest.raises(DataError):
        files.make_dirs(str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["dir", "n" * 300])
def test_a_name_that_cannot_be_written_is_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / "dir").mkdir()
    with pytest.raises(DataError):
        files.write_bytes(str(tmp_path / name), b"1")
    assert os.listdir(tmp_path) == ["dir"]


@pytest.mark.parametrize(
    "mode",
    [
        0o555,
        0o600,
    ],
    ids=["read-only", "not searchable"],
)
def test_a_directory_without_permission_is_reported(mode: int) -> None:
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to others
        os.chmod(directory, mode)
        if (child := os.fork()) == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)  # root may write anywhere
                files.write_bytes(f"{directory}/x", b"1")
            except BaseException as error:
                os.write(write, f"{type(error).__name__} {error}".encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            message = pipe.read()
        os.waitpid(child, 0)
        os.chmod(directory, 0o700)
    reason = "permission denied: choose another place or change its permissions"
    assert message == f"DataError cannot write {directory}/x: {reason}"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "disk quota exceeded: free some space"),
        (errno.EROFS, "the file system is read-only: choose another place"),
    ],
)
def test_a_disk_that_refuses_is_reported_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    """The same as below for machines that may not mount: the error comes when the file is flushed."""
    url = str(tmp_path / "x")
    files.write_bytes(url, b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DataError) as caught:
        files.write_bytes(url, b"new")
    _one_line(caught, url, reason)
    assert os.listdir(tmp_path) == ["x"]
    assert files.read_bytes(url) == b"old"


_UNSHARE = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
_MOUNT = 'mount -t tmpfs -o size=64k tmpfs "$1"'


def _may_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    with tempfile.TemporaryDirectory() as directory:
        command = [*_UNSHARE, "sh", "-c", _MOUNT, "sh", directory]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _on_a_tiny_disk(directory: Path, code: str) -> list[str]:
    """Lines that `code` prints, run with D = a file system of 64 KiB in a mount namespace of its own."""
    prelude = (
        "import os, subprocess, sys\nfrom pipeline.storage import files\nfrom pipeline.errors import PipelineError\n"
        "D = sys.argv[1]\ndef attempt(call, *arguments):\n"
        "    try: call(*arguments); print('done')\n"
        "    except PipelineError as error: print(type(error).__name__, error)\n"
    )
    shell = [*_UNSHARE, "sh", "-c", f'{_MOUNT} && exec "$2" -c "$3" "$1"', "sh", str(directory)]
    done = subprocess.run([*shell, sys.executable, prelude + code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


if _may_mount():  # many containers may not

    def test_a_full_disk_is_reported_and_the_old_file_stays(tmp_path: Path) -> None:
        lines = _on_a_tiny_disk(
            tmp_path,
            "files.write_bytes(D + '/x', b'old')\n"
            "attempt(files.write_bytes, D + '/x', bytes(100_000))\n"
            "print(os.listdir(D), files.read_bytes(D + '/x'))\n"
            "os.remove(D + '/x'); attempt(files.write_bytes, D + '/x', bytes(50_000))\n",
        )
        assert lines[0].startswith(f"DataError cannot write {tmp_path}/x: no space left: free some, then")
        assert lines[1:] == ["['x'] b'old'", "done"]  # and no temporary file holds the space

    def test_a_read_only_disk_is_reported(tmp_path: Path) -> None:
        lines = _on_a_tiny_disk(
            tmp_path,
            "files.write_bytes(D + '/x', b'old')\n"
            "subprocess.run(['mount', '-o', 'remount,ro', D], check=True)\n"
            "attempt(files.write_bytes, D + '/x', b'new')\nattempt(files.make_dirs, D + '/y/z')\n"
            "print(files.read_bytes(D + '/x'))\n",
        )
        reason = "the file system is read-only: choose another place"
        assert lines == [
            f"DataError cannot write {tmp_path}/x: {reason}",
            f"DataError cannot write {tmp_path}/y/z: {reason}",
            "b'old'",
        ]

    def test_what_cannot_be_removed_is_reported(tmp_path: Path) -> None:
        lines = _on_a_tiny_disk(
            tmp_path,
            "files.write_bytes(D + '/t/x', b'old')\n"
            "subprocess.run(['mount', '-o', 'remount,ro', D], check=True)\n"
            "attempt(files.remove, D + '/t')\nattempt(files.remove, D + '/t/x')\n",
        )
        assert [line.split()[0] for line in lines] == ["DataError", "DataError"]


def test_a_kill_while_writing_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pipeline.storage import files\n"
        "with files.publishing(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('written', flush=True); time.sleep(60)\n"
    )
    for _ in range(2):
        target = str(tmp_path / "x")
        with subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline() == b"written\n"
            process.send_signal(signal.SIGKILL)
        assert not files.exists(target)
    assert all(name.startswith(".x.") and name.endswith(".tmp") for name in os.listdir(tmp_path))
    files.write_bytes(target, b"whole")
    assert files.read_bytes(target) == b"whole"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after a rename must not leave an empty file: content, then name, then directory."""
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        what = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else ""
        happened.append("directory" if what == str(tmp_path) else f"file of {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def replaced(source: str, target: str) -> None:
        happened.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    files.write_bytes(str(tmp_path / "x"), bytes(1000))
    assert happened == ["file of 1000", "name", "directory"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_that_cannot_sync_is_written_to(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_bytes(str(tmp_path / "x"), b"1")
    assert files.create(str(tmp_path / "y"), b"2")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("zero", "a device"), ("", "a directory")):
        with pytest.raises(DataError, match=kind):
            files.read_bytes(str(tmp_path / name))


def test_only_files_that_this_module_has_named_are_unfinished(tmp_path: Path) -> None:
    for name in (
        ".a.tar.0123abcd.tmp",
        ".mine.tmp",
        ".b.tar.0123abcd.tmp",
        ".a.tar.0123ABCD.tmp",
        "a.tar.0123abcd.tmp",
    ):
        (tmp_path / name).write_bytes(b"123")
    (tmp_path / ".a.tar.00000000.tmp").mkdir()
    assert files.unfinished(str(tmp_path), lambda name: name == "a.tar") == {".a.tar.0123abcd.tmp": 3}
