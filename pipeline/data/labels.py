"""Classes of inputs: their names, and the number that each has; pure, but for reading a CSV file.

Numbers come from the source where it has numbers, and from the sorted names where it has only names. Where sources
agree as far as they go, the longest order holds for all; where they do not, the sorted names of all do.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeAlias

from pipeline import storage
from pipeline.data.inputs import NO_LABEL, Entries
from pipeline.errors import ConfigError

Labelled: TypeAlias = "tuple[array[int], tuple[str, ...]]"
"""Class numbers, or `NO_LABEL`, and the names of the classes."""
_MOST_CLASSES = 1 << 16
_WORST = 9
_HEADS = (
    "filename file_name file file_path path image image_path image_name image_id img picture name id".split(),  # noqa: SIM905
    "label class category target labels label_name class_name class_id category_id level diagnosis breed y".split(),  # noqa: SIM905
)  # of columns of names, and of labels; earlier ones go first


def numbered(values: Sequence[int]) -> Labelled:
    """Keep numbers as they are, with classes `0` to the greatest; numbers beyond 65,535 are taken as names."""
    greatest = max(values, default=NO_LABEL)
    if greatest >= _MOST_CLASSES:
        return named([None if value == NO_LABEL else str(value) for value in values])
    return array("q", values), tuple(map(str, range(greatest + 1)))


def named(values: Sequence[str | None]) -> Labelled:
    """Number names in their sorted order."""
    classes = tuple(sorted({value for value in values if value is not None}))
    numbers = {name: number for number, name in enumerate(classes)}
    return array("q", [NO_LABEL if value is None else numbers[value] for value in values]), classes


def by_folder(paths: Iterable[str]) -> Labelled:
    """The name of the folder that a file lies in is its class; outside of any it has none."""
    return named([path.rpartition("/")[0].rpartition("/")[2] or None for path in paths])


def join(found: Sequence[Entries]) -> tuple[list[array[int]], tuple[str, ...] | None]:
    """One numbering for several sources.

    Returns:
        Class numbers of the entries of each source, and all classes, or None if there is not one.
    """
    parts = [_own(entries) for entries in found]
    classes = max((names for _, names in parts), key=len)
    if any(classes[: len(names)] != names for _, names in parts):
        classes = tuple(sorted(set(chain.from_iterable(names for _, names in parts))))
    at = {name: number for number, name in enumerate(classes)}
    joined = []
    for numbers, names in parts:
        changed = [at[name] for name in names] + [NO_LABEL]  # which is the last of any list
        joined.append(numbers if names == classes else array("q", [changed[number] for number in numbers]))
    return joined, classes or None


def none(found: Sequence[Entries]) -> list[array[int]]:
    """No label for any entry of each source."""
    return [array("q", [NO_LABEL]) * len(entries.paths) for entries in found]


def _own(entries: Entries) -> Labelled:
    if entries.classes is not None:
        return entries.labels, entries.classes
    return by_folder(entries.paths) if entries.by_folder else (none([entries])[0], ())


class LabelFile:
    """A CSV file that says which class each file is of: columns by their heads, or two columns without heads.

    Args:
        url: its name, local or remote; UTF-8.

    Raises:
        ConfigError: it is missing or has no such columns, or says two things of one name.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        text = _text(url)
        first_line = text.partition("\n")[0]
        delimiter = next((mark for mark in ",;\t" if mark in first_line), ",")
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            rows = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if any(line)]
        except csv.Error as error:
            raise ConfigError(f"{url}: line {lines.line_num} is no CSV ({error}): correct it") from error
        self._rows = self._read(rows)

    def _read(self, rows: list[tuple[int, list[str]]]) -> dict[str, str]:
        if not rows:
            raise ConfigError(f"{self._url} is empty: write a line FILE,CLASS for each picture")
        head, has_heads = self._columns(rows[0][1])
        found: dict[str, str] = {}
        for number, cells in rows[has_heads:]:
            if len(cells) <= max(head):
                raise ConfigError(
                    f"{self._url}: line {number} has {len(cells)} columns, not {max(head) + 1}: correct it"
                )
            name, label = cells[head[0]].removeprefix("./"), cells[head[1]]
            if found.setdefault(name, label) != label:
                raise ConfigError(
                    f"{self._url}: line {number} says {label!r} of {name!r}, an earlier one {found[name]!r}: keep one"
                )
        return {name: label for name, label in found.items() if label}

    def _columns(self, cells: list[str]) -> tuple[tuple[int, int], bool]:
        """Where names and labels stand, and whether there is a line of heads."""
        heads = [cell.lower() for cell in cells]
        name, label = (next((heads.index(head) for head in known if head in heads), None) for known in _HEADS)
        if len(heads) == 2:
            if name is None and label is None:
                return (0, 1), False
            name = 1 - label if name is None and label is not None else name
            label = 1 - name if label is None and name is not None else label
        if name is None or label is None or name == label:
            missing, known = ("file names", _HEADS[0]) if name is None else ("classes", _HEADS[1])
            raise ConfigError(
                f"{self._url}: no column of {missing} among {', '.join(cells)}: call one {known[0]}, or keep two"
            )
        return (name, label), True

    def labels(
        self, prefixes: Sequence[str], found: Sequence[Entries]
    ) -> tuple[list[array[int]], tuple[str, ...], int]:
        """Class numbers of the entries of each source, all classes, and how many rows are of no input.

        A row is of the input whose path it names, else of the one with this base name, else with this stem.

        Raises:
            ConfigError: a row fits several inputs alike, or no row fits any.
        """
        best = self._fits(prefixes, found)
        if not best:
            row, path = next(iter(self._rows), ""), next(path for entries in found for path in entries.paths)
            raise ConfigError(
                f"{self._url}: not one of its {len(self._rows)} names, such as {row!a}, is among the inputs, such as "
                f"{path!a}: correct the names"
            )
        # Of all rows, so that a part of the pictures has the same classes as the whole.
        numbers, classes = _from_text(list(self._rows.values()))
        number_of = dict(zip(self._rows, numbers))
        labels = none(found)
        for name, (_, source, at) in best.items():
            labels[source][at] = number_of[name]
        return labels, classes, len(self._rows) - len(best)

    def _fits(self, prefixes: Sequence[str], found: Sequence[Entries]) -> dict[str, tuple[int, int, int]]:
        """The names in the file that are of an input: how well each fits (0 is best), its source, its entry."""
        best: dict[str, tuple[int, int, int]] = {}
        twice: dict[str, tuple[int, str]] = {}
        for source, (prefix, entries) in enumerate(zip(prefixes, found)):
            for number, path in enumerate(entries.paths):
                names = enumerate(_names(prefix, path))
                rank, name = next((pair for pair in names if pair[1] in self._rows), (_WORST, ""))
                before = best.get(name, (_WORST,))[0]
                if rank < before:
                    best[name] = rank, source, number
                elif rank == before < _WORST:
                    twice[name] = rank, path
        for name, (rank, path) in twice.items():
            if best[name][0] == rank:
                one, other = sorted((path, found[best[name][1]].paths[best[name][2]]))
                raise ConfigError(f"{self._url}: {name!a} fits {one!a} and {other!a}: write paths, not names")
        return best


def _names(prefix: str, path: str) -> tuple[str, str, str, str]:
    base = path.rpartition("/")[2]
    return prefix + path, path, base, base.rpartition(".")[0]


def _from_text(values: Sequence[str]) -> Labelled:
    """Whole numbers are class numbers, if all labels are."""
    if all(value.isascii() and value.isdigit() for value in values):
        return numbered([int(value) for value in values])
    return named(values)


def _text(url: str) -> str:
    try:
        return storage.read_bytes(url).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"--labels {url}: there is no such file: give folder, none or a CSV file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{url} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
