"""Class numbers of tars that were indexed one by one → one numbering for the whole set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.shard_set import SIDECAR, write_sidecar_and_record
from pipeline.data.sources.inputs import NO_LABEL
from pipeline.data.sources.labels.label_encoder import LabelEncoder
from pipeline.errors import DataError
from pipeline.storage import files
from pipeline.untrusted import array_rows


def join(out: str, records: Sequence[ShardRecord]) -> tuple[list[ShardRecord], tuple[str, ...] | None]:
    """Give all records one numbering; sidecars and records with another numbering are rewritten.

    Args:
        out: the set.
        records: of its tars. If a record has no `classes`, its class numbers are the names.

    Returns:
        The new records, and the names of the classes; None if there are no classes.

    Raises:
        DataError: one tar has numbers and another has names, or no space is left.
    """
    encoder = LabelEncoder(out, "tar")
    codes = {label: encoder.code(label, record.name) for record in records for label in _labels(record)}
    numbers, classes = encoder.class_numbers(np.array(list(codes.values()), np.int64))
    number_of = dict(zip(codes, map(int, numbers)))
    are_numbers = all(name == str(i) for i, name in enumerate(classes))
    names = None if are_numbers else list(classes)
    return [_renumbered(out, record, number_of, names) for record in records], classes or None


def _labels(record: ShardRecord) -> list[int | str]:
    """The labels of a tar's images."""
    names: list[str] | None = record.extra.get("classes")
    used = [int(label) for label in record.extra["counts"]["classes"]]
    if names is None:
        return [*used]
    return [int(names[i]) if names[i].isascii() and names[i].isdigit() else names[i] for i in used]


def _renumbered(out: str, record: ShardRecord, number_of: dict[int | str, int], names: list[str] | None) -> ShardRecord:
    extra: dict[str, Any] = {**record.extra}
    counts = extra["counts"]
    used = [int(label) for label in counts["classes"]]
    now = [number_of[label] for label in _labels(record)]
    if now == used and names == extra.pop("classes", None):
        return record
    table = np.full(max(used, default=0) + 2, NO_LABEL, np.int64)
    table[used] = now
    sidecar = files.join(out, f"{record.stem}.npy")
    rows = array_rows(files.read_bytes(sidecar), SIDECAR, sidecar).copy()
    rows["label"] = table[rows["label"]]
    by_class = sorted(zip(now, counts["classes"].values()))
    extra["counts"] = {**counts, "classes": {str(label): count for label, count in by_class}}
    if names is not None:
        extra["classes"] = names
    entry = {name: value for name, value in record.entry().items() if name not in ("samples", "sidecar_sha256")}
    try:
        return write_sidecar_and_record(out, record.stem, rows, entry | extra)
    except IndexError as error:  # a row has a label that is not in the counts
        raise DataError(
            f"{record.stem}.npy and .json in {out} do not fit together: remove both, and run the command again"
        ) from error
