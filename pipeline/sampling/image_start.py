"""An image to start from instead of noise alone: SDEdit (Meng et al. 2021, arXiv:2108.01073)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.images import preprocess
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.samplers import from_uint8
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files


@dataclass(frozen=True, eq=False)
class ImageStart:
    """An image with as much noise as it has at one timestep of the schedule, from which denoising starts."""

    pixels: NDArray[np.uint8]
    """(H, W, C), as the network draws them."""
    strength: float
    """Share of the schedule that the image is sent through, in (0, 1]."""

    @property
    def sha256(self) -> str:
        """Identifies the pixels; recorded in sample sets."""
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()

    def timesteps(self, visited: Sequence[int], total: int) -> tuple[int, ...]:
        """The timesteps of the shorter denoising, descending: the first has the noise of `strength`.

        Args:
            visited: by a denoising from noise alone, descending.
            total: of the schedule.
        """
        first = min(max(round(self.strength * total) - 1, 0), visited[0])
        return (first, *(t for t in visited if t < first))

    def noised(self, noise: Tensor, t: int, process: DiffusionProcess) -> Tensor:
        """Draws of q(x_t | image), one for each noise, (B, C, H, W)."""
        image = from_uint8(torch.from_numpy(self.pixels.copy())).permute(2, 0, 1).to(noise.device)
        return process.add_noise(image.expand_as(noise), noise, torch.full((len(noise),), t, device=noise.device))


def check_strength(strength: float) -> None:
    """Check that a strength is in (0, 1].

    Raises:
        ConfigError: it is not.
    """
    if not 0 < strength <= 1:
        raise ConfigError(
            f"--strength {strength:g}: give a number above 0 (the image itself) and up to 1 (a new image)"
        )


def read(path: str, strength: float, height_width: tuple[int, int], channels: int) -> ImageStart:
    """Read an image file and prepare it as `ddpm shard` does: upright, opaque, its middle, resized.

    Args:
        path: file or URL.
        strength: in (0, 1].
        height_width: of the images to draw, in pixels.
        channels: 3 or 1.

    Raises:
        ConfigError: there is no such file, or the strength is out of range.
        DataError: it is not an image, or cannot be read.
    """
    check_strength(strength)
    try:
        data = files.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"--from {path}: no such file: name an image") from None
    try:
        image = preprocess.preprocess_image(data, size=height_width, channels=channels)
    except preprocess.Rejected as error:
        reason = preprocess.REASONS[error.reason] + (f" ({error.detail})" if error.detail else "")
        raise DataError(f"--from {path}: {reason}: give another image") from None
    return ImageStart(image.array, strength)
