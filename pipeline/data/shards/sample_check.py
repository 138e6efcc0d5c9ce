"""Check of the bytes of one sample against sidecar and index.

No member is extracted to disk. In tars of `ddpm shard` and `ddpm sample` only regular files named KEY.extension are
accepted (a tar can hold `../../etc/passwd`, links and devices). In tars made elsewhere other members are ignored.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib

import numpy as np

from pipeline.data.images.preprocess import Rejected
from pipeline.data.shards.index_tars import decoder
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.sources.junk_files import is_junk
from pipeline.data.sources.keys import Sample, group_members, split
from pipeline.data.sources.labels.sample_label import read_label
from pipeline.errors import DataError
from pipeline.untrusted import error_text, parse_json, printable

_MEMBER = re.compile(r"(\d{9,19})\.(png|jpg|webp|cls|json)")
_PNG, _COLOR_TYPE = b"\x89PNG\r\n\x1a\n", 25


class SampleChecker:
    """Checks the samples of a set, one after the other."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards, self._decode = shards, decoder(shards)
        self._is_foreign = bool(shards.settings.get("foreign"))
        self._image_extensions = frozenset(map(str, shards.settings.get("image_ext") or ()))

    def check(self, data: bytes, row: np.void) -> tuple[str | None, str | None]:
        """The key of a sample, if it can be read, and what is wrong with the sample, if anything.

        Args:
            data: the bytes of the sample in the tar.
            row: its row of the sidecar.
        """
        members: dict[str, tarfile.TarInfo] = {}
        key, problem, end = None, None, 0
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in tar:
                    name = self._name(member)
                    if name and key in (None, name[0]) and (self._is_foreign or name[1] not in members):
                        key = name[0]
                        members[name[1]] = member
                    elif not self._is_foreign:
                        problem = f"member {printable(repr(member.name), 200)} has no place in it"
                        break
                end = tar.offset
        except Exception as error:  # tarfile raises many types for damage
            problem = f"damaged headers ({error_text(error)})"
        if zlib.crc32(data) != row["crc32"]:
            return key, "its bytes do not have the crc32 of the sidecar"
        if problem is None and end != len(data):
            problem = "the sidecar's length is not that of its members"
        return key, problem or self._check_members(data, members, row)

    def _name(self, member: tarfile.TarInfo) -> tuple[str, str] | None:
        """Key and extension of a member, or None for a member that cannot be part of a sample."""
        if not member.isreg() or (self._is_foreign and (member.issparse() or is_junk(member.name))):
            return None
        if self._is_foreign:
            return split(member.name)
        name = _MEMBER.fullmatch(member.name)
        return (name[1], name[2]) if name else None

    def _check_members(self, data: bytes, members: dict[str, tarfile.TarInfo], row: np.void) -> str | None:
        payloads = [data[m.offset_data : m.offset_data + m.size] for m in members.values()]
        samples = group_members(tuple(members), self._image_extensions).samples
        if len(samples) != 1:
            return f"{len(samples)} images in it, not one"
        image = [*members.values()][samples[0].image]
        if (image.offset_data, image.size) != (row["image_offset"], row["image_length"]):
            return "its image is not where the sidecar says"
        problem = self._check_labels(samples[0], [*members], payloads, int(row["label"]))
        return problem or self._check_image(payloads[samples[0].image])

    def _check_labels(self, sample: Sample, extensions: list[str], payloads: list[bytes], label: int) -> str | None:
        classes = self._shards.classes
        if classes is not None and not -1 <= label < len(classes):
            return f"class {label} is not one of the {len(classes)} of the index"
        if self._is_foreign:
            return self._check_foreign_label(sample, extensions, payloads, label)
        payload = dict(zip(extensions, payloads))
        if payload.get("cls", b"-1").decode(errors="replace") != str(label):
            return "its class is not that of the sidecar"
        try:
            parse_json(payload.get("json", b"{}"), "KEY.json")
        except DataError:
            return "its KEY.json is not JSON"
        return None

    def _check_foreign_label(
        self, sample: Sample, extensions: list[str], payloads: list[bytes], label: int
    ) -> str | None:
        settings, classes = self._shards.settings, self._shards.classes
        if label < 0 and (settings.get("labels") == "none" or "keys" not in settings):
            return None  # an older version, which read fewer labels, may have indexed this tar
        try:
            stated = read_label(sample, [f"KEY.{extension}" for extension in extensions], payloads.__getitem__, "")
        except DataError as error:
            return str(error)
        expected = None if label < 0 else classes[label] if classes is not None else str(label)
        return None if expected == (None if stated is None else str(stated)) else "its class is not that of the sidecar"

    def _check_image(self, image: bytes) -> str | None:
        try:
            shape = self._decode(image).shape
        except Rejected as error:
            return f"its image cannot be decoded ({error.reason})"
        expected = (*self._shards.size, self._shards.channels)
        # Decoding converts grey and color, so compare the stored channels of PNGs that are not from elsewhere.
        if not self._is_foreign and image.startswith(_PNG) and bool(image[_COLOR_TYPE] & 2) != (expected[2] == 3):
            shape = (*shape[:2], 4 - expected[2])
        return None if shape == expected else f"its image is {shape}, the index says {expected}"
