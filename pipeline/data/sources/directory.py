"""Directories, local or remote, and image files that are named one by one."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pipeline import untrusted
from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources import urls
from pipeline.data.sources.inputs import Entries, Input, check_size
from pipeline.data.sources.row_file import stored_entries
from pipeline.data.sources.row_sort import Sorter
from pipeline.data.sources.source_file import remote_stamp, time_stamp
from pipeline.errors import DataError
from pipeline.storage import files, local_disk, remote_walk

_Identity = tuple[int, int]
"""Device and inode."""
_MAX_PATHS = 32


class Directory:
    """A local directory with its subdirectories; links are followed, except to a directory above.

    Args:
        url: of the directory.
        names: the files to take, as paths from the directory; None: all.
    """

    parallel = False
    is_class = True
    """Whether the name of the directory may be the class of its files."""

    def __init__(self, url: str, names: Sequence[str] | None = None) -> None:
        self._root = str(files.local(url))
        self._names = names
        self.is_whole = names is None
        self.name = url.rstrip("/").rsplit("/", 1)[-1]

    def entries(self, labels: bool, check_stop: Callable[[], None]) -> Entries:
        """List it. Files of any name are inputs; a link to nowhere is one, too, and ends as rejected."""
        found = Sorter()
        if self._names is None:
            self._walk(found, check_stop)
        for name in self._names or ():
            check_stop()
            path = os.path.join(self._root, name)
            try:
                status = os.stat(path)
            except OSError:
                found.add(name, 0, 0)
            else:
                untrusted.require_regular(status.st_mode, path)
                found.add(name, status.st_size, time_stamp(status.st_mtime_ns))
        self._names = None if self._names is None else ()  # the listing has them; workers need them no more
        directory = os.path.basename(os.path.abspath(self._root)) if self.is_class else ""
        return stored_entries(found.sorted(), directory)

    def _walk(self, found: Sorter, check_stop: Callable[[], None]) -> None:
        waiting: list[tuple[str, frozenset[_Identity]]] = [("", frozenset())]  # and the directories above each
        visits: Counter[_Identity] = Counter()
        while waiting:
            check_stop()
            directory, above = waiting.pop()
            path = os.path.join(self._root, directory)
            try:
                status = os.stat(path)
                children = os.scandir(path)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be listed ({error.strerror}): give read permission or move it"
                ) from error
            identity = status.st_dev, status.st_ino
            if identity in above:
                continue
            visits[identity] += 1
            if visits[identity] > _MAX_PATHS:
                raise DataError(f"{path}: links lead to this directory in more than {_MAX_PATHS} ways: remove some")
            with children:
                inner = sorted(self._list(directory, children, found, check_stop), reverse=True)  # the last is next
            found.directory_done()
            above_inner = above | {identity}
            waiting += [(name, above_inner) for name in inner]

    def _list(
        self, directory: str, children: Iterable[os.DirEntry[str]], found: Sorter, check_stop: Callable[[], None]
    ) -> Iterator[str]:
        """Add the files in a directory; yield the directories in it."""
        for number, child in enumerate(children):
            if number % 1024 == 0:
                check_stop()
            try:
                status = child.stat()
            except OSError:  # a link to nowhere
                found.add(directory + child.name, 0, 0)
                continue
            if stat.S_ISREG(status.st_mode):
                found.add(directory + child.name, status.st_size, time_stamp(status.st_mtime_ns))
            elif stat.S_ISDIR(status.st_mode):
                yield f"{directory}{child.name}/"

    def read(self, item: Input) -> bytes:
        """The file's bytes."""
        with open(os.path.join(self._root, item.path), "rb", opener=local_disk.without_waiting) as file:
            status = os.fstat(file.fileno())
            untrusted.require_regular(status.st_mode, file.name)
            if time_stamp(status.st_mtime_ns) != item.stamp:
                raise Rejected("source_changed", "written to since it was listed")
            return check_size(file.read(item.size + 1), item)


class RemoteDirectory:
    """All files below an fsspec URL, or some of them.

    Args:
        url: of the directory.
        infos: the files to take: paths from the directory, with what the store says of each; None: all.
    """

    parallel = True
    is_class = True

    def __init__(self, url: str, infos: dict[str, dict[str, Any]] | None = None) -> None:
        self._url = url.rstrip("/")
        self._infos = infos
        self.is_whole = infos is None
        self.name = urls.name(self._url)
        self._stored: dict[str, str] = {}  # name → path in the store, where they differ

    def entries(self, labels: bool, check_stop: Callable[[], None]) -> Entries:
        """List it."""
        found = Sorter()
        for infos in remote_walk.pages(self._url) if self._infos is None else [self._infos]:
            names = urls.names(infos) if urls.is_web(self._url) else {}  # of a web server all come as one page
            self._stored = {name: path for path, name in names.items() if name != path}
            for path, info in infos.items():
                found.add(names.get(path, path), int(info["size"] or 0), remote_stamp(info))
            found.directory_done()
            check_stop()
        self._infos = None if self._infos is None else {}  # the listing has them; workers need them no more
        return stored_entries(found.sorted(), self.name if self.is_class else "")

    def read(self, item: Input) -> bytes:
        """The file's bytes."""
        url = files.join(self._url, self._stored.get(item.path, item.path))
        if remote_stamp(info := files.info(url)) != item.stamp:
            raise Rejected("source_changed", "written to since it was listed")
        with files.open_read(url, length=info["size"]) as file:
            return check_size(file.read(), item)
