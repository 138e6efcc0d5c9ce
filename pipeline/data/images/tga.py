"""TGA: the meaning of the bits beside the colors. Pillow always takes them for alpha, and inverts some. Pure.

As Truevision's TGA specification 2.0 says: the extension area has an attributes type; without this area the header's
number of attribute bits decides.
"""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImagePalette

AlphaType = Literal["none", "straight", "associated"]
_HEADER_BYTES = 18
_FOOTER, _FOOTER_BYTES = b"TRUEVISION-XFILE.\0", 26
_TYPE_OFFSET, _DEPTH_OFFSET, _BITS_OFFSET = 494, 16, 17
_STRAIGHT, _ASSOCIATED = 3, 4


def alpha_type(data: bytes) -> AlphaType:
    """Whether the bits beside the colors are alpha, and whether colors are multiplied by it (associated)."""
    if data.endswith(_FOOTER) and len(data) >= _HEADER_BYTES + _FOOTER_BYTES:
        (extension,) = struct.unpack_from("<I", data, len(data) - _FOOTER_BYTES)
        if extension and extension + _TYPE_OFFSET < len(data) - _FOOTER_BYTES:
            kind = data[extension + _TYPE_OFFSET]
            return "straight" if kind == _STRAIGHT else "associated" if kind == _ASSOCIATED else "none"
    return "straight" if data[_BITS_OFFSET] & 15 else "none"


def set_palette(image: Image.Image, data: bytes) -> None:
    """Set the colors and the alpha of the palette of an opened TGA that is not yet loaded.

    Raises:
        EOFError: the file ends inside its palette.
    """
    first, count, bits = struct.unpack_from("<HHB", data, 3)
    start, size = _HEADER_BYTES + data[0], (bits + 7) // 8
    stored = np.frombuffer(data[start : start + count * size], np.uint8)
    if len(stored) < count * size:
        raise EOFError("no more bytes in its color map")
    entries = np.zeros((first + count, 4), np.uint8)  # red, green, blue, alpha
    entries[:, 3] = 255
    if size == 2:
        values = stored.view("<u2").astype(np.uint32)
        five = np.stack([values >> 10 & 31, values >> 5 & 31, values & 31], -1)
        entries[first:, :3], entries[first:, 3] = five * 255 // 31, (values >> 15) * 255
    else:
        entries[first:, :size] = stored.reshape(count, size)[:, [2, 1, 0, 3][:size]]
    entries = entries[:256]
    image.palette = ImagePalette.raw("RGB", entries[:, :3].tobytes())
    if alpha_type(data) != "none" and size != 3:
        image.info["transparency"] = entries[:, 3].tobytes()


def correct_alpha(image: Image.Image, data: bytes) -> Image.Image:
    """Correct the alpha of a decoded image; remove it if the file has none."""
    if image.mode not in ("RGBA", "LA"):
        return image
    if alpha_type(data) == "none":
        return image.convert(image.mode[:-1])
    if image.mode == "RGBA" and data[_DEPTH_OFFSET] == 16:  # Pillow inverts the single bit
        image.putalpha(ImageChops.invert(image.getchannel("A")))
    return image
