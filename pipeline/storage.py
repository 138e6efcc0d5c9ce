"""Local and remote files alike, through fsspec: open, list, publish, remove.

Nothing else in the project renames or deletes. A file appears under its name complete or not at all: locally it is
written beside its place, flushed to the disk and renamed; on an object store a single upload is already atomic,
and a rename would be a copy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs

from pipeline.errors import ConfigError, DataError


def is_remote(url: str) -> bool:
    """Whether `url` names a protocol other than the local file system."""
    return "://" in url and not url.startswith("file://")


def local(url: str) -> Path:
    """The path behind a local name, with or without `file://`."""
    return Path(url.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """`base/part/…`, for paths and URLs alike."""
    return "/".join([base.rstrip("/"), *parts])


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return cast(tuple[fsspec.AbstractFileSystem, str], url_to_fs(url))
    except ImportError as error:
        raise ConfigError(f"{url}: {error}, such as with pip install 'ddpm-pipeline[s3]' (or gcs, azure)") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {error}: name a local path or a URL whose fsspec package is installed") from error


def exists(url: str) -> bool:
    """Whether a file or directory of this name is there."""
    if not is_remote(url):
        return local(url).exists()
    fs, path = _filesystem(url)
    return bool(fs.exists(path))


def is_dir(url: str) -> bool:
    """Whether `url` is a directory, or on an object store a prefix with something under it."""
    if not is_remote(url):
        return local(url).is_dir()
    fs, path = _filesystem(url)
    return bool(fs.isdir(path))


def listdir(url: str) -> list[str]:
    """Sorted names directly under `url`; none if it does not exist."""
    if not is_remote(url):
        return sorted(os.listdir(local(url))) if local(url).is_dir() else []
    fs, path = _filesystem(url)
    fs.invalidate_cache(path)
    if not fs.isdir(path):
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False) if name.rstrip("/") != path)


def size(url: str) -> int:
    """Bytes in a file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(url):
        return local(url).stat().st_size
    fs, path = _filesystem(url)
    return int(fs.size(path))


def open_read(url: str, offset: int = 0) -> BinaryIO:
    """Open for reading at a byte offset: a seek locally, a range request remotely.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_remote(url):
        fs, path = _filesystem(url)
        file = cast(BinaryIO, fs.open(path, "rb"))
    else:
        file = local(url).open("rb")
    file.seek(offset)
    return file


def read_bytes(url: str) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open_read(url) as file:
        return file.read()


def sha256(url: str) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open_read(url) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(url: str) -> Any:
    """A JSON file's value.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is not JSON.
    """
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise DataError(f"{url} is not JSON ({error}): damaged or cut short; restore it, or make it again") from error


def make_dirs(url: str) -> None:
    """Create a directory and its parents; object stores have none."""
    if not is_remote(url):
        with _explained(url):
            local(url).mkdir(parents=True, exist_ok=True)


@contextmanager
def publishing(url: str) -> Iterator[BinaryIO]:
    """A file to write that appears as `url` only if the block ends well.

    Raises:
        DataError: no space left, read-only or not permitted; nothing is left behind.
    """
    if is_remote(url):
        fs, path = _filesystem(url)
        with tempfile.NamedTemporaryFile() as staged:
            yield cast(BinaryIO, staged)
            staged.flush()
            fs.put_file(staged.name, path)  # one upload, which exists once it is complete
        return
    final = local(url)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _explained(url):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_dir(str(final.parent))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with publishing(url) as file:
        file.write(data)


def write_json(url: str, value: Any) -> None:
    """Write JSON atomically; equal values give equal bytes."""
    write_bytes(url, (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode())


def remove(url: str) -> None:
    """Delete a file or a whole tree; nothing happens if it is not there."""
    if is_remote(url):
        fs, path = _filesystem(url)
        for name in fs.find(path):  # name by name: fsspec's own recursive removal takes `*` and `[` for patterns
            fs.rm_file(name)
        if fs.isdir(path):  # stores that have directories
            for name in sorted({path, *fs.find(path, withdirs=True)}, reverse=True):
                with suppress(FileNotFoundError):
                    fs.rmdir(name)
        return
    with _explained(url):
        if local(url).is_dir() and not local(url).is_symlink():
            shutil.rmtree(local(url))
        else:
            local(url).unlink(missing_ok=True)


def sync_dir(directory: str) -> None:
    """Make renames in a local directory survive a power cut."""
    descriptor = os.open(local(directory), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn the failures of a full or unwritable disk into one line."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "no space left: free some, then run the same command again",
            errno.EDQUOT: "disk quota exceeded: free some space, then run the same command again",
            errno.EROFS: "the file system is read-only: choose another place",
            errno.EACCES: "permission denied: choose another place or change its permissions",
            errno.ENOTDIR: "a part of this path is a file: choose another place",
            errno.EISDIR: "a directory of this name is in the way: choose another place",
            errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
            errno.EEXIST: "a file of this name is in the way: choose another place",
        }.get(error.errno or 0)
        if reason is None:
            # Errors of reading can come through here too, from whatever is being written down; those name another file.
            place, named = local(url), Path(str(error.filename or url))
            if named not in (place, *place.parents) and not named.name.startswith(f".{place.name}."):
                raise
            reason = f"{error.strerror}: choose another place"
        raise DataError(f"cannot write {url}: {reason}") from error
