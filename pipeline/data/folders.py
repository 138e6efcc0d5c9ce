"""Folders, and single files that are pictures: local or remote."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import storage
from pipeline.data.images import Rejected
from pipeline.data.inputs import Entries, Input, as_listed
from pipeline.data.opened import remote_stamp, time_stamp
from pipeline.errors import DataError


class Folder:
    """A local folder, recursively; links are followed, except into a folder above.

    Args:
        url: the folder.
        files: these files below it instead of all, as paths from it.
    """

    parallel = False

    def __init__(self, url: str, files: Sequence[str] | None = None) -> None:
        self._root = str(storage.local(url))
        self._files = files
        self.name = url.rstrip("/").rsplit("/", 1)[-1]

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List it; files are inputs whatever their names, and links to nowhere are, too."""
        entries = Entries()
        if self._files is None:
            self._walk("", (), entries, go_on)
            return entries
        for path in self._files:
            go_on()
            try:
                status = os.stat(os.path.join(self._root, path))
            except OSError:
                entries.add(path, 0, 0)
            else:
                entries.add(path, status.st_size, time_stamp(status.st_mtime_ns))
        self._files = ()  # the listing knows them
        return entries

    def _walk(
        self, folder: str, above: tuple[tuple[int, int], ...], entries: Entries, go_on: Callable[[], None]
    ) -> None:
        place = os.path.join(self._root, folder)
        go_on()
        try:
            here = os.stat(place)
            inside = list(os.scandir(place))
        except OSError as error:
            raise DataError(f"{place} cannot be listed ({error.strerror}): give read permission or move it") from error
        if (here.st_dev, here.st_ino) in above:
            return
        for number, entry in enumerate(inside):
            if number % 1024 == 0:
                go_on()
            try:
                status = entry.stat()
            except OSError:  # a link to nowhere was meant to be a file: it ends as rejected, not as nothing
                entries.add(folder + entry.name, 0, 0)
                continue
            if stat.S_ISREG(status.st_mode):
                entries.add(folder + entry.name, status.st_size, time_stamp(status.st_mtime_ns))
            elif stat.S_ISDIR(status.st_mode):
                self._walk(f"{folder}{entry.name}/", (*above, (here.st_dev, here.st_ino)), entries, go_on)

    def read(self, item: Input) -> bytes:
        """The file's bytes."""
        with open(os.path.join(self._root, item.path), "rb") as file:
            if time_stamp(os.fstat(file.fileno()).st_mtime_ns) != item.stamp:
                raise Rejected("source_changed", "written to since it was listed")
            return as_listed(file.read(item.size + 1), item)


class RemoteFolder:
    """Everything under an fsspec URL, or some files of it.

    Args:
        url: the folder.
        files: these files below it instead of all: paths from it, and what the store says of each.
    """

    parallel = True

    def __init__(self, url: str, files: dict[str, dict[str, Any]] | None = None) -> None:
        self._url = url.rstrip("/")
        self._files = files
        self.name = self._url.rsplit("/", 1)[-1]

    def entries(self, labels: bool, go_on: Callable[[], None]) -> Entries:
        """List it."""
        entries = Entries()
        for path, info in (storage.find(self._url) if self._files is None else self._files).items():
            entries.add(path, int(info["size"] or 0), remote_stamp(info))
        self._files = {}  # the listing knows them
        go_on()
        return entries

    def read(self, item: Input) -> bytes:
        """The file's bytes."""
        url = storage.join(self._url, item.path)
        if remote_stamp(info := storage.info(url)) != item.stamp:
            raise Rejected("source_changed", "written to since it was listed")
        with storage.open_read(url, length=info["size"]) as file:
            return as_listed(file.read(), item)
