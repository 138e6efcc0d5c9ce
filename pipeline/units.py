"""Quantities as people write and read them: `50ep` (epochs), `10m` (a duration), `96x64` (a size). Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, WithJsonSchema

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_S = 3650 * 86400  # threads and collectives accept no longer timeout
_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)", re.ASCII)
_UNITS = {"MiB": 2**20, "GiB": 2**30, "GB": 10**9, "TiB": 2**40, "TB": 10**12}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?)({'|'.join(_UNITS)})", re.ASCII)
_EPOCHS = re.compile(r"(\d+(?:\.\d+)?)ep", re.ASCII)


def _duration(value: object) -> object:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if not match:
            raise ValueError("a duration is a number of seconds, or as in 90s, 10m, 12h, 2d")
        return float(match[1]) * _SECONDS[match[2]]
    return value


def _size(value: object) -> object:
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    is_other_text = isinstance(value, str) and not match and not value.isdecimal()
    if is_other_text or (isinstance(value, list) and len(value) != 2):
        raise ValueError("a size is a number of pixels, or height and width as in [96, 64]")
    return (int(match[1]), int(match[2])) if match else value


def parse_bytes(text: str) -> int:
    """Bytes, from `24GiB`.

    Raises:
        ValueError: the text is no size.
    """
    match = _BYTES.fullmatch(text)
    if not match or not float(match[1]):
        raise ValueError("a number and MiB, GiB, GB, TiB or TB, as in 24GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


def _length(value: object) -> object:
    if isinstance(value, str) and not _EPOCHS.fullmatch(value):
        raise ValueError("a length is a number of steps, or of epochs as in 50ep")
    return value


Duration = Annotated[
    float,
    Field(gt=0, le=_LONGEST_S),
    BeforeValidator(_duration),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": _DURATION.pattern}]}),
]
_SIDE = {"type": "integer", "exclusiveMinimum": 0}
Bytes = Annotated[
    PositiveInt,
    BeforeValidator(_bytes),
    WithJsonSchema({"anyOf": [_SIDE, {"type": "string", "pattern": _BYTES.pattern}]}),
]
Size = Annotated[
    PositiveInt | tuple[PositiveInt, PositiveInt],
    BeforeValidator(_size),
    WithJsonSchema(
        {
            "anyOf": [
                _SIDE,
                {"type": "array", "prefixItems": [_SIDE, _SIDE], "minItems": 2, "maxItems": 2},
                {"type": "string", "pattern": _SIZE.pattern},
            ]
        }
    ),
]
if TYPE_CHECKING:
    Length = int  # after `Config.in_steps`; only a configuration whose data set is not yet known holds text
    PositiveLength = int
else:
    _EPOCHS_TEXT = Annotated[str, Field(pattern=r"^\d+(\.\d+)?ep$")]
    Length = Annotated[NonNegativeInt | _EPOCHS_TEXT, BeforeValidator(_length)]
    PositiveLength = Annotated[PositiveInt | _EPOCHS_TEXT, BeforeValidator(_length)]


def all_of(count: int, unit: str) -> str:
    """`all 3 shards are`, or `the only shard is`."""
    return f"the only {unit} is" if count == 1 else f"all {count:,} {unit}s are"


def epochs(length: int | str) -> Fraction | None:
    """The number of epochs in a length; None if it is given in steps."""
    match = _EPOCHS.fullmatch(length) if isinstance(length, str) else None
    return Fraction(match[1]) if match else None


@dataclass(frozen=True)
class EpochCounter:
    """Converts epochs to steps and back. An epoch has as many samples as the shard set, at any batch size.

    Args:
        epoch: samples in an epoch.
        global_batch: samples in each future step.
        past: (steps, samples) at each change of the global batch, ascending, and now.
    """

    epoch: int
    global_batch: int
    past: Sequence[tuple[int, int]] = ()

    def samples_after(self, steps: int) -> Fraction:
        """Samples consumed after this number of steps."""
        for (first, before), (last, after) in pairwise(((0, 0), *self.past)):
            if steps < last:
                return before + Fraction(after - before, last - first) * (steps - first)
        last, after = ((0, 0), *self.past)[-1]
        return Fraction(after + self.global_batch * (steps - last))

    def steps_for(self, samples: Fraction) -> int:
        """The smallest number of steps that consumes at least this number of samples."""
        for (first, before), (last, after) in pairwise(((0, 0), *self.past)):
            if samples <= after and last > first:
                return first + ceil((samples - before) * (last - first) / (after - before))
        last, after = ((0, 0), *self.past)[-1]
        return last + ceil((samples - after) / self.global_batch)

    def in_steps(self, length: int | str, start: int = 0) -> int:
        """A length in steps, if it begins after `start` steps."""
        count = epochs(length)
        if count is None:
            return int(length)
        return self.steps_for(self.samples_after(start) + count * self.epoch) - start

    def is_reached(self, interval: int | str, step: int) -> bool:
        """Whether this step, and not the one before, reaches a multiple of the interval. An interval of 0: never."""
        count = epochs(interval)
        if count is None:
            return int(interval) > 0 and step % int(interval) == 0
        samples = count * self.epoch
        return samples > 0 and self.samples_after(step) // samples > self.samples_after(step - 1) // samples


def duration_text(seconds: float) -> str:
    """A duration for people: `45 s`, `12 min`, `3 h 05 min`, `4 d 06 h`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes <= 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 72 else f"{hours // 24} d {hours % 24:02} h"


def bytes_text(count: float) -> str:
    """An amount of storage for people: `12.3 KiB`, `4.0 MiB`, `1.5 TiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
