"""The work on one input in a worker process: read, preprocess, encode, pack; or the reason why it is rejected."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from pipeline.data.images.dedupe import fingerprint
from pipeline.data.images.preprocess import EXTENSIONS, Rejected, encode, preprocess_image
from pipeline.data.shards.settings import ShardSettings
from pipeline.data.shards.shard_set import Packed, Sample, key, pack
from pipeline.data.sources.inputs import Input
from pipeline.data.sources.listing import Reader
from pipeline.errors import DataError
from pipeline.processes.pool import exit_cause

_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSYS}


class NumberedInput(NamedTuple):
    """An input and its position in the sorted list of inputs."""

    position: int
    input: Input


class Outcome(NamedTuple):
    """The result for an input: a sample, or a reason why it was rejected."""

    position: int
    source: str
    """The input's name."""
    rejected: tuple[str, str] | None
    """Reason and detail; then all following fields are empty."""
    packed: Packed | None = None
    transforms: tuple[str, ...] = ()
    short_side: int = 0
    """Pixels, as stored."""
    fingerprint: bytes = b""

    def line(self) -> dict[str, str]:
        """The line of a rejected input in `rejected.jsonl`."""
        reason, detail = self.rejected or ("", "")
        return {"key": key(self.position), "source": self.source, "reason": reason, "detail": detail}


class ImageTask:
    """Makes samples of inputs. Each process has its own instance, as open archives do not survive a fork."""

    def __init__(self, reader: Reader, settings: ShardSettings) -> None:
        self._reader, self._settings = reader, settings

    def make(self, items: Sequence[NumberedInput], check_stop: Callable[[], None] = lambda: None) -> Iterator[Outcome]:
        """Yield the outcome of each input, in their order; a thread reads the next inputs meanwhile."""
        read = self._reader.read_ahead([item.input for item in items])
        for item, data, crop_at in zip(items, read, self._crop_positions(items)):
            try:
                if isinstance(data, Rejected):
                    raise data
                yield self._sample(item, data, crop_at)
            except Rejected as error:
                yield Outcome(item.position, item.input.name, (error.reason, error.detail))

    def _sample(self, item: NumberedInput, data: bytes, crop_at: tuple[float, float] | None) -> Outcome:
        settings, (position, source) = self._settings, item
        image = preprocess_image(
            data,
            size=settings.size,
            channels=settings.channels,
            crop_at=crop_at,
            background=settings.background_rgb,
            min_size=settings.min_size,
            pad=settings.pad,
        )
        if settings.has_label_file and source.label is None:
            raise Rejected("no_label")
        sample = Sample(
            key=key(position),
            image=encode(image.array, settings.format),
            extension=EXTENSIONS[settings.format],
            label=source.label,
            meta={"source": source.name, **image.meta},
        )
        return Outcome(
            position=position,
            source=source.name,
            rejected=None,
            packed=pack(sample),
            transforms=tuple(image.meta["transforms"]),
            short_side=min(image.meta["original_size"]),
            fingerprint=fingerprint(image.array, settings.dedupe),
        )

    def _crop_positions(self, items: Sequence[NumberedInput]) -> Iterable[tuple[float, float] | None]:
        if self._settings.crop != "random":
            return [(0.5, 0.5) if self._settings.crop == "center" else None] * len(items)
        import torch  # takes seconds, and only this setting needs it

        from pipeline.keyed_random import Use, uniforms

        positions = uniforms(0, torch.tensor([item.position for item in items]), Use.SHARDING_CROP, (2,))
        return [(x, y) for x, y in positions.tolist()]


def on_worker_death(item: NumberedInput, exit_code: int) -> Outcome:
    """The outcome of an input that has killed two processes.

    Raises:
        DataError: the exit code is not that of a crash of a decoder, so the input may be good.
    """
    if -exit_code in _CRASHES:
        return Outcome(item.position, item.input.name, ("decoder_crashed", exit_cause(exit_code)))
    if -exit_code == signal.SIGXCPU:
        return Outcome(item.position, item.input.name, ("decoder_hung", ""))
    raise DataError(
        f"{ascii(item.input.name)[1:-1]}: two processes died at it with exit code {exit_code}; most often memory has "
        "run out: run the same command again with fewer --workers"
    )
