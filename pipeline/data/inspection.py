"""One sample's bytes against what sidecar and index say of them.

Nothing is extracted: members are looked at in memory, and of our own tars only regular files named KEY.extension are
accepted (a tar can hold `../../etc/passwd`, links and devices). Others' samples may hold what they like beside what is
read of them.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib

import numpy as np

from pipeline.data.foreign import decoder, label_of, pictures, split
from pipeline.data.images import Rejected
from pipeline.data.shardset import ShardSet

_MEMBER = re.compile(r"(\d{9,})\.(png|jpg|webp|cls|json)")
_PNG, _COLOUR_TYPE = b"\x89PNG\r\n\x1a\n", 25


class Inspector:
    """Looks at one sample after another of a set.

    Args:
        shards: the set.
    """

    def __init__(self, shards: ShardSet) -> None:
        self._shards, self._decode = shards, decoder(shards)
        self._is_foreign = bool(shards.settings.get("foreign"))

    def inspect(self, data: bytes, row: np.void) -> tuple[str | None, str | None]:
        """One sample's bytes: its key if it can be told, and what is wrong with it, if anything."""
        found: dict[str, tarfile.TarInfo] = {}
        key, problem, end = None, None, 0
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in tar:
                    name = self._name(member)
                    if name and key in (None, name[0]) and (self._is_foreign or name[1] not in found):
                        key = name[0]
                        found[name[1]] = member
                    elif not self._is_foreign:
                        problem = f"member {member.name!r} has no place in it"
                        break
                end = tar.offset
        except Exception as error:  # whatever tarfile makes of damage
            problem = f"damaged headers ({error})"
        if zlib.crc32(data) != row["crc32"]:
            return key, "its bytes do not have the crc32 of the sidecar"
        if problem is None and end != len(data):
            problem = "the sidecar's length is not that of its members"
        return key, problem or self._inspect_members(data, found, row)

    def _name(self, member: tarfile.TarInfo) -> tuple[str, str] | None:
        """Key and extension of what may be part of a sample."""
        if not member.isreg():
            return None
        if self._is_foreign:
            return split(member.name)
        name = _MEMBER.fullmatch(member.name)
        return (name[1], name[2]) if name else None

    def _inspect_members(self, data: bytes, members: dict[str, tarfile.TarInfo], row: np.void) -> str | None:
        payload = {name: data[m.offset_data : m.offset_data + m.size] for name, m in members.items()}
        images = pictures(payload)
        if len(images) != 1:
            return f"{len(images)} images in it, not one"
        image = members[images[0]]
        if (image.offset_data, image.size) != (row["image_offset"], row["image_length"]):
            return "its image is not where the sidecar says"
        return self._inspect_labels(payload, int(row["label"])) or self._inspect_image(payload[images[0]])

    def _inspect_labels(self, payload: dict[str, bytes], label: int) -> str | None:
        classes = self._shards.classes
        if self._label(payload) != str(label):
            return "its class is not that of the sidecar"
        if classes is not None and not -1 <= label < len(classes):
            return f"class {label} is not one of the {len(classes)} of the index"
        if self._is_foreign:
            return None
        try:
            json.loads(payload.get("json", b"{}"))
        except (ValueError, RecursionError):
            return "its KEY.json is not JSON"
        return None

    def _label(self, payload: dict[str, bytes]) -> str:
        if not self._is_foreign:
            return payload.get("cls", b"-1").decode(errors="replace")
        if self._shards.settings.get("labels") == "none":
            return "-1"
        try:
            return str(label_of(payload))
        except Rejected as verdict:
            return verdict.detail

    def _inspect_image(self, image: bytes) -> str | None:
        try:
            shape = self._decode(image).shape
        except Rejected as verdict:
            return f"its image cannot be decoded ({verdict.reason})"
        expected = (*self._shards.size, self._shards.channels)
        # Decoding makes colour of grey and grey of colour; what we wrote needs no such help.
        if not self._is_foreign and image.startswith(_PNG) and bool(image[_COLOUR_TYPE] & 2) != (expected[2] == 3):
            shape = (*shape[:2], 4 - expected[2])
        return None if shape == expected else f"its image is {shape}, the index says {expected}"
