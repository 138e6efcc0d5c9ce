"""Class numbers of the inputs of all sources: from directory names, and merged over several sources. Pure.

A source that has class numbers keeps them; class names are numbered in sorted order. Where the class lists of the
sources begin alike, the longest list holds for all sources; otherwise all names are sorted together.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias

import numpy as np

from pipeline.data.sources.inputs import IMAGES, LABEL_FILE, NO_LABEL, Entries
from pipeline.data.sources.junk_files import is_junk
from pipeline.data.sources.labels.class_names import normalized
from pipeline.data.sources.labels.label_encoder import renumbered, sorted_names
from pipeline.data.sources.labels.label_files import is_label_file
from pipeline.errors import ConfigError
from pipeline.untrusted import printable


@dataclass(frozen=True)
class StatedLabels:
    """The class numbers that a source, or a label file, states of each entry."""

    numbers: array[int]

    def of(self, first: int, paths: Sequence[str]) -> Sequence[int]:
        """Class numbers of the entries from number `first` on; `NO_LABEL` for none."""
        return self.numbers[first : first + len(paths)]

    def renumbered(self, numbers: Sequence[int]) -> StatedLabels:
        """The same with other numbers, given by the present ones."""
        return StatedLabels(renumbered(np.frombuffer(self.numbers, np.int64), numbers))


@dataclass(frozen=True)
class DirectoryLabels:
    """The class number of an entry is that of its directory; it is looked up when asked for, and not stored."""

    numbers: Mapping[str, int] = field(default_factory=dict)
    """By class name; empty: no entry has a class."""
    top_class: str | None = None
    """Class of files that lie in no directory."""
    without_class: Callable[[str], bool] | None = None
    """See `Entries.without_class`."""

    def of(self, _first: int, paths: Sequence[str]) -> Sequence[int]:
        """Class numbers of entries with these paths; `NO_LABEL` for none."""
        if not self.numbers:
            return [NO_LABEL] * len(paths)
        return [self.numbers.get(name, NO_LABEL) for name in self.names(paths)]

    def names(self, paths: Iterable[str]) -> Iterator[str]:
        """The class name of each path, also of one that makes no class; empty for none."""
        last, name = "", self.top_class or ""
        for path in paths:
            directory = path.rpartition("/")[0]
            if directory != last:
                last = directory
                name = normalized(directory.rpartition("/")[2]) if directory else self.top_class or ""
            yield "" if self.without_class and self.without_class(path) else name

    def renumbered(self, numbers: Sequence[int]) -> DirectoryLabels:
        """The same with other numbers, given by the present ones."""
        return replace(self, numbers={name: numbers[number] for name, number in self.numbers.items()})


ClassLabels: TypeAlias = "StatedLabels | DirectoryLabels"


def by_directory(entries: Entries, top_class: str | None = None) -> tuple[DirectoryLabels, tuple[str, ...]]:
    """Number the entries of a source by the name of the directory that each lies in.

    Junk files and label files make no class, but get the class of their directory where there is one.

    Args:
        entries: of the source.
        top_class: class of files that lie in no directory.
    """
    labels, found = DirectoryLabels({}, top_class, entries.without_class), {""}
    for number, (path, name) in enumerate(zip(entries.paths, labels.names(entries.paths))):
        if name not in found and not is_junk(path) and not _is_label_file(entries, number, path):  # once per class
            found.add(name)
    classes = sorted_names(found - {""})
    return replace(labels, numbers={name: number for number, name in enumerate(classes)}), classes


def _is_label_file(entries: Entries, number: int, path: str) -> bool:
    known = entries.rejections.get(number)
    return known.reason == LABEL_FILE if known else is_label_file(entries.paths, number, path)


def merge(entries: Sequence[Entries]) -> tuple[list[ClassLabels], tuple[str, ...] | None]:
    """Give the classes of several sources one numbering.

    Returns:
        Class numbers of the entries of each source, and the names of all classes; None if there is no class. Several
        classes may share a name where all sources list them alike.

    Raises:
        ConfigError: it is unclear which directories are the classes, or which of several classes of one name is meant.
    """
    parts = [_of_source(source, top_class) for source, top_class in zip(entries, _top_classes(entries))]
    classes = max((names for _, names in parts), key=len)
    if any(classes[: len(names)] != names for _, names in parts):
        _refuse_ambiguous({names for _, names in parts})
        parts = [(numbers, unique_names(names)) for numbers, names in parts]
        classes = sorted_names(set(chain.from_iterable(names for _, names in parts)))
    number_of = {name: number for number, name in enumerate(classes)}
    merged = [
        numbers if names == classes[: len(names)] else numbers.renumbered([number_of[name] for name in names])
        for numbers, names in parts
    ]
    return merged, classes or None


def unlabeled(entries: Sequence[Entries]) -> list[ClassLabels]:
    """`NO_LABEL` for each entry of each source."""
    return [DirectoryLabels() for _ in entries]


def unique_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The class names; a name that several classes share gets the class number added."""
    counts = Counter(classes)
    unique: list[str] = []
    for number, name in enumerate(classes):
        if counts[name] > 1:
            name = f"{name} ({number})"  # noqa: PLW2901
            while name in counts:
                name += "'"  # noqa: PLW2901
        unique.append(name)
    return tuple(unique)


def in_order_of(
    existing: Sequence[str], labels: list[ClassLabels], classes: tuple[str, ...]
) -> tuple[list[ClassLabels], tuple[str, ...]]:
    """The labels in the order and spelling of an existing set's classes; unchanged if the set has other classes."""
    number_of = {normalized(name): number for number, name in enumerate(existing)}
    if len(number_of) != len(existing) or len(existing) != len(classes) or number_of.keys() != set(classes):
        return labels, classes
    numbers = [number_of[name] for name in classes]
    return [part.renumbered(numbers) for part in labels], tuple(existing)


def _of_source(entries: Entries, top_class: str | None) -> tuple[ClassLabels, tuple[str, ...]]:
    if entries.classes is not None:
        return StatedLabels(entries.labels), entries.classes
    return by_directory(entries, top_class) if entries.directory_is_class else (DirectoryLabels(), ())


def _top_classes(entries: Sequence[Entries]) -> list[str | None]:
    """The class of files at the top of each source: its own name, if several sources are directories of one class each.

    Raises:
        ConfigError: some sources are directories of images, and some are directories of such directories.
    """
    nothing: list[str | None] = [None] * len(entries)
    directories = [one for one in entries if one.directory and one.directory_is_class and one.classes is None]
    if len({one.directory for one in directories}) < 2:
        return nothing
    is_deep = {id(one): _has_images_in_directories(one) for one in directories}
    if all(is_deep.values()):
        return nothing
    if any(is_deep.values()):
        flat, deep = (next(e.directory for e in directories if is_deep[id(e)] is wanted) for wanted in (False, True))
        raise ConfigError(
            f"{printable(flat)} holds images and {printable(deep)} holds directories of images, so the class "
            "could be the one or the other: name directories of one kind, or give --labels none or a CSV file"
        )
    return [normalized(one.directory) if id(one) in is_deep else None for one in entries]


def _has_images_in_directories(entries: Entries) -> bool:
    return any(
        "/" in path and path.rpartition(".")[2].lower() in IMAGES and not is_junk(path) for path in entries.paths
    )


def _refuse_ambiguous(class_lists: Iterable[tuple[str, ...]]) -> None:
    """Refuse a name that several classes of one source share, and that another source has, too."""
    counts = [Counter(names) for names in class_lists]
    for number, names in enumerate(counts):
        for name in (name for name, count in names.items() if count > 1):
            if any(name in other for other in counts[:number] + counts[number + 1 :]):
                raise ConfigError(
                    f"{name!a} is the name of {names[name]} classes of one source and of a class of another, so it "
                    "is unclear which are the same: rename them, or give --labels none or a CSV file"
                )
