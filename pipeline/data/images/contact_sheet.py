"""Many images → one image that shows them in a grid."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def grid(images: NDArray[np.uint8], gap_px: int = 2, *, columns: int | None = None) -> NDArray[np.uint8]:
    """Arrange images in a grid on white.

    Args:
        images: (N, H, W, C).
        gap_px: pixels between images and around the grid.
        columns: images in a row. Default: as many as make the grid nearly square.

    Returns:
        (rows·(H+gap)+gap, columns·(W+gap)+gap, C), row by row from the top left.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap_px) + gap_px, columns * (width + gap_px) + gap_px, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap_px + (i // columns) * (height + gap_px), gap_px + (i % columns) * (width + gap_px)
        sheet[top : top + height, left : left + width] = image
    return sheet
