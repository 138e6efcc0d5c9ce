"""The grid of images: each in its place, unchanged, on white."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.images.contact_sheet import grid


@pytest.mark.parametrize(
    ("count", "rows", "columns"),
    [(1, 1, 1), (2, 1, 2), (3, 2, 2), (4, 2, 2), (5, 2, 3), (7, 3, 3), (10, 3, 4), (64, 8, 8), (100, 10, 10)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stand_row_by_row_with_gaps_around(count: int, rows: int, columns: int, channels: int) -> None:
    height, width, gap = 5, 7, 2
    images = np.random.default_rng(count).integers(0, 255, (count, height, width, channels), np.uint8)  # none is white
    sheet = grid(images)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    cells = sheet[gap:, gap:].reshape(rows, height + gap, columns, width + gap, channels).swapaxes(1, 2)
    cells = cells.reshape(rows * columns, height + gap, width + gap, channels)
    assert np.array_equal(cells[:count, :height, :width], images)
    assert (sheet != 255).sum() == (images != 255).sum()  # all else is white


def test_the_gap_may_be_none() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(4, 2, 3, 1)
    one, two, three, four = images[..., 0]
    assert np.array_equal(grid(images, gap_px=0)[..., 0], np.block([[one, two], [three, four]]))
