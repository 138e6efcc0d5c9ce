"""One input on its way into a shard: read, picture, encode, pack; or a reason why not. What a worker process does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from pipeline.data.dedupe import Dedupe, fingerprint
from pipeline.data.images import EXTENSIONS, PREPROCESSING, ImageFormat, Rejected, encode, to_picture
from pipeline.data.inputs import Input
from pipeline.data.shardset import Packed, Sample, key, pack
from pipeline.data.sources import Reader
from pipeline.errors import DataError

Crop = Literal["center", "none", "random"]
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSYS}


@dataclass(frozen=True)
class Settings:
    """All that decides what a shard's bytes are, given its inputs; the fields are those of `shard.shard`."""

    size: tuple[int, int]
    channels: int
    crop: Crop
    pad: bool
    format: ImageFormat
    labels: Literal["folder", "none", "csv"]
    background: tuple[int, int, int]
    min_size: int
    dedupe: Dedupe
    shard_samples: int
    preprocessing: int = PREPROCESSING

    def as_json(self) -> dict[str, Any]:
        """As in the index, where tuples are lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Placed(NamedTuple):
    """An input and its position in the sorted list of inputs."""

    position: int
    input: Input


class Made(NamedTuple):
    """What has become of an input."""

    position: int
    source: str
    """The input's name."""
    rejected: tuple[str, str] | None
    """Reason and detail; all that follows is empty then."""
    packed: Packed | None = None
    transforms: tuple[str, ...] = ()
    short_side: int = 0
    """Pixels, as stored."""
    fingerprint: bytes = b""

    def line(self) -> dict[str, str]:
        """Its line in `rejected.jsonl`."""
        reason, detail = self.rejected or ("", "")
        return {"key": key(self.position), "source": self.source, "reason": reason, "detail": detail}


class Intake:
    """Makes samples of inputs; each process has its own, for archives that are open do not survive a fork."""

    def __init__(self, reader: Reader, settings: Settings) -> None:
        self._reader, self._settings = reader, settings

    def make(self, items: Sequence[Placed]) -> Iterator[Made]:
        """One result for each input, in their order, while the next ones are being read."""
        read = self._reader.read_ahead([item.input for item in items])
        for item, data, crop_at in zip(items, read, self._crop_places(items)):
            try:
                if isinstance(data, Rejected):
                    raise data
                yield self._sample(item, data, crop_at)
            except Rejected as verdict:
                yield Made(item.position, item.input.name, (verdict.reason, verdict.detail))

    def _sample(self, item: Placed, data: bytes, crop_at: tuple[float, float] | None) -> Made:
        settings, (position, source) = self._settings, item
        picture = to_picture(
            data,
            size=settings.size,
            channels=settings.channels,
            crop_at=crop_at,
            background=settings.background,
            min_size=settings.min_size,
            pad=settings.pad,
        )
        if settings.labels == "csv" and source.label is None:
            raise Rejected("no_label")
        sample = Sample(
            key=key(position),
            image=encode(picture.array, settings.format),
            extension=EXTENSIONS[settings.format],
            label=source.label,
            meta={"source": source.name, **picture.meta},
        )
        return Made(
            position=position,
            source=source.name,
            rejected=None,
            packed=pack(sample),
            transforms=tuple(picture.meta["transforms"]),
            short_side=min(picture.meta["original_size"]),
            fingerprint=fingerprint(picture.array, settings.dedupe),
        )

    def _crop_places(self, items: Sequence[Placed]) -> Iterable[tuple[float, float] | None]:
        if self._settings.crop != "random":
            return [(0.5, 0.5) if self._settings.crop == "center" else None] * len(items)
        import torch  # seconds that only this setting has to wait for

        from pipeline.noise import Use, uniforms

        places = uniforms(0, torch.tensor([item.position for item in items]), Use.SHARDING_CROP, (2,))
        return [(x, y) for x, y in places.tolist()]


def make(intake: Intake, items: Sequence[Placed], _go_on: Callable[[], None]) -> Iterator[Made]:
    """`Intake.make`, for a pool."""
    return intake.make(items)


def bury(item: Placed, exit_code: int) -> Made:
    """The verdict on an input that has killed the two processes that looked at it.

    Raises:
        DataError: they did not die of it; to reject it would be wrong.
    """
    if -exit_code in _CRASHES:
        return Made(item.position, item.input.name, ("decoder_crashed", signal.Signals(-exit_code).name))
    if -exit_code == signal.SIGXCPU:
        return Made(item.position, item.input.name, ("decoder_hung", ""))
    raise DataError(
        f"{ascii(item.input.name)[1:-1]}: two processes died at it with exit code {exit_code}; most often memory has "
        "run out: run the same command again with fewer --workers"
    )
