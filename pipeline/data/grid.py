"""Many pictures → one sheet."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def grid(pictures: NDArray[np.uint8], gap_px: int = 2) -> NDArray[np.uint8]:
    """Pictures side by side, as square a sheet as their number allows, on white.

    Args:
        pictures: (N, H, W, C).
        gap_px: pixels between two pictures and around them.

    Returns:
        (rows·(H+gap)+gap, columns·(W+gap)+gap, C), row by row from the top left.
    """
    count, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap_px) + gap_px, columns * (width + gap_px) + gap_px, channels), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap_px + (i // columns) * (height + gap_px), gap_px + (i % columns) * (width + gap_px)
        sheet[top : top + height, left : left + width] = picture
    return sheet
