"""An image file → its decoded image, by Pillow. Pure.

Where versions 11 to 13 of Pillow differ, or all are wrong, this module corrects them: the pixels do not depend on the
version.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from pipeline.data.images import png, tga, tiff

_PNG = b"\x89PNG\r\n\x1a\n"
_LOSSLESS_JPEG = {0xC3, 0xC7, 0xCB, 0xCF}
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0, 1, *range(0xD0, 0xDA)}


@dataclass
class OpenedImage:
    """An image file of which only the header was read."""

    image: ImageFile.ImageFile
    data: bytes
    """The file as given to Pillow."""
    is_associated: bool = False
    """Whether colors are stored multiplied by opacity (associated alpha)."""


def open_image(data: bytes, formats: list[str]) -> OpenedImage:
    """Read the header of an image file.

    Args:
        data: the bytes of the file.
        formats: Pillow's names of the formats to try.

    Raises:
        Exception: whatever Pillow raises.
    """
    if data.startswith(tiff.SIGNATURES):
        return _open_tiff(data, formats)
    if data.startswith(_PNG):
        data = png.without_texts(data)
    opened = OpenedImage(Image.open(io.BytesIO(data), formats=formats), data)
    image = opened.image
    if image.format == "PNG" and image.mode != "P" and "transparency" in image.info:
        png.set_transparent_color(image, data)
    elif image.format == "TGA":
        opened.is_associated = tga.alpha_type(data) == "associated"
        if image.mode == "P":
            tga.set_palette(image, data)
    return opened


def _open_tiff(data: bytes, formats: list[str]) -> OpenedImage:
    file = tiff.prepare(data)
    before = TiffImagePlugin.READ_LIBTIFF
    try:
        TiffImagePlugin.READ_LIBTIFF = file.needs_libtiff
        image = Image.open(io.BytesIO(file.data), formats=formats)
    finally:
        TiffImagePlugin.READ_LIBTIFF = before
    return OpenedImage(image, file.data, file.is_associated)


def decode_first_frame(opened: OpenedImage, size: tuple[int, int], transforms: list[str]) -> tuple[Image.Image, float]:
    """Decode an image; a JPEG at reduced scale if that is enough for the target size.

    Args:
        opened: the file.
        size: (H, W) of the target.
        transforms: the applied steps are appended.

    Returns:
        The image, and the number of stored pixels per decoded pixel along each side.
    """
    image = opened.image
    w, h = image.size
    scale = _set_scale(opened, size)
    if _is_animated(image):
        transforms.append("first_frame")
    frame_box = image.tile[0][1] if image.format == "GIF" and image.tile else None
    image.load()
    if scale > 1:
        transforms.append("decoded_reduced")
    if frame_box in (None, (0, 0, w, h)):
        return _with_alpha(opened), scale
    # Where the first frame of a GIF has no pixels it is transparent, whatever its background color, as in browsers.
    canvas = Image.new("RGBA", (w, h))
    canvas.paste(image.convert("RGBA").crop(frame_box), frame_box[:2])
    return canvas, scale


def _set_scale(opened: OpenedImage, size: tuple[int, int]) -> float:
    """Choose the scale of a JPEG: 1/2, 1/4 and 1/8 decode several times faster; twice the target size must remain."""
    image = opened.image
    w, h = image.size
    if image.format not in ("JPEG", "MPO") or _is_lossless_jpeg(opened.data):
        return 1.0
    reduction = min(w, h) / max(size) / 2
    drafted = image.draft(None, (int(w / reduction), int(h / reduction)))
    if not drafted:
        return 1.0
    image.decodermaxblock = len(opened.data)
    return w / drafted[1][2]


def _is_lossless_jpeg(data: bytes) -> bool:
    """A lossless JPEG has no other scale; some versions of libjpeg-turbo crash when asked for one."""
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:
            at += 1
        elif marker in _START_OF_FRAME:
            return marker in _LOSSLESS_JPEG
        elif marker in _WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _with_alpha(opened: OpenedImage) -> Image.Image:
    image: Image.Image = opened.image
    if opened.image.format == "TGA":
        image = tga.correct_alpha(image, opened.data)
    elif opened.image.format == "PNG" and (alpha := png.alpha_of_16_bits(image, opened.data)) is not None:
        image.putalpha(alpha)
    return _unassociated(image) if opened.is_associated else image


def _unassociated(image: Image.Image) -> Image.Image:
    """Divide colors by the opacity with which they were multiplied."""
    if image.mode not in ("LA", "RGBA"):
        return image
    values = np.asarray(image).astype(np.uint32)
    alpha = values[..., -1:]
    colors = np.minimum(255, (values[..., :-1] * 255 + alpha // 2) // np.maximum(alpha, 1))
    divided = Image.fromarray(np.concatenate([colors, alpha], -1).astype(np.uint8))
    divided.info = image.info
    return divided


def _is_animated(image: ImageFile.ImageFile) -> bool:
    try:
        return image.format != "PSD" and getattr(image, "is_animated", False)  # layers of Photoshop are not frames
    except Exception:  # the second frame is damaged, the first is not
        image.seek(0)
        return True
