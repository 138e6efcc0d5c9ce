"""What a report says of the images that a run was trained on, read from their shard set if it is within reach."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.images.preprocess import REASONS
from pipeline.data.shards.shard_set import REJECTED, ShardSet
from pipeline.errors import DataError
from pipeline.storage import files

_EXAMPLES = 3
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class DataFacts:
    """One shard set."""

    url: str
    problem: str = ""
    """Why the set cannot be read; the other fields are empty then."""
    images: int = 0
    bytes: int = 0
    shape: str = ""
    """Such as `64x64 px, 3 channels`."""
    source: str = ""
    sha256: str = ""
    classes: Mapping[str, int] | None = None
    """Name → images; None without classes."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Images by the short side of the originals, from the power of two in pixels on."""
    transforms: Mapping[str, int] = field(default_factory=dict)
    """What was done to images, and to how many."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Inputs that were not taken, by reason."""
    examples: Mapping[str, list[str]] = field(default_factory=dict)
    """Reason → the first names of such inputs."""

    def meaning(self, reason: str) -> str:
        """A reason in words."""
        return REASONS.get(reason, "")


def read(url: str) -> DataFacts:
    """Read the index of a shard set, and the first inputs that it rejected."""
    try:
        shards = ShardSet.indexed(url)
    except (DataError, OSError) as error:
        return DataFacts(url, problem=str(error))
    height, width = shards.size
    counts = shards.counts
    classes = None
    if shards.classes is not None:
        of_classes = _counts(counts, "classes")
        classes = {name: of_classes.get(name, 0) for name in shards.classes}
    return DataFacts(
        url=url, images=shards.samples, bytes=int(shards.shards.bytes.sum()),
        shape=f"{width}x{height} px, {shards.channels} channel{'s' * (shards.channels > 1)}",
        source=_source(shards.source), sha256=shards.sha256, classes=classes, sizes=_counts(counts, "sizes"),
        transforms=_counts(counts, "transforms"), rejected=_counts(counts, "rejected"), examples=_examples(url),
    )  # fmt: skip


def _counts(counts: Mapping[str, Any], name: str) -> dict[str, int]:
    found = counts.get(name)
    return {str(key): n for key, n in found.items() if isinstance(n, int)} if isinstance(found, dict) else {}


def _source(source: str | dict[str, Any]) -> str:
    urls = source.get("urls") if isinstance(source, dict) else [source]
    return ", ".join(map(str, urls[:5])) if isinstance(urls, list) else ""


def _examples(url: str) -> dict[str, list[str]]:
    examples: dict[str, list[str]] = {}
    with suppress(FileNotFoundError, DataError, OSError):
        with files.open_read(files.join(url, REJECTED)) as file:
            lines = file.read(_MOST_BYTES).splitlines()
        for text in lines:
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                line = json.loads(text)
                names = examples.setdefault(str(line["reason"]), [])
                if len(names) < _EXAMPLES:
                    names.append(str(line["source"]))
    return examples
