"""Class names: compare two lists of them, and find the number that a class of one list has in the other. Pure.

A network and a shard set each number their classes; the name tells what a number means. Names are compared in
Unicode's composed form (NFC). Classes called 0, 1, 2 … in this order have no names, only numbers.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from pipeline.untrusted import printable

_LISTED = 12
"""Names that a message lists at most."""
_NAME_LENGTH = 40


def normalized(text: str) -> str:
    """Unicode's composed form (NFC), in which equal-looking names are equal."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def parse(value: Any, count: int) -> tuple[str, ...] | None:
    """The class names in a checkpoint or an index; None unless the value is a list of `count` texts."""
    if isinstance(value, list | tuple) and len(value) == count and all(isinstance(name, str) for name in value):
        return tuple(value)
    return None


def numbers(count: int) -> tuple[str, ...]:
    """The names of `count` classes that have only numbers."""
    return tuple(map(str, range(count)))


def are_numbers(names: Sequence[str]) -> bool:
    """Whether these classes have only numbers."""
    return tuple(names) == numbers(len(names))


def find(names: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """For each wanted name its number in `names`; None where it is missing or several classes share it.

    Equal lists agree number by number, even if a name occurs twice.
    """
    own, others = list(map(normalized, names)), list(map(normalized, wanted))
    if own == others:
        return list(range(len(own)))
    counts, wanted_counts = Counter(own), Counter(others)
    number_of = {name: number for number, name in enumerate(own)}
    return [number_of[name] if counts[name] == wanted_counts[name] == 1 else None for name in others]


def mapping(names: Sequence[str], others: Sequence[str]) -> list[int] | None:
    """For each class of `others` its number in `names`; None if one of them is missing there."""
    found = [number for number in find(names, others) if number is not None]
    return found if len(found) == len(others) else None


def match_by_number(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether only one list has names, and the list of numbers is no longer than it, so that numbers can be matched."""
    if are_numbers(names) == are_numbers(others):
        return False
    return len(others) <= len(names) if are_numbers(others) else len(others) == len(names)


def listed(names: Sequence[str], other: Sequence[str]) -> str:
    """Names for a message; of a long list the names that `other` lacks come first."""
    shown = list(names)
    if len(names) > _LISTED:
        known = set(map(normalized, other))
        shown = sorted(shown, key=lambda name: normalized(name) in known)[:_LISTED]
    text = ", ".join(printable(name[:_NAME_LENGTH]) + "…" * (len(name) > _NAME_LENGTH) for name in shown)
    return text if len(shown) == len(names) else f"{text}, … of {len(names):,}"


def numbered(names: Sequence[str], near: str = "") -> str:
    """Numbers with names for a message, such as `0 (big), 1 (mid)`; of a long list the names most like `near` first."""
    if are_numbers(names):
        return f"0 to {len(names) - 1}"
    order = sorted(range(len(names)), key=lambda i: -SequenceMatcher(None, near, names[i]).ratio())[:_LISTED]
    shown = range(len(names)) if len(names) <= _LISTED else order
    text = ", ".join(f"{i} ({listed([names[i]], ())})" for i in shown)
    return text if len(names) <= _LISTED else f"{text}, … of {len(names):,}"


def compared(there: Sequence[str], here: Sequence[str]) -> str:
    """Both lists for a message."""
    return f"[{listed(there, here)}] there, [{listed(here, there)}] here"
