"""How far a shard set or a sample set is, from its index or its records: no image is read, and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.data.shards import index_file, record_files, sample_set
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.seeds import merged, parse_seeds, ranges_text
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.shards.shard_table import ShardTable
from pipeline.errors import DataError
from pipeline.path_kind import SAMPLE_RECORD, SHARD_RECORD
from pipeline.storage import files
from pipeline.untrusted import locations_of


@dataclass(frozen=True)
class SetStatus:
    """How far one set is."""

    kind: str
    """shard set or sample set."""
    finished: bool
    images: int
    """Images that are there."""
    asked: int | None
    """Inputs or seeds of the whole set; None if unknown."""
    shards: int
    """Shards that are there."""
    size: tuple[int, int] | None
    """(height, width) in pixels; None if unknown."""
    channels: int | None
    classes: dict[str, int | None] | None
    """Class → images, None if they were not counted; None without classes."""
    bytes: int
    """Of the tars, or of the files of samples."""
    rejected: dict[str, int]
    """Inputs not taken, by reason."""
    made_from: str
    """The source, or the seeds and the sampler."""
    format: str
    """tar, png or npz."""


def read(url: str) -> SetStatus | None:
    """How far a set is; None if the directory is no set.

    Raises:
        DataError: the index is damaged or of a newer version.
    """
    names = files.listdir(url)
    if any(map(SAMPLE_RECORD.fullmatch, names)):
        return _of_samples(url)
    if index_file.INDEX in names:
        return _of_index(ShardSet.indexed(url))
    records = _records(url)
    return _of_records(records) if records else None


def tars_of(url: str) -> ShardSet | None:
    """The images of a set in tars, as far as they are there; None if it has no tar.

    Raises:
        DataError: the index is damaged or of a newer version.
    """
    if files.exists(files.join(url, index_file.INDEX)):
        return ShardSet.indexed(url)
    records, status = _records(url), read(url)
    if not records or status is None or status.size is None:
        return None
    locations = locations_of(record.name for record in records)  # `ddpm index` names tars that lie elsewhere
    return ShardSet(
        url=url, shards=ShardTable.of(records, tuple(locations)), size=status.size,
        samples=sum(record.samples for record in records),
        channels=status.channels or 3, classes=None, sha256="", source="", settings={}, settings_sha256="", counts={},
    )  # fmt: skip


def _records(url: str) -> list[ShardRecord]:
    """The records of the tars of a set."""
    sizes = files.sizes(url)
    stems = (match[1] for name in sorted(sizes) if (match := SHARD_RECORD.fullmatch(name)))
    return list(record_files.read(url, stems, sizes).values())


def _of_index(shards: ShardSet) -> SetStatus:
    counts, source = shards.counts, shards.source
    by_class = counts.get("classes") if isinstance(counts.get("classes"), dict) else None
    return SetStatus(
        kind="shard set",
        finished=True,
        images=shards.samples,
        asked=counts.get("inputs", shards.samples),
        shards=len(shards.shards),
        size=shards.size,
        channels=shards.channels,
        classes=None if shards.classes is None else {name: (by_class or {}).get(name) for name in shards.classes},
        bytes=int(shards.shards.bytes.sum()),
        rejected=dict(counts.get("rejected") or {}),
        made_from=_source_text(source),
        format="tar",
    )


def _of_records(records: list[ShardRecord]) -> SetStatus:
    """An unfinished shard set, from the records of its shards."""
    first = records[0].extra
    settings, source = first.get("settings") or {}, first.get("source") or {}
    rejected: dict[str, int] = {}
    for record in records:
        for reason, count in (record.extra.get("counts") or {}).get("rejected", {}).items():
            rejected[reason] = rejected.get(reason, 0) + count
    size = settings.get("size")
    classes = first.get("classes")
    return SetStatus(
        kind="shard set",
        finished=False,
        images=sum(record.samples for record in records),
        asked=source.get("inputs") if isinstance(source, dict) else None,
        shards=len(records),
        size=(size[0], size[1]) if size else None,
        channels=settings.get("channels"),
        classes=None if classes is None else dict.fromkeys(classes),
        bytes=sum(record.bytes for record in records),
        rejected=rejected,
        made_from=_source_text(source),
        format="tar",
    )


def _of_samples(url: str) -> SetStatus:
    provenance, numbers = sample_set.provenance(url), sample_set.recorded(url)
    records = [record for record in record_files.together(partial(_read, url), numbers) if record]
    there = merged(part for record in records for part in parse_seeds(record["seeds"]) if record["seeds"])
    asked = merged(part for record in records if "asked" in record for part in parse_seeds(record["asked"]))
    count, kind = sum(map(len, there)), str(provenance.get("format", "tar"))
    is_finished = not asked or sum(map(len, asked)) <= count
    is_finished = is_finished and (kind != "tar" or not sample_set.index_is_incomplete(url))
    size = provenance.get("size") or None
    steps = provenance.get("steps")
    sampler = f"{provenance.get('sampler')} in {steps or 'all'} steps"
    weights = f"{provenance.get('weights')} weights of checkpoint {str(provenance.get('checkpoint_sha256'))[:12]}"
    index = ShardSet.indexed(url) if files.exists(files.join(url, index_file.INDEX)) else None
    return SetStatus(
        kind="sample set",
        finished=is_finished,
        images=count,
        asked=sum(map(len, asked)) or None,
        shards=len(records),
        size=(size[0], size[1]) if size else index.size if index else None,
        channels=index.channels if index else None,
        classes=dict.fromkeys(index.classes) if index and index.classes else None,
        bytes=sum(_bytes(record) for record in records),
        rejected={},
        made_from=f"seeds {_shortened(ranges_text(there))}, {sampler}, {weights}",
        format=kind,
    )


def _read(url: str, i: int) -> dict[str, Any] | None:
    try:
        record = files.read_json(files.join(url, f"{sample_set.stem(i)}.json"))
    except (FileNotFoundError, DataError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("seeds"), str) else None


def _bytes(record: dict[str, Any]) -> int:
    listed = record["files"].values() if "files" in record else [record]
    return sum(int(file.get("bytes", 0)) for file in listed)


def _source_text(source: Any) -> str:
    """The URLs of a source, or its text."""
    if not isinstance(source, dict):
        return _shortened(str(source))
    return _shortened(", ".join(map(str, source.get("urls") or ()))) or "unknown"


def _shortened(text: str, longest: int = 200) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"
