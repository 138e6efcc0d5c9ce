"""Frames → a video file, by PyAV (extra `video`)."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

_CODECS = {"mp4": "libx264", "webm": "libvpx-vp9"}
FRAMES_PER_S = 24
HOLD_S = 2
"""Duration of the last frame."""
MIN_SIDE_PX = 256
"""Smaller frames are enlarged by an integer factor, so that players do not blur them."""


def check(name: str) -> None:
    """Check that `encode` can write this file.

    Raises:
        ConfigError: PyAV is not installed, or the file name does not end with .mp4 or .webm.
    """
    if kind(name) not in _CODECS:
        raise ConfigError(f"--video {name}: not a kind of video that this writes: name a .mp4 or .webm file")
    if not importlib.util.find_spec("av"):
        raise ConfigError("--video needs PyAV: pip install 'ddpm-pipeline[video]'")


def kind(name: str) -> str:
    """The extension of a file name, in lower case."""
    return name.rpartition(".")[2].lower()


def encode(frames: Iterable[NDArray[np.uint8]], kind: str) -> bytes:
    """Encode frames of one size as a video.

    Args:
        frames: uint8, (H, W, 1 or 3).
        kind: mp4 (H.264) or webm (VP9).
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(_CODECS[kind], rate=FRAMES_PER_S)
        stream.pix_fmt = "yuv420p"
        image = None
        for frame in frames:
            if image is None:
                stream.height, stream.width = _fit_player(frame).shape[:2]
            image = av.VideoFrame.from_ndarray(_fit_player(frame), format="rgb24")
            container.mux(stream.encode(image))
        for _ in range(FRAMES_PER_S * HOLD_S):
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return buffer.getvalue()


def _fit_player(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert to RGB, enlarge small frames, and pad to even sides, which yuv420p needs."""
    rgb = np.repeat(frame, 3, axis=2) if frame.shape[2] == 1 else frame
    factor = -(-MIN_SIDE_PX // min(rgb.shape[:2]))
    rgb = rgb.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.ascontiguousarray(np.pad(rgb, ((0, rgb.shape[0] % 2), (0, rgb.shape[1] % 2), (0, 0)), mode="edge"))
