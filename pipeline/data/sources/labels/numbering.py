"""Class numbers of the inputs of all sources: from directory names, and merged over several sources. Pure.

A source that has class numbers keeps them; class names are numbered in sorted order. Where the class lists of the
sources begin alike, the longest list holds for all sources; otherwise all names are sorted together.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from pipeline.data.sources.inputs import IMAGES, LABEL_FILE, NO_LABEL, Entries
from pipeline.data.sources.junk_files import is_junk
from pipeline.data.sources.labels.class_names import normalized
from pipeline.data.sources.labels.label_encoder import ClassNumbers, from_names, renumbered, sorted_names
from pipeline.errors import ConfigError
from pipeline.untrusted import printable


def by_directory(entries: Entries, top_class: str | None = None) -> ClassNumbers:
    """Number the entries of a source by the name of the directory that each lies in.

    Junk files and label files make no class, but get the class of their directory where there is one.

    Args:
        entries: of the source.
        top_class: class of files that lie in no directory.
    """
    classes_of: dict[str, str | None] = {"": top_class}
    names = []
    for path in entries.paths:
        directory = path.rpartition("/")[0]
        if directory not in classes_of:
            classes_of[directory] = normalized(directory.rpartition("/")[2])
        names.append(classes_of[directory])
    for number in entries.without_class:
        names[number] = None
    label_files = {number for number, rejection in entries.rejections.items() if rejection.reason == LABEL_FILE}
    classes = set[str | None]()
    for number, (name, path) in enumerate(zip(names, entries.paths)):
        if name not in classes and number not in label_files and not is_junk(path):  # once per class: is_junk is slow
            classes.add(name)
    return from_names([name if name in classes else None for name in names])


def merge(entries: Sequence[Entries]) -> tuple[list[array[int]], tuple[str, ...] | None]:
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
        numbers
        if names == classes[: len(names)]
        else renumbered(np.frombuffer(numbers, np.int64), [number_of[name] for name in names])
        for numbers, names in parts
    ]
    return merged, classes or None


def unlabeled(entries: Sequence[Entries]) -> list[array[int]]:
    """`NO_LABEL` for each entry of each source."""
    return [array("q", [NO_LABEL]) * len(source.paths) for source in entries]


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
    existing: Sequence[str], labels: list[array[int]], classes: tuple[str, ...]
) -> tuple[list[array[int]], tuple[str, ...]]:
    """The labels in the order and spelling of an existing set's classes; unchanged if the set has other classes."""
    number_of = {normalized(name): number for number, name in enumerate(existing)}
    if len(number_of) != len(existing) or len(existing) != len(classes) or number_of.keys() != set(classes):
        return labels, classes
    numbers = [number_of[name] for name in classes]
    return [renumbered(np.frombuffer(part, np.int64), numbers) for part in labels], tuple(existing)


def _of_source(entries: Entries, top_class: str | None) -> ClassNumbers:
    if entries.classes is not None:
        return entries.labels, entries.classes
    return by_directory(entries, top_class) if entries.directory_is_class else (unlabeled([entries])[0], ())


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
