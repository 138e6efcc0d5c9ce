"""What a source holds, one input for each file or row, in columns."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.data.images.preprocess import Rejected

NO_LABEL = -1
IMAGES = frozenset(
    "avif bmp dds dib gif heic heif ico j2k jfif jp2 jpe jpeg jpg jxl mpo "  # noqa: SIM905
    "pbm pcx pgm png pnm ppm psd qoi sgi tga tif tiff webp".split()
)
"""Extensions of image files, also of formats that are rejected."""
_MOST_IMAGES = (".jpg", ".png", ".jpeg", ".JPEG", ".webp")  # tried first, as it is faster
LABEL_FILE, BESIDE_IMAGE, SYSTEM_FILE = "label_file", "beside_image", "system_file"
NOT_IMAGES = frozenset((LABEL_FILE, BESIDE_IMAGE, SYSTEM_FILE))
"""Reasons for inputs that were never meant as images; they do not count as bad."""


def is_image_name(path: str) -> bool:
    """Whether a file has the extension of an image."""
    return path.endswith(_MOST_IMAGES) or path.rpartition(".")[2].lower() in IMAGES


class Rejection(NamedTuple):
    """Why an input will not be a sample, known from the listing alone: reason and detail as in `rejected.jsonl`."""

    reason: str
    detail: str = ""


class Input(NamedTuple):
    """One image file, or table row that is read as one; its position in the listing is its identity."""

    name: str
    """Its path in its source, after the name of the source if there are several sources."""
    label: int | None
    """Class number."""
    source: int
    """Number of its source in the listing."""
    path: str
    """Relative to the source; bytes that are not UTF-8 are surrogate escapes."""
    size: int
    """Unpacked size in bytes; for a row of a table the average."""
    stamp: int
    """Changes with the content: a time of modification or a checksum; 0 if neither is known."""
    offset: int
    """Where it lies in its source: a byte offset, or the number of a row."""
    packed_size: int
    """In a zip archive, in bytes."""
    rejection: Rejection | None = None
    """Why it is no sample, if the listing knows already."""


@dataclass
class Entries:
    """What one source holds; the n-th elements of all columns describe one input.

    A column is a list or array in memory, or lies in a row file, as those of directories do.
    """

    directory_is_class: bool = True
    """Whether the directory of an input is its class, where labels are wanted and `classes` is None."""
    paths: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    stamps: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    packed_sizes: array[int] = field(default_factory=lambda: array("q"))
    """Empty except for zip archives."""
    labels: array[int] = field(default_factory=lambda: array("q"))
    """Class numbers, or `NO_LABEL`; empty without `classes`."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, if the source has labels of its own and they are wanted."""
    labels_from: str = ""
    """Where the classes come from, or why there are none, if the source knows."""
    directory: str = ""
    """Name of the directory that the source is; the class of the files at its top, beside other such sources."""
    without_class: Callable[[str], bool] | None = None
    """Whether the directory of an entry is not its class, because of a label file; None: of no entry."""
    unmatched_rows: int = 0
    """Rows of label files that name no entry."""
    rejections: dict[int, Rejection] = field(default_factory=dict)
    """By number of the entry."""
    is_sorted: bool = False
    """Whether the entries are known to be sorted by path."""

    @classmethod
    def of_rows(cls, names: list[str], size: int, stamp: int) -> Entries:
        """The rows of a table or array, all of one size in bytes; a row's offset is its number."""
        count = len(names)
        return cls(False, names, array("q", [size]) * count, array("q", [stamp]) * count, array("q", range(count)))

    def add(self, path: str, size: int, stamp: int, offset: int = 0) -> None:
        """Append one input."""
        self.paths.append(path)
        self.sizes.append(size)
        self.stamps.append(stamp)
        self.offsets.append(offset)

    def sort(self) -> None:
        """Sort the entries by path; equal paths stay in their order."""
        if self.is_sorted:
            return
        order = np.array(sorted(range(len(self.paths)), key=self.paths.__getitem__), dtype=np.int64)
        if np.array_equal(order, np.arange(len(order))):
            return
        self.paths = [self.paths[i] for i in order.tolist()]
        for name in ("sizes", "stamps", "offsets", "packed_sizes", "labels"):
            if column := getattr(self, name):
                setattr(self, name, array("q", np.frombuffer(column, np.int64)[order].tobytes()))
        if self.rejections:
            known = self.rejections
            self.rejections = {new: known[old] for new, old in enumerate(order.tolist()) if old in known}


class Source(Protocol):
    """A container of inputs. It is listed once, then pickled, and read in worker processes."""

    name: str
    """Distinguishes its inputs from those of other sources."""
    parallel: bool
    """Whether several threads can read at once, and are faster."""

    def entries(self, labels: bool, check_stop: Callable[[], None]) -> Entries:
        """List the inputs, with the source's own labels if `labels`; `check_stop` is called now and then, may raise."""

    def read(self, item: Input) -> bytes:
        """The bytes of an input's image file."""


def check_size(data: bytes, item: Input) -> bytes:
    """The same bytes, if there are as many as listed.

    Raises:
        Rejected: source_changed.
    """
    if len(data) != item.size:
        raise Rejected("source_changed", f"{len(data)} bytes, listed with {item.size}")
    return data
