"""A decoded image of any mode, depth and profile → opaque sRGB or grey of 8 bits. Pure.

The ICC profile is applied (relative colorimetric, as in libvips), 16 bits are scaled to 8, inks become light, and
transparent pixels show the background. CMYK without a profile has no defined color; ideal inks are assumed:
R = (1 - C)(1 - K).
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class UnknownWhiteError(ValueError):
    """The value of white is unknown: floating point, signed integers, or integers of more than 16 bits."""


def flatten(
    image: Image.Image,
    channels: int,
    background: tuple[int, int, int],
    box: tuple[float, float, float, float],
    transforms: list[str],
) -> tuple[Image.Image, bool]:
    """Make an image opaque, in mode RGB or L so that it can be resized; `to_srgb` has to follow.

    Args:
        image: decoded by Pillow.
        channels: 3 or 1.
        background: sRGB color under transparent pixels.
        box: left, top, right, bottom of the part that will be used.
        transforms: the applied steps are appended.

    Returns:
        The image, and whether it is entirely transparent in the box.

    Raises:
        UnknownWhiteError: floating point, or integers of more than 16 bits.
    """
    color, alpha = _without_alpha(_eight_bits(image, transforms))
    wanted = "L" if channels == 1 else "RGB"
    if color.mode not in (wanted, "1", "L"):
        transforms.append(f"{image.mode}_to_{wanted}")
    if color.mode in ("CMYK", "LAB"):
        color = _apply_profile(_uninverted(color), transforms).convert("RGB")
    is_blank = False
    if alpha is not None:
        left, top, right, bottom = box
        used = alpha.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
        is_blank = used.getextrema() == (0, 0)
        # Before resizing: the background is sRGB, and hidden colors must not bleed into visible ones.
        transforms.append("composited")
        canvas = Image.new("RGB", color.size, background)
        canvas.paste(_apply_profile(color, transforms).convert("RGB"), mask=alpha)
        color = canvas
    grey = color.mode in ("1", "L") or (channels == 1 and "icc_profile" not in color.info)
    return _in_mode("L" if grey else "RGB", color), is_blank


def to_srgb(image: Image.Image, channels: int, transforms: list[str]) -> Image.Image:
    """Convert the result of `flatten` to sRGB or grey; cheap after resizing, when the image is small."""
    return _in_mode("L" if channels == 1 else "RGB", _apply_profile(image, transforms))


def _in_mode(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image, transforms: list[str]) -> Image.Image:
    """Scale 16-bit grey, which Pillow's own conversion would clip to white; it decodes color to 8 bits itself."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if image.mode == "F":
        raise UnknownWhiteError("floating point")
    if not image.mode.startswith("I"):
        return image
    transforms.append("scaled_16_bit")
    values = image.convert("I")
    lowest, highest = np.asarray(values).min(), np.asarray(values).max()
    if bits > 16 or lowest < 0 or highest >= 1 << 16:
        raise UnknownWhiteError("integers beyond 16 bits, or negative ones")
    grey = values.point(_to_255((1 << bits) - 1), "L")
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = ImageChops.invert(grey)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(values.point([0 if value == key else 255 for value in range(1 << 16)], "L"))
    return grey


@lru_cache
def _to_255(white: int) -> list[int]:
    return [min(255, (value * 255 + white // 2) // white) for value in range(1 << 16)]


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colors and alpha; alpha is None if the image is opaque."""
    if not image.has_transparency_data:
        return (image.convert("RGB") if image.mode == "P" else image), None
    if image.mode != "LA":
        image = image.convert("RGBA")
    alpha = image.getchannel("A")
    color = image.convert(image.mode[:-1])
    return color, None if alpha.getextrema() == (255, 255) else alpha


def _uninverted(image: Image.Image) -> Image.Image:
    """Undo Pillow's inversion of a CMYK JPEG that is not of Adobe: it assumes that all are, and Adobe inverts."""
    if image.mode == "CMYK" and getattr(image, "format", None) == "JPEG" and "adobe" not in image.info:
        return ImageChops.invert(image)
    return image


def _apply_profile(image: Image.Image, transforms: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile")
    transform = _srgb_transform(profile, image.mode) if profile else None
    if transform is None:
        return image
    transforms.append("icc_to_srgb")
    return transform.apply(image)  # the result is marked as sRGB


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None if the profile is damaged, of another mode, or equals sRGB to within one level."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(source, target, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode in ("L", "RGB"):
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(*[levels] * len(mode)), -1).reshape(-1, len(levels), len(mode))
        probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
        difference = np.asarray(ImageChops.difference(transform.apply(probe), probe.convert("RGB")))
        if difference.max() <= 1:
            return None
    return transform
