"""Label values as a source states them (numbers, names, missing values) → class numbers and class names. Pure.

A label is one class number from 0 or one class name. Numbers stay numbers; names are numbered in sorted order.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sources.inputs import NO_LABEL
from pipeline.data.sources.labels.class_names import normalized
from pipeline.errors import DataError
from pipeline.untrusted import printable

ClassNumbers: TypeAlias = "tuple[array[int], tuple[str, ...]]"
"""Class numbers, `NO_LABEL` where there is none, and the names of all classes."""
MAX_CLASSES = 1 << 16
"""Greater class numbers are taken as class names."""
MAX_NAME = 256
"""Characters in a class name."""
# The texts that pandas reads as missing values.
_MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")
_FRACTION = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|Inf|infinity|Infinity)")
_PLAIN_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_SEVERAL_NUMBERS = re.compile(r"[\[(]?[-+]?\d[\d.]*([\s,;]+[-+]?\d[\d.]*)+[\])]?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SHOWN_CHARACTERS = 60


class LabelEncoder:
    """Gives each distinct label value of a source a code, then turns codes into class numbers.

    Args:
        source: name of the source in messages, such as a file and its column.
        unit: what `position` counts in messages: row, line, sample.
        max_values: more distinct values are refused; None: no limit.
    """

    def __init__(self, source: str, unit: str = "row", max_values: int | None = None) -> None:
        self.source, self._unit, self._max_values = source, unit, max_values
        self._values: list[Any] = []
        self._first_positions: list[int | str] = []
        self._codes: dict[tuple[type, Any], int] = {}

    def code(self, value: Any, position: int | str) -> int:
        """The code of a label value.

        Args:
            value: of any type.
            position: the row, line or sample that states it.

        Raises:
            DataError: the value is a list or dict, or there are more distinct values than allowed.
        """
        try:
            code = self._codes.setdefault((type(value), value), len(self._values))
        except TypeError as error:  # a list or dict
            raise self._unusable(value, position, "is not one class") from error
        if code == len(self._values):
            if code == self._max_values:
                raise DataError(
                    f"{printable(self.source)} has more than {code} distinct labels, too many for classes: give "
                    "--labels none"
                )
            self._values.append(value)
            self._first_positions.append(position)
        return code

    def same_class(self, a: int, b: int) -> bool:
        """Whether two codes mean the same class, such as those of `1` and `1.0`."""
        return a == b or self._class_of(a) == self._class_of(b)

    def text(self, code: int) -> str:
        """The label value of a code, for messages."""
        return shown(self._values[code])

    def class_numbers(self, codes: NDArray[np.int64], names: Sequence[str] | None = None) -> ClassNumbers:
        """Turn codes into class numbers.

        Args:
            codes: one for each input; `NO_LABEL` for none.
            names: class names by class number, if the source has them.

        Raises:
            DataError: a value is no class, or a number is beyond `names`, or numbers and names are mixed.
        """
        classes = [self._class_of(code) for code in range(len(self._values))]
        types = {type(label) for label in classes} - {type(None)}
        if len(types) > 1:
            raise self._mixed(classes, codes)
        if types == {str}:
            numbers, all_names = from_names([None if label is None else str(label) for label in classes])
        else:
            whole = [NO_LABEL if label is None else int(label) for label in classes]
            numbers, all_names = from_numbers(whole)
            if types == {bool}:
                all_names = ("False", "True")
            elif names is not None:
                numbers, all_names = array("q", whole), tuple(names)
                if (greatest := max(whole, default=NO_LABEL)) >= len(names):
                    code = whole.index(greatest)
                    reason = f"is beyond the {len(names)} names of classes"
                    raise self._unusable(self._values[code], self._first_positions[code], reason)
        return renumbered(codes, numbers), tuple(map(normalized, all_names))

    def _class_of(self, code: int) -> bool | int | str | None:
        value = self._values[code]
        try:
            return class_of(value)
        except ValueError as error:
            raise self._unusable(value, self._first_positions[code], str(error)) from error

    def _mixed(self, classes: Sequence[Any], codes: NDArray[np.int64]) -> DataError:
        """The error for numbers among names or names among numbers: the rarer kind is taken for the mistake."""
        counts = np.bincount(codes[codes >= 0], minlength=len(classes))
        numbers = [code for code, label in enumerate(classes) if label is not None and not isinstance(label, str)]
        names = [code for code, label in enumerate(classes) if isinstance(label, str)]
        rare, common = sorted((numbers, names), key=lambda group: int(counts[group].sum()))
        kind = "numbers" if common is numbers else "names"
        return self._unusable(
            self._values[rare[0]], self._first_positions[rare[0]], f"is among {kind} such as {self.text(common[0])}"
        )

    def _unusable(self, value: Any, position: int | str, reason: str) -> DataError:
        return DataError(
            f"{printable(self.source)}: {shown(value)} in {self._unit} {printable(str(position))} {reason}: a label is "
            "one whole number from 0 for each image, or one name: correct it, or give --labels none"
        )


def shown(value: Any) -> str:
    """A label value for messages, in ASCII and shortened."""
    text = ascii(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def class_of(value: Any) -> bool | int | str | None:
    """The class that a label value states: a class number, a class name, or None for no label.

    Raises:
        ValueError: the value states no class; its text continues a sentence that begins with the value.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError("is not UTF-8") from error
    if isinstance(value, str):
        return _class_of_text(value.strip())
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return None
        if math.isinf(value) or value != int(value):
            raise ValueError("is not a whole number")
        value = int(value)
    if not isinstance(value, int):
        raise ValueError("is not one class")
    if value < NO_LABEL:
        raise ValueError("is below -1, which says that there is no label")
    return None if value == NO_LABEL else value


def _class_of_text(text: str) -> int | str | None:
    if text in _MISSING:
        return None
    if _WHOLE.fullmatch(text):
        number = class_of(int(text.partition(".")[0]))
        return number if isinstance(number, int) else None
    if _FRACTION.fullmatch(text):
        raise ValueError("is not a whole number")
    if len(text) > MAX_NAME or _CONTROL.search(text):
        raise ValueError(f"is no class name: one line of at most {MAX_NAME} characters is")
    if _SEVERAL_NUMBERS.fullmatch(text):
        raise ValueError("is not one class number but several")
    return normalized(text)


def from_numbers(values: Sequence[int]) -> ClassNumbers:
    """Class numbers as stated, with classes `0` to the greatest; numbers beyond 65,535 are taken as names."""
    greatest = max(values, default=NO_LABEL)
    if greatest >= MAX_CLASSES:
        return from_names([None if value == NO_LABEL else str(value) for value in values])
    return array("q", values), tuple(map(str, range(greatest + 1)))


def from_names(values: Sequence[str | None]) -> ClassNumbers:
    """Class numbers of class names, in sorted order; None is no label."""
    classes = sorted_names({value for value in values if value is not None})
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    return array("q", [numbers.get(value, NO_LABEL) for value in values]), classes


def sorted_names(names: set[str]) -> tuple[str, ...]:
    """Class names in order; if all of them are whole numbers, in the order of the numbers."""
    return tuple(sorted(names, key=int if all(map(_PLAIN_NUMBER.fullmatch, names)) else None))


def renumbered(codes: NDArray[np.int64], numbers: Sequence[int]) -> array[int]:
    """`numbers[code]` of each code, `NO_LABEL` of `NO_LABEL`."""
    table = np.array([*numbers, NO_LABEL], np.int64)  # index -1, which is NO_LABEL, gives the last
    return array("q", table[codes].tobytes())
