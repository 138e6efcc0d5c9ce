"""Local and remote files through one interface: open, list, publish, remove.

No other module renames or deletes files. A file appears under its name complete or not at all: a local file is written
under a temporary name, flushed to the disk and renamed; on an object store a single upload is already atomic.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from pipeline import untrusted
from pipeline.errors import DataError
from pipeline.storage import local_disk, remote

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOENT}
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


def is_remote(url: str) -> bool:
    """Whether `url` names a protocol other than the local file system."""
    return "://" in url and not url.startswith("file://")


def local(url: str) -> Path:
    """The path of a local name, with or without `file://`."""
    return Path(url.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """`base/part/…`, for paths and URLs alike."""
    return "/".join([base.rstrip("/"), *parts])


def retries() -> int:
    """How often this process has repeated remote operations so far."""
    return remote.RETRIES.count


def _info(url: str) -> dict[str, Any] | None:
    with suppress(FileNotFoundError):
        return remote.info(url)
    return None


def exists(url: str) -> bool:
    """Whether a file or directory of this name exists."""
    return _info(url) is not None if is_remote(url) else local(url).exists()


def is_dir(url: str) -> bool:
    """Whether `url` is a directory, or on an object store the prefix of a file."""
    return (_info(url) or {}).get("type") == "directory" if is_remote(url) else local(url).is_dir()


def listdir(url: str) -> list[str]:
    """Sorted names directly under `url`; none if it does not exist."""
    if not is_remote(url):
        return sorted(os.listdir(local(url))) if local(url).is_dir() else []
    with suppress(FileNotFoundError):
        return sorted(remote.attempt(url, _entries)) if is_dir(url) else []
    return []


def _entries(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    infos = {info["name"].rstrip("/"): info for info in fs.ls(path, detail=True)}
    return {name.rsplit("/", 1)[-1]: info for name, info in infos.items() if name != path.rstrip("/")}


def sizes(url: str) -> dict[str, int]:
    """Bytes of each file directly under `url`, by one listing; empty if there is no such directory."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if is_remote(url):
            listed = remote.attempt(url, _entries)
            return {name: info["size"] or 0 for name, info in listed.items() if info["type"] == "file"}
        return {path.name: path.stat().st_size for path in local(url).iterdir() if path.is_file()}
    return {}


def find(url: str) -> dict[str, dict[str, Any]]:
    """Every file below a remote directory: relative path → `fsspec`'s info; empty if there is no such directory."""
    with suppress(FileNotFoundError):
        found = remote.attempt(url, lambda fs, path: {path: fs.find(path, detail=True)})
        return {name[len(path) :].lstrip("/"): info for path, infos in found.items() for name, info in infos.items()}
    return {}


def info(url: str) -> dict[str, Any]:
    """`fsspec`'s info of a remote file, such as its `size`.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the store cannot be read.
    """
    return remote.info(url)


def glob(pattern: str) -> dict[str, dict[str, Any]]:
    """The files and directories that match a remote pattern: URL, written as the pattern is → `fsspec`'s info."""

    def matches(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
        store = pattern.removesuffix(path)
        infos = fs.glob(path, detail=True).items()
        # A web server's page of a directory has links that sort it, `?C=N`, beside those to its files.
        return {store + name: info for name, info in infos if "?" not in name or "?" in path or store}

    return remote.described(remote.attempt(pattern, matches))


def size(url: str) -> int:
    """Bytes in a file.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the store cannot be read, or does not tell the size.
    """
    if not is_remote(url):
        return local(url).stat().st_size
    if (length := remote.info(url)["size"]) is None:
        raise DataError(f"{url}: its server does not give its size: copy it to a disk or an object store first")
    return int(length)


def free_bytes(url: str) -> int | None:
    """Bytes that this user may still write below a local path, which need not exist; None if unknown."""
    return None if is_remote(url) else local_disk.free_bytes(local(url))


def open_read(url: str, offset: int = 0, length: int | None = None) -> BinaryIO:
    """Open for reading at a byte offset: a seek locally, range requests remotely, repeated if a connection breaks.

    If the caller knows the `length` of the whole file, the store is not asked for it.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a device, pipe or directory, or a store that cannot be read; reading from the file raises it too.
    """
    if not is_remote(url):
        file = local_disk.open_regular(local(url))
    else:
        file = cast(BinaryIO, remote.open_ranges(url, size(url) if length is None else length))
    file.seek(offset)
    return file


def read_bytes(url: str, *, pipes: bool = False, at_most: int | None = None) -> bytes:
    """Read a whole file; with `pipes` also a pipe, such as a shell makes of `<(command)`.

    For a file of no more than `at_most` bytes a store gets one request, whose answer may be cut short.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is not a regular file, or cannot be read.
    """
    if pipes and not is_remote(url) and local(url).is_fifo():
        return local(url).read_bytes()
    if at_most and is_remote(url):
        return remote.read_range(url, 0, at_most)
    with open_read(url) as file:
        return file.read()


def sha256(url: str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open_read(url) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(url: str, length: int | None = None) -> Any:
    """Read a JSON file; a store gets one request if the file is not large, or if the caller knows its `length`.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: `untrusted.parse_json` refuses its content.
    """
    if length is None and is_remote(url):
        data = remote.read_range(url, 0, remote.BLOCK_BYTES)
        with suppress(DataError):  # a large file, or an answer that was cut short
            return untrusted.parse_json(data, url)
    with open_read(url, length=length) as file:
        return untrusted.parse_json(file.read(untrusted.MAX_JSON_BYTES + 1), url)


def make_dirs(url: str) -> None:
    """Create a directory and its parents; object stores have none."""
    if not is_remote(url):
        with local_disk.explained(url):
            local(url).mkdir(parents=True, exist_ok=True)


@contextmanager
def publishing(url: str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that appears as `url` only if the block ends without an exception.

    `durable` waits until the data survives a power cut; local files only.

    Raises:
        DataError: no space left, not permitted, or the store cannot be reached; no partial file stays.
    """
    if is_remote(url):
        with tempfile.NamedTemporaryFile() as staged:
            with local_disk.explained(staged.name):
                yield cast(BinaryIO, staged)
                staged.flush()
            # A single upload: the file exists once it is complete.
            remote.attempt(url, lambda fs, path: fs.put_file(staged.name, path), "write")
        return
    with _writing(url, os.replace, durable) as file:
        yield file


@contextmanager
def _writing(url: str, finish: Callable[[Path, Path], object], durable: bool) -> Iterator[BinaryIO]:
    """A temporary file beside a local `url`; `finish` gets its path and the final one when it is complete."""
    final = local(url)
    temporary = _temporary_name(final)
    with local_disk.explained(url):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                if durable:
                    local_disk.sync(file.fileno())
            finish(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_dir(str(final.parent))


@contextmanager
def publishing_dir(url: str) -> Iterator[str]:
    """Yield a directory to fill, which appears as `url` only if the block ends without an exception.

    `url` must be empty or missing. On an object store the files are written in place, and removed after an exception.
    """
    if is_remote(url):
        try:
            yield url
        except BaseException:
            remove(url)
            raise
        return
    final = local(url).absolute()
    temporary = _temporary_name(final)
    try:
        make_dirs(str(temporary))
        yield str(temporary)
        with local_disk.explained(url):
            os.replace(temporary, final)  # an empty directory may be there
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_dir(str(final.parent))


def write_bytes(url: str, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file atomically; `durable` and errors as for `publishing`."""
    if is_remote(url):
        remote.attempt(url, lambda fs, path: fs.pipe_file(path, data), "write")
        return
    with publishing(url, durable=durable) as file:
        file.write(data)


def create(url: str, data: bytes) -> bool:
    """Write a whole file if it does not exist yet; returns whether this call made it. Safe against races.

    An object store may answer `exists` to a repeated request of this call, so a file with this content counts as made
    by this call: put something unique into `data`. Errors as for `publishing`.
    """
    if is_remote(url):
        try:
            remote.attempt(url, partial(_create, data=data), "write")
        except FileExistsError:
            with suppress(FileNotFoundError):
                return read_bytes(url) == data
            return False
        return True
    made: list[bool] = []
    with _writing(url, lambda temporary, final: made.append(_link(temporary, final)), durable=True) as file:
        file.write(data)
    return made[0]


def _create(fs: fsspec.AbstractFileSystem, path: str, *, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except (TypeError, NotImplementedError):  # a store without exclusive creation
        if fs.exists(path):
            raise FileExistsError(path) from None
        fs.pipe_file(path, data)


def _link(temporary: Path, final: Path) -> bool:
    """Give a file its final name, unless another file has it; its temporary name is gone in both cases."""
    try:
        os.link(temporary, final)
        return True
    except FileExistsError:
        return temporary.stat().st_nlink == 2  # NFS may have repeated the request after it had succeeded
    except OSError as error:
        if error.errno in _REFUSED:
            raise
        # This file system has no hard links; each reports that with another error.
        with suppress(FileExistsError):
            os.close(os.open(final, os.O_CREAT | os.O_EXCL))
            os.replace(temporary, final)
            return True
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")


def unfinished(directory: str, is_own: Callable[[str], object]) -> dict[str, int]:
    """Temporary files in a local directory, of this process or of killed ones: name → bytes.

    Args:
        directory: local, or remote, which has no temporary files.
        is_own: whether the final name of a file is one that the caller writes; other files are left out.
    """
    sizes: dict[str, int] = {}
    for name in [] if is_remote(directory) else listdir(directory):
        if (match := _TEMPORARY.fullmatch(name)) and is_own(match[1]):
            with suppress(FileNotFoundError):
                status = os.lstat(local(join(directory, name)))
                if stat.S_ISREG(status.st_mode):
                    sizes[name] = status.st_size
    return sizes


def write_json(url: str, value: Any) -> None:
    """Write JSON atomically; equal values give equal bytes."""
    write_bytes(url, (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode())


def remove(url: str) -> None:
    """Delete a file or a directory with its content; a missing one is no error."""
    if is_remote(url):
        # One name at a time: fsspec's recursive removal treats `*` and `[` as patterns.
        with suppress(FileNotFoundError):
            for name in remote.attempt(url, lambda fs, path: fs.find(path), "remove"):
                remote.attempt(url, partial(_remove, name=name), "remove")
        if is_dir(url):  # in stores that have directories
            remote.attempt(url, _remove_directories, "remove")
        return
    with local_disk.explained(url):
        if local(url).is_dir() and not local(url).is_symlink():
            shutil.rmtree(local(url))
        else:
            local(url).unlink(missing_ok=True)


def _remove(fs: fsspec.AbstractFileSystem, _path: str, *, name: str) -> None:
    with suppress(FileNotFoundError):
        fs.rm_file(name)


def _remove_directories(fs: fsspec.AbstractFileSystem, path: str) -> None:
    for name in sorted({path, *fs.find(path, withdirs=True)}, reverse=True):
        with suppress(FileNotFoundError):
            fs.rmdir(name)


def sync_dir(directory: str) -> None:
    """Flush a local directory, so that renames in it survive a power cut, if its file system supports that.

    Raises:
        DataError: the flush has failed.
    """
    with local_disk.explained(directory):
        descriptor = os.open(local(directory), os.O_RDONLY)
        try:
            local_disk.sync(descriptor)
        finally:
            os.close(descriptor)
