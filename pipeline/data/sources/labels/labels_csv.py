"""A CSV file that tells the class of each image: `--labels FILE.csv`."""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.sources.inputs import NO_LABEL, Entries, is_image_name
from pipeline.data.sources.labels.class_names import normalized
from pipeline.data.sources.labels.column_names import FILE_NAME_COLUMNS, LABEL_COLUMNS, find_column
from pipeline.data.sources.labels.label_encoder import LabelEncoder
from pipeline.data.sources.labels.numbering import ClassLabels, StatedLabels
from pipeline.errors import ConfigError
from pipeline.storage import files
from pipeline.untrusted import printable

_NO_MATCH = 9
_DELIMITERS = ",;\t"
_DECIMAL_COMMA = re.compile(r"^([-+]?\d+),0*$")
"""`10,0`, as spreadsheets in many languages write 10.0."""
Row = tuple[int, list[str]]
"""Line number, and the cells."""


class LabelsCsv:
    """A CSV file of file names and classes: the columns are found by their names, or are the only two.

    The first row is a header if it has known column names, or if it names no input while other rows do.

    Args:
        url: of the file, local or remote; UTF-8.

    Raises:
        ConfigError: the file is missing or has no such columns.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._rows = read_rows(_text(url), url)
        if not self._rows:
            raise ConfigError(f"{url} is empty: write a line FILE,CLASS for each image")
        self._columns, self._has_header = self._likely_columns(self._rows[0][1])

    def _likely_columns(self, cells: list[str]) -> tuple[list[tuple[int, int]], bool]:
        """Possible columns of names and of labels, most likely first, and whether the first row is surely a header."""
        name, label = find_column(cells, FILE_NAME_COLUMNS), find_column(cells, LABEL_COLUMNS)
        if len(cells) == 2:
            if name is None and label is None:
                return [(0, 1), (1, 0)], False
            name = 1 - label if name is None and label is not None else name
            label = 1 - name if label is None and name is not None else label
        if name is None and label is None:
            raise self._no_column("file names", FILE_NAME_COLUMNS[0])
        if label is None or name == label:
            raise self._no_column("classes", LABEL_COLUMNS[0])
        names = [column for column in range(len(cells)) if column != label] if name is None else [name]
        return [(column, label) for column in names], True

    def labels(
        self, prefixes: Sequence[str], sources: Sequence[Entries]
    ) -> tuple[list[ClassLabels], tuple[str, ...], int]:
        """Class numbers of the entries of each source, all class names, and the number of rows that match no input.

        A row belongs to the input whose path it names, else to the input with this base name, else with this stem.

        Args:
            prefixes: text before the paths of each source.
            sources: the entries of each source.

        Raises:
            ConfigError: a row matches several inputs equally well, or no row matches any input, or two rows of one
                name have different classes.
            DataError: a label is no class, or numbers and names are mixed.
        """
        rows, first_name = dict[str, int](), ""
        for columns in self._columns:
            encoder, rows, conflict = self._read(columns)
            first_name = first_name or next(iter(rows), "")
            if best := _matches(self._url, rows, prefixes, sources):
                break
        else:
            if len(self._columns) > 1 and self._has_header:
                raise self._no_column("file names", FILE_NAME_COLUMNS[0])
            path = next(path for entries in sources for path in entries.paths)
            raise ConfigError(
                f"{self._url}: not one of its {len(rows)} names, such as {first_name!a}, is among the inputs, such as "
                f"{path!a}: correct the names"
            )
        if not self._has_header and self._begins_with_header(columns, best):
            encoder, rows, conflict = self._read(columns, skip=1)
        if conflict:
            raise ConfigError(conflict)
        # Of all rows, so that a part of the images has the same classes as all of them.
        numbers, classes = encoder.class_numbers(np.fromiter(rows.values(), np.int64, len(rows)))
        labels, unmatched = [array("q", [NO_LABEL]) * len(source.paths) for source in sources], 0
        for name, number in zip(rows, numbers):
            if number != NO_LABEL and name in best:
                _, source, entry = best[name]
                labels[source][entry] = number
            elif number != NO_LABEL:
                unmatched += 1
        return [StatedLabels(part) for part in labels], classes, unmatched

    def _begins_with_header(self, columns: tuple[int, int], best: dict[str, tuple[int, int, int]]) -> bool:
        """Whether the first row names no input, no file that could be one, and no class that another row names."""
        (_, cells), *others = self._rows
        name, label = (cells[column] for column in columns)
        if comparable(name) in best or is_image_name(name):
            return False
        return bool(others) and all(other[columns[1]] != label for _, other in others)

    def _read(self, columns: tuple[int, int], skip: int = 0) -> tuple[LabelEncoder, dict[str, int], str]:
        """The label codes by name, with their encoder, and the first contradiction between two rows."""
        encoder = LabelEncoder(self._url, "line")
        codes, conflict = dict[str, int](), ""
        for line, cells in self._rows[max(skip, self._has_header) :]:
            if len(cells) <= max(columns):
                raise ConfigError(
                    f"{self._url}: line {line} has {len(cells)} columns, not {max(columns) + 1}: correct it"
                )
            name, code = comparable(cells[columns[0]]), encoder.code(cells[columns[1]], line)
            earlier = codes.setdefault(name, code)
            if earlier != code and not conflict and not encoder.same_class(earlier, code):
                conflict = (
                    f"{self._url}: line {line} says {encoder.text(code)} of {name!a}, an earlier one "
                    f"{encoder.text(earlier)}: keep one"
                )
        return encoder, codes, conflict

    def _no_column(self, missing: str, known: str) -> ConfigError:
        columns = printable(", ".join(self._rows[0][1]))
        return ConfigError(f"{self._url}: no column of {missing} among {columns}: call one {known}, or keep two")


def read_rows(text: str, url: str) -> list[Row]:
    """The rows of a CSV file that are not empty; the first line may be `sep=;`, as spreadsheets write it.

    Raises:
        ConfigError: the text is no CSV.
    """
    first_line = text.partition("\n")[0].strip(' \r"')
    stated = first_line[4:] if first_line.lower().startswith("sep=") and len(first_line) == 5 else ""
    delimiter = stated or next((mark for mark in _DELIMITERS if mark in first_line), ",")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if any(line)]
    except csv.Error as error:
        raise ConfigError(f"{url}: line {lines.line_num} is no CSV ({error}): correct it") from error
    rows = rows[1:] if stated or first_line.lower() == "sep=" else rows
    for line, cells in rows[1:]:
        if any(cells[len(rows[0][1]) :]):
            raise ConfigError(
                f"{url}: line {line} has {len(cells)} columns, the first line {len(rows[0][1])}: correct it, or put "
                "quotes around values with commas"
            )
    if delimiter != ",":
        rows = [(line, [_DECIMAL_COMMA.sub(r"\1", cell) for cell in cells]) for line, cells in rows]
    return rows


def _matches(
    url: str, rows: dict[str, int], prefixes: Sequence[str], sources: Sequence[Entries]
) -> dict[str, tuple[int, int, int]]:
    """The names in the file that match an input: rank of the match (0 is best), source, entry."""
    best: dict[str, tuple[int, int, int]] = {}
    second: dict[str, tuple[int, str]] = {}  # another input that matches as well
    for source, (prefix, entries) in enumerate(zip(prefixes, sources)):
        for number, path in enumerate(entries.paths):
            ranked = enumerate(_possible_names(prefix, path))
            rank, name = next(((rank, name) for rank, name in ranked if name in rows), (_NO_MATCH, ""))
            best_rank = best.get(name, (_NO_MATCH,))[0]
            if rank < best_rank:
                best[name] = rank, source, number
            elif rank == best_rank < _NO_MATCH:
                second[name] = rank, path
    for name, (rank, path) in second.items():
        if best[name][0] == rank:
            one, other = sorted((path, sources[best[name][1]].paths[best[name][2]]))
            raise ConfigError(f"{url}: {name!a} fits {one!a} and {other!a}: write paths, not names")
    return best


def _possible_names(prefix: str, path: str) -> Iterator[str]:
    """The names by which a row may mean an input, best first."""
    full = comparable(prefix + path)
    yield full
    yield full[len(comparable(prefix)) :]
    base = full.rpartition("/")[2]
    yield base
    yield base.rpartition(".")[0]


def comparable(name: str) -> str:
    """A path in the form in which it is compared: with slashes, and in Unicode's composed form."""
    return normalized(name.replace("\\", "/").removeprefix("./"))


def _text(url: str) -> str:
    try:
        return files.read_bytes(url, pipes=True).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"--labels {url}: there is no such file: give folder, none or a CSV file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{url} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
