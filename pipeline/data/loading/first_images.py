"""The first images of a set, which may be unfinished, or hold samples as PNGs or arrays."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import preprocess
from pipeline.data.loading.batches import read_range
from pipeline.data.shards.set_status import tars_of
from pipeline.errors import DataError
from pipeline.storage import files

_SAMPLE = re.compile(r"\d+\.png")


def first_images(url: str, count: int) -> NDArray[np.uint8]:
    """Read the first images of a set.

    Args:
        url: the set.
        count: at most so many.

    Returns:
        uint8, (N, H, W, C).

    Raises:
        DataError: an image is damaged, or there is none.
    """
    if shards := tars_of(url):
        return read_range(shards, range(min(count, shards.samples))).images.permute(0, 2, 3, 1).numpy()
    try:
        images = list(islice(_samples(url), count))
    except (preprocess.Rejected, ValueError, KeyError) as error:
        raise DataError(f"{url}: damaged ({error!r}): `ddpm verify {url}` tells more") from error
    if not images:
        raise DataError(f"{url}: has no image yet: run the command that makes it again")
    return np.stack(images)


def _samples(url: str) -> Iterator[NDArray[np.uint8]]:
    for name in files.listdir(url):
        if name.endswith(".npz"):
            with np.load(io.BytesIO(files.read_bytes(files.join(url, name))), allow_pickle=False) as arrays:
                yield from arrays["images"]
        elif _SAMPLE.fullmatch(name):
            yield preprocess.decode(files.read_bytes(files.join(url, name)), 3)
