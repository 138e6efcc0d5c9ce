"""The inventory: the list of inputs of a set, made by one of the jobs with `--part` and read by the others.

It lies in `OUT/.listing` until the set is finished. Each job reads the blocks of its own inputs, locally or by range
requests. Its name holds a hash of the sources and the labels asked for. It is believed if its inputs are those of
`set.json`, and if a few inputs of the job's part are unchanged; otherwise the job lists again. A job without `--part`
always lists, so it notices files that were added.

Only directories and prefixes have an inventory: archives, tables and arrays must be opened to be read anyway.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.images.preprocess import Rejected
from pipeline.data.sources import globs, urls
from pipeline.data.sources.directory import Directory, RemoteDirectory
from pipeline.data.sources.inputs import Source
from pipeline.data.sources.listing import Labels, Listing, Reader, open_sources
from pipeline.data.sources.row_file import RowFile
from pipeline.data.sources.sorted_inputs import Inputs
from pipeline.data.sources.source_file import SourceFile
from pipeline.errors import DataError
from pipeline.storage import files

DIRECTORY = ".listing"
_VERSION = 1
_TAIL = struct.Struct("<Q8s")  # bytes of the packed head before it, magic
_LENGTHS = struct.Struct("<QQ")  # in the packed head: bytes of JSON, bytes of the ends of the blocks
_MAGIC = b"ddpmlist"
_CHECKED, _CHECKED_BYTES = 16, 1 << 24


class Inventory:
    """The inventory of a set.

    Args:
        out: the set, a path or URL.
        names: the sources, as given.
        labels: as for `list_inputs`.

    Raises:
        ConfigError: as `list_inputs`.
    """

    def __init__(self, out: str, names: Sequence[str], labels: Labels) -> None:
        self.directory = files.join(out, DIRECTORY)
        self._names = names
        places = [name if files.is_remote(name) else os.path.abspath(files.local(name)) for name in names]
        identity = [_VERSION, places, labels, _version_of(labels)]
        digest = hashlib.sha256(json.dumps(identity).encode("utf-8", "surrogatepass")).hexdigest()
        self._url = files.join(self.directory, f"inputs-{digest[:12]}.bin")

    def publish(self, listing: Listing) -> None:
        """Write the inventory; it appears complete or not at all.

        Raises:
            DataError: no space left, not permitted, or the store cannot be reached.
        """
        rows = listing.inputs.rows
        head = {
            "rows": len(rows),
            "prefixes": listing.inputs.prefixes,
            "classes": listing.classes,
            "fingerprint": listing.fingerprint,
            "bytes": listing.bytes,
            "rows_without_input": listing.rows_without_input,
            "labels_from": listing.labels_from,
        }
        text, ends = json.dumps(head).encode(), rows.ends.tobytes()
        packed = zlib.compress(_LENGTHS.pack(len(text), len(ends)) + text + ends)  # with a checksum
        with files.publishing(self._url) as file:
            rows.copy_to(file)
            file.write(packed + _TAIL.pack(len(packed), _MAGIC))

    def open(self, part: tuple[int, int], fingerprint: str | None) -> Listing | None:
        """The listing of the inventory; None if there is none, or it is of other files than those that are there now.

        Args:
            part: (I, N): a few inputs of part I of N are compared with the source.
            fingerprint: of the inputs in `set.json`; None: the set is not begun.
        """
        try:
            file = files.open_read(self._url)
            head, rows = _head_and_rows(file, self._url)
        except FileNotFoundError:
            return None
        except (DataError, ValueError, KeyError, TypeError, struct.error, zlib.error):  # of another version, or damaged
            return None
        if fingerprint not in (None, head["fingerprint"]):
            return None
        listing = Listing(
            inputs=Inputs(rows, head["prefixes"]),
            classes=None if head["classes"] is None else tuple(head["classes"]),
            fingerprint=head["fingerprint"],
            bytes=head["bytes"],
            sources=open_sources(self._names),
            rows_without_input=head["rows_without_input"],
            labels_from=head["labels_from"],
        )
        return None if _has_changed(listing, part) else listing


def is_possible(names: Sequence[str], labels: Labels) -> bool:
    """Whether sources and labels can have an inventory: whole directories, and no labels from a pipe.

    Raises:
        ConfigError: a source is missing or of an unknown kind.
    """
    if any(urls.is_web(name) or globs.is_pattern(name) for name in names):
        return False
    if labels not in ("folder", "none") and not files.is_remote(labels) and not files.local(labels).is_file():
        return False
    return all(map(_is_whole_directory, open_sources(names)))


def remove(out: str) -> None:
    """Remove the inventory of a finished set; other jobs may be doing the same."""
    with suppress(DataError, FileNotFoundError):
        files.remove(files.join(out, DIRECTORY))


def _is_whole_directory(source: Source) -> bool:
    return isinstance(source, Directory | RemoteDirectory) and source.is_whole


def _version_of(labels: Labels) -> tuple[int, int]:
    """Size and stamp of a label file."""
    if labels in ("folder", "none"):
        return 0, 0
    file = SourceFile(labels)
    return file.size, file.stamp


def _head_and_rows(file: BinaryIO, url: str) -> tuple[dict[str, Any], RowFile]:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - _TAIL.size, 0))
    packed_bytes, magic = _TAIL.unpack(file.read(_TAIL.size))
    start = end - _TAIL.size - packed_bytes
    if magic != _MAGIC or start < 0:
        raise ValueError
    file.seek(start)
    data = zlib.decompress(file.read(packed_bytes))
    head_bytes, ends_bytes = _LENGTHS.unpack_from(data)
    head = dict(json.loads(data[_LENGTHS.size : _LENGTHS.size + head_bytes]))
    ends = np.frombuffer(data, np.uint64, ends_bytes // 8, _LENGTHS.size + head_bytes)
    return head, RowFile(file, ends, int(head["rows"]), url)


def _has_changed(listing: Listing, part: tuple[int, int]) -> bool:
    """Whether one of a few inputs of a part, spread over it, is not as it is in the listing."""
    count = len(listing.inputs)
    first, last = (count * i // part[1] for i in (part[0], part[0] + 1))
    chosen = sorted({first + (last - first) * i // _CHECKED for i in range(_CHECKED if last > first else 0)})
    # A link to nowhere has no stamp; it is not a change.
    items = [item for item in (listing.inputs[i] for i in chosen) if item.stamp and item.size <= _CHECKED_BYTES]
    read = Reader(listing.sources).read_ahead(items) if items else ()
    return any(isinstance(data, Rejected) and data.reason == "source_changed" for data in read)
