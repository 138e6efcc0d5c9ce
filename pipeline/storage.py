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
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from pipeline import remote
from pipeline.errors import DataError

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_BUFFER_BYTES = 1 << 16  # Python's own 8 KiB cost a system call for every small picture


def is_remote(url: str) -> bool:
    """Whether `url` names a protocol other than the local file system."""
    return "://" in url and not url.startswith("file://")


def local(url: str) -> Path:
    """The path behind a local name, with or without `file://`."""
    return Path(url.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """`base/part/…`, for paths and URLs alike."""
    return "/".join([base.rstrip("/"), *parts])


def retries() -> int:
    """How often this process has had to repeat a remote operation so far."""
    return remote.RETRIES.count


def _info(url: str) -> dict[str, Any] | None:
    with suppress(FileNotFoundError):
        return remote.info(url)
    return None


def exists(url: str) -> bool:
    """Whether a file or directory of this name is there."""
    return _info(url) is not None if is_remote(url) else local(url).exists()


def is_dir(url: str) -> bool:
    """Whether `url` is a directory, or on an object store a prefix with something under it."""
    if not is_remote(url):
        return local(url).is_dir()
    info = _info(url)
    return info is not None and info["type"] == "directory"


def listdir(url: str) -> list[str]:
    """Sorted names directly under `url`; none if it does not exist."""
    if not is_remote(url):
        return sorted(os.listdir(local(url))) if local(url).is_dir() else []
    if not is_dir(url):
        return []
    with suppress(FileNotFoundError):
        return sorted(remote.attempt(url, _names))
    return []


def _names(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    names = [name.rstrip("/") for name in fs.ls(path, detail=False)]
    return [name.rsplit("/", 1)[-1] for name in names if name != path.rstrip("/")]


def find(url: str) -> dict[str, dict[str, Any]]:
    """Every file below a remote place: its path from there → what the store says of it; none if there is no place."""
    with suppress(FileNotFoundError):
        return remote.attempt(url, _find)
    return {}


def _find(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    return {name[len(path) :].lstrip("/"): info for name, info in fs.find(path, detail=True).items()}


def info(url: str) -> dict[str, Any]:
    """What a store says of a remote file: `size`, and what else it knows.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read.
    """
    return remote.info(url)


def glob(pattern: str) -> dict[str, dict[str, Any]]:
    """What matches a remote pattern: its URL, written as the pattern is → what the store says of it."""

    def found(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
        store = pattern.removesuffix(path)
        return {store + name: info for name, info in fs.glob(path, detail=True).items()}

    return remote.attempt(pattern, found)


def size(url: str) -> int:
    """Bytes in a file.

    Raises:
        FileNotFoundError: there is none.
        DataError: a remote place that cannot be read.
    """
    if not is_remote(url):
        return local(url).stat().st_size
    found: int | None = remote.info(url)["size"]
    if found is None:
        raise DataError(f"{url}: its server does not tell how long it is: copy it to a disk or an object store first")
    return found


def free_bytes(url: str) -> int | None:
    """Bytes that this user may still write at a local place, which need not exist; None where nobody knows."""
    if is_remote(url):
        return None
    with _explained(url):
        place = local(url).absolute()
        status = os.statvfs(next(folder for folder in (place, *place.parents) if folder.exists()))
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def open_read(url: str, offset: int = 0, length: int | None = None) -> BinaryIO:
    """Open for reading at a byte offset: a seek locally, range requests remotely, which survive lost connections.

    Args:
        url: the file.
        offset: where to begin.
        length: bytes in the whole file, where they are known: a remote place is not asked for them then.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a remote place that cannot be read; the file itself raises it, too.
    """
    if is_remote(url):
        file = remote.stream(url, size(url) if length is None else length)
    else:
        file = local(url).open("rb", buffering=_BUFFER_BYTES)
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
def publishing(url: str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that appears as `url` only if the block ends well.

    Args:
        url: its name.
        durable: wait until a power cut cannot take it back; local files only.

    Raises:
        DataError: no space left, not permitted, or out of reach; nothing is left behind.
    """
    if is_remote(url):
        with tempfile.NamedTemporaryFile() as staged:
            with _explained(staged.name):
                yield cast(BinaryIO, staged)
                staged.flush()
            # One upload, which exists once it is complete.
            remote.attempt(url, lambda fs, path: fs.put_file(staged.name, path), "write")
        return
    final = local(url)
    temporary = _beside(final)
    with _explained(url):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_dir(str(final.parent))


def write_bytes(url: str, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file atomically.

    Args:
        url: its name.
        data: its content.
        durable: wait until a power cut cannot take it back; local files only.

    Raises:
        DataError: as `publishing`.
    """
    if is_remote(url):
        remote.attempt(url, lambda fs, path: fs.pipe_file(path, data), "write")
        return
    with publishing(url, durable=durable) as file:
        file.write(data)


def create(url: str, data: bytes) -> bool:
    """Write a whole file if nothing of its name exists, also when others try the same at the same time.

    Args:
        url: its name.
        data: its content. Put something in it that nobody else would write: an object store may say `exists` to a
            request that was repeated, so a file with this very content counts as made by this call.

    Returns:
        Whether this call made it.

    Raises:
        DataError: as `publishing`.
    """
    if is_remote(url):
        try:
            remote.attempt(url, partial(_create, data=data), "write")
        except FileExistsError:
            with suppress(FileNotFoundError):
                return read_bytes(url) == data
            return False
        return True
    final = local(url)
    temporary = _beside(final)
    with _explained(url):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            made = _name(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        sync_dir(str(final.parent))
    return made


def _create(fs: fsspec.AbstractFileSystem, path: str, *, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except (TypeError, NotImplementedError):  # a store without exclusive creation
        if fs.exists(path):
            raise FileExistsError(path) from None
        fs.pipe_file(path, data)


def _name(temporary: Path, final: Path) -> bool:
    """Give a file its name unless that is taken."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return temporary.stat().st_nlink == 2  # NFS may have repeated a request that had done it
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            os.close(os.open(final, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(temporary, final)
    return True


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_json(url: str, value: Any) -> None:
    """Write JSON atomically; equal values give equal bytes."""
    write_bytes(url, (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode())


def remove(url: str) -> None:
    """Delete a file or a whole tree; nothing happens if it is not there."""
    if is_remote(url):
        # Name by name: fsspec's own recursive removal takes `*` and `[` for patterns.
        with suppress(FileNotFoundError):
            for name in remote.attempt(url, lambda fs, path: fs.find(path), "remove"):
                remote.attempt(url, partial(_remove, name=name), "remove")
        if is_dir(url):  # in stores that have directories
            remote.attempt(url, _remove_folders, "remove")
        return
    with _explained(url):
        if local(url).is_dir() and not local(url).is_symlink():
            shutil.rmtree(local(url))
        else:
            local(url).unlink(missing_ok=True)


def _remove(fs: fsspec.AbstractFileSystem, _path: str, *, name: str) -> None:
    with suppress(FileNotFoundError):
        fs.rm_file(name)


def _remove_folders(fs: fsspec.AbstractFileSystem, path: str) -> None:
    for name in sorted({path, *fs.find(path, withdirs=True)}, reverse=True):
        with suppress(FileNotFoundError):
            fs.rmdir(name)


def sync_dir(directory: str) -> None:
    """Make renames in a local directory survive a power cut, where its file system can.

    Raises:
        DataError: it has failed.
    """
    with _explained(directory):
        descriptor = os.open(local(directory), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
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
