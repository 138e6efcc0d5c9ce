"""Images for a page: small files as data URLs, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_MOST_PX = 1000
"""Longest side; larger images are reduced."""
_MOST_BYTES = 64 << 10
"""A PNG of more bytes becomes a WebP, with losses."""
_QUALITY = 85


def data_url(image: NDArray[np.uint8]) -> str:
    """An image, uint8 (H, W, C) with C 1 or 3, as a PNG if that is small, else as a WebP with losses."""
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    picture.thumbnail((_MOST_PX, _MOST_PX))
    data, kind = _encoded(picture, "PNG", optimize=True), "png"
    if len(data) > _MOST_BYTES:
        data, kind = _encoded(picture.convert("RGB"), "WEBP", quality=_QUALITY), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    if most == 1:
        return [steps[-1]]
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _encoded(picture: Image.Image, format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()
