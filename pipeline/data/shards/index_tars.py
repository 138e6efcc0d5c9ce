"""Tars of a webdataset made elsewhere → a sidecar and a record for each tar; the tars stay as they are.

A tar is read once, from its first byte to its last. Consecutive members of one key make a sample, by the rule of
`data.sources.keys`. A sample is taken if its image decodes to the set's size; every other sample becomes a line of
`rejected.jsonl`. `labels.sample_label` reads the class of a sample.
"""

from __future__ import annotations

import math
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images.preprocess import MAX_BYTES, PREPROCESSING, Rejected, decode, preprocess_image
from pipeline.data.shards.join import Counts
from pipeline.data.shards.record import ShardRecord
from pipeline.data.shards.settings import IndexSettings
from pipeline.data.shards.shard_set import SIDECAR, ShardSet, read_record, write_sidecar_and_record
from pipeline.data.sources.inputs import BESIDE_IMAGE, LABEL_FILE, NO_LABEL, SYSTEM_FILE
from pipeline.data.sources.keys import Sample, group_members
from pipeline.data.sources.labels.label_encoder import LabelEncoder
from pipeline.data.sources.labels.sample_label import is_class_text, read_label
from pipeline.data.sources.tar_samples import LINK, UNREADABLE, label_encoder
from pipeline.data.sources.tar_stream import TarGroup, Window, groups
from pipeline.errors import DataError
from pipeline.processes.pool import exit_cause
from pipeline.storage import files
from pipeline.untrusted import error_text

_SIZES_RECORDED = 8
_UNREAD = UNREADABLE | {LINK: "a link, whose bytes lie elsewhere in the tar"}
_MAX_OTHER_PIXELS = 1 << 22  # up to here an image of another size than its set is decoded, for a message with its size


class Tar(NamedTuple):
    """A tar to read."""

    url: str
    name: str
    """Its name in the index of the set."""
    stem: str
    """The names of its sidecar and record, without the ending."""
    size: int
    """Bytes."""
    stamp: int
    """Differs if the content does."""


class Taken(NamedTuple):
    """A sample that can be trained on."""

    row: bytes
    """Its row of the sidecar, with the code of its label."""
    size: tuple[int, int]
    """(H, W) of its image in the set."""
    transforms: tuple[str, ...]
    short_side: int
    """Of the image file, in pixels."""


class Scan(NamedTuple):
    """The result of reading a tar."""

    bytes: int
    sha256: str
    samples: dict[str, Taken | Rejected]
    """By key, in the order of the tar; system files, and images beside the image of a sample, by path."""
    rows: NDArray[np.void]
    """The sidecar."""
    classes: tuple[str, ...]
    """Names of the classes, by the numbers in `rows`."""


class Indexer:
    """Reads tars and writes their sidecars and records into a set.

    Args:
        out: the set.
        settings: of the set.
    """

    def __init__(self, out: str, settings: IndexSettings) -> None:
        self._out, self._settings = out, settings

    def has_record(self, tar: Tar) -> bool:
        """Whether the set has a record of this tar, made with these settings, and neither has changed since."""
        record = read_record(self._out, tar.stem)
        if record is None or (record.name, record.bytes) != (tar.name, tar.size):
            return False
        if (record.extra.get("settings"), record.extra.get("stamp")) != (self._settings.as_json(), tar.stamp):
            return False
        return files.sha256(files.join(self._out, f"{tar.stem}.npy")) == record.sidecar_sha256

    def index(self, tars: Iterable[Tar], check_stop: Callable[[], None]) -> Iterator[ShardRecord]:
        """Read tars and write their sidecars and records; `check_stop` is called before each sample.

        Raises:
            DataError: a tar is damaged, or has changed meanwhile, or there is no space left.
        """
        for tar in tars:
            yield self._index(tar, check_stop)

    def _index(self, tar: Tar, check_stop: Callable[[], None]) -> ShardRecord:
        scanned = scan(tar.url, self._settings, check_stop)
        if scanned.bytes != tar.size:
            raise DataError(
                f"{tar.url} was {tar.size} bytes long and is {scanned.bytes} now: wait until it is complete"
            )
        fields = {"name": tar.name, "bytes": scanned.bytes, "sha256": scanned.sha256, "sidecar": f"{tar.stem}.npy"}
        fields |= {"settings": self._settings.as_json(), "stamp": tar.stamp, **_count(tar.name, scanned)}
        if any(name != str(number) for number, name in enumerate(scanned.classes)):
            fields["classes"] = list(scanned.classes)
        return write_sidecar_and_record(self._out, tar.stem, scanned.rows, fields)


def on_worker_death(tar: Tar, exit_code: int) -> ShardRecord:
    """Refuse a tar at which two processes have died.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"{tar.url}: two processes died at it ({exit_cause(exit_code)}): an image in it crashes its decoder, or "
        "memory has run out: leave it out, or run the same command again with fewer --workers"
    )


def decoder(shards: ShardSet) -> Callable[[bytes], NDArray[np.uint8]]:
    """The function from an image file of this set to its image, uint8 (H, W, C); it raises Rejected.

    Raises:
        DataError: the set was indexed by a version that made other images of the same files.
    """
    if not shards.settings.get("foreign"):
        return partial(decode, channels=shards.channels, max_pixels=max(math.prod(shards.size), _MAX_OTHER_PIXELS))
    if shards.settings.get("pictures") != PREPROCESSING:
        raise DataError(f"{shards.url} was indexed by another version, which makes other images: index it again")
    return lambda data: preprocess_image(data, size=shards.size, channels=shards.channels, blank=True).array


def scan(url: str, settings: IndexSettings, check_stop: Callable[[], None]) -> Scan:
    """Read a tar from its first byte to its last.

    Args:
        url: path or URL.
        settings: of the set.
        check_stop: called before each sample; may raise.

    Raises:
        DataError: the tar cannot be read, is cut short, damaged, or compressed.
    """
    samples: dict[str, Taken | Rejected] = {}
    labels, keys_of_group = label_encoder(url), dict[str, list[str]]()
    try:
        with files.open_read(url) as file:
            window = Window(file)
            reader = _GroupReader(url, settings, window, labels)
            for group in groups(window):
                check_stop()
                if isinstance(group, str):
                    samples[group] = Rejected(SYSTEM_FILE)
                    continue
                is_repeated = group.key in samples or group.key in keys_of_group
                of_group = dict(reader.samples(group, is_repeated))
                for key in keys_of_group.get(group.key, [group.key]) if is_repeated else ():
                    of_group[key] = Rejected("scattered", "its members do not follow each other")
                samples |= of_group
                if of_group.keys() != {group.key}:
                    keys_of_group[group.key] = [*of_group]
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file: check the name") from error
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, LookupError) as error:
        raise DataError(
            f"{url} is not a valid tar ({error_text(error)}): copy or make it again, or unpack it"
        ) from error
    packed = b"".join(sample.row for sample in samples.values() if isinstance(sample, Taken))
    rows = np.frombuffer(packed, SIDECAR).copy()  # to be written to
    rows["label"], classes = labels.class_numbers(rows["label"].astype(np.int64))
    return Scan(window.end, window.sha256.hexdigest(), samples, rows, classes)


class _GroupReader:
    """Makes samples of the groups of one tar: the members of one key that follow each other."""

    def __init__(self, url: str, settings: IndexSettings, window: Window, labels: LabelEncoder) -> None:
        self._url, self._settings, self._window, self._labels = url, settings, window, labels
        self._extensions = settings.extensions
        self._shared: dict[Any, Any] = {}

    def samples(self, group: TarGroup, is_repeated: bool) -> Iterator[tuple[str, Taken | Rejected]]:
        """Each sample of a group, by its key; if the key came before, all are rejected."""
        extensions = tuple(member.extension for member in group.members)
        listed = ", ".join(sorted(extensions))
        if (size := group.last - group.first) > MAX_BYTES:
            yield group.key, Rejected("too_many_bytes", f"{size} bytes, the limit is {MAX_BYTES}")
            return
        if len(set(extensions)) < len(extensions):
            yield group.key, Rejected("scattered", "a member is there twice")
            return
        divided = group_members(extensions, self._extensions)
        if divided.unclear:
            yield group.key, Rejected("several_pictures", listed)
            return
        for number in divided.beside:
            yield group.members[number].path, Rejected(BESIDE_IMAGE)
        if not divided.samples and not divided.beside:
            is_label = all(is_class_text(member.path) for member in group.members)
            yield group.key, Rejected(LABEL_FILE, "of no image") if is_label else Rejected("no_picture", listed)
        spans = [_span(group, sample, alone=len(divided.samples) == 1) for sample in divided.samples]
        for sample, span in zip(divided.samples, spans):
            try:
                if is_repeated or sum(span[0] < last and first < span[1] for first, last in spans) > 1:
                    raise Rejected("several_pictures", f"{listed}: their members do not follow each other")
                yield group.key + sample.name, self._take(group, sample, span)
            except Rejected as reason:
                yield group.key + sample.name, reason

    def _take(self, group: TarGroup, sample: Sample, span: tuple[int, int]) -> Taken:
        def payload(number: int) -> bytes:
            member = group.members[number]
            if member.offset < 0:
                raise ValueError(f"it is {_UNREAD[member.offset]}")
            return self._window.part(member.offset, member.offset + member.size)

        image_member, settings = group.members[sample.image], self._settings
        if image_member.offset < 0:
            raise Rejected("unreadable", f"{image_member.path} is {_UNREAD[image_member.offset]}")
        paths = [member.path for member in group.members]
        label = None if settings.labels == "none" else read_label(sample, paths, payload, self._url)
        data = self._window.part(*span)
        image = preprocess_image(payload(sample.image), size=settings.size, channels=settings.channels)
        height, width = image.array.shape[:2]
        row = (
            span[0],
            len(data),
            zlib.crc32(data),
            image_member.offset - span[0],
            image_member.size,
            NO_LABEL if label is None else self._labels.code(label, image_member.path),
        )
        size, transforms = (height, width), tuple(image.meta["transforms"])
        # All samples of a tar are in memory until its end, as a key may come again: most share these two.
        share = self._shared.setdefault
        return Taken(
            np.array([row], SIDECAR).tobytes(),
            share(size, size),
            share(transforms, transforms),
            min(image.meta["original_size"]),
        )


def _span(group: TarGroup, sample: Sample, alone: bool) -> tuple[int, int]:
    """First byte of a sample, and the byte after its last."""
    numbers = {sample.image, *(number for level in sample.companions for number in level)}
    own = [member for number, member in enumerate(group.members) if alone or number in numbers]
    return own[0].header_offset, own[-1].end


def _count(source: str, scanned: Scan) -> dict[str, Any]:
    """`counts`, `rejected` and the most frequent `picture_sizes`, for a record."""
    counts, sizes = Counts(), Counter[str]()
    labels = iter(scanned.rows["label"].tolist())
    for key, sample in scanned.samples.items():
        if isinstance(sample, Rejected):
            counts.reject({"key": key, "source": source, "reason": sample.reason, "detail": sample.detail})
        else:
            counts.take(sample.transforms, sample.short_side, next(labels))
            sizes["x".join(map(str, sample.size))] += 1
    return {**counts.as_json(), "picture_sizes": dict(sizes.most_common(_SIZES_RECORDED))}
