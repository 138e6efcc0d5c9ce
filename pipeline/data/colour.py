"""A decoded picture of any mode, depth and profile → opaque sRGB or grey of 8 bits; pure.

The colours are those that the file means: its ICC profile is applied (relative colorimetric, as libvips does it), 16
bits are scaled, ink is put on paper, and whatever is transparent shows the background. CMYK without a profile has no
defined colour; it is taken as ideal inks, R = (1 - C)(1 - K).
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class UnknownWhiteError(ValueError):
    """Samples whose largest value, hence white, the file does not tell."""


def flattened(
    image: Image.Image, channels: int, background: tuple[int, int, int], transforms: list[str]
) -> Image.Image:
    """The opaque picture in mode RGB or L, which can be resized; its colours are not yet `to_srgb`.

    Args:
        image: decoded, as Pillow has it.
        channels: 3 or 1.
        background: sRGB, laid under transparency.
        transforms: what is done is appended.

    Raises:
        UnknownWhiteError: floating point, or integers of more than 16 bits.
    """
    colour, alpha = _without_alpha(_eight_bits(image, transforms))
    wanted = "L" if channels == 1 else "RGB"
    if colour.mode not in (wanted, "1", "L"):
        transforms.append(f"{image.mode}_to_{wanted}")
    if colour.mode in ("CMYK", "LAB"):
        colour = _managed(_inked(colour), transforms).convert("RGB")
    if alpha is not None:
        # Now, as the background is sRGB and hidden colours must not bleed into the visible ones.
        transforms.append("composited")
        under = Image.new("RGB", colour.size, background)
        under.paste(_managed(colour, transforms).convert("RGB"), mask=alpha)
        colour = under
    grey = colour.mode in ("1", "L") or (channels == 1 and "icc_profile" not in colour.info)
    return _in_mode("L" if grey else "RGB", colour)


def to_srgb(image: Image.Image, channels: int, transforms: list[str]) -> Image.Image:
    """What `flattened` gave, resized meanwhile, in sRGB or grey: where it is small this costs nothing."""
    return _in_mode("L" if channels == 1 else "RGB", _managed(image, transforms))


def _in_mode(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image, transforms: list[str]) -> Image.Image:
    """16-bit grey, scaled; Pillow's own conversion clips it to white. It gives colour in 8 bits a channel already."""
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
    """Colours and opacity; the latter is None if all of it is opaque."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16-bit colour, which Pillow has cut to its upper byte
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if not image.has_transparency_data:
        return (image.convert("RGB") if image.mode == "P" else image), None
    if image.mode != "LA":
        image = image.convert("RGBA")
    alpha = image.getchannel("A")
    colour = image.convert(image.mode[:-1])
    return colour, None if alpha.getextrema() == (255, 255) else alpha


def _inked(image: Image.Image) -> Image.Image:
    """Pillow takes every CMYK JPEG for one of Adobe's, which are stored inverted."""
    if image.mode == "CMYK" and getattr(image, "format", None) == "JPEG" and "adobe" not in image.info:
        return ImageChops.invert(image)
    return image


def _managed(image: Image.Image, transforms: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile")
    transform = _srgb_transform(profile, image.mode) if profile else None
    if transform is None:
        return image
    transforms.append("icc_to_srgb")
    return transform.apply(image)  # which says in its info that it is sRGB now


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None: the profile is damaged, made for another mode, or is sRGB itself to within one level."""
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
        moved = np.asarray(ImageChops.difference(transform.apply(probe), probe.convert("RGB")))
        if moved.max() <= 1:
            return None
    return transform
