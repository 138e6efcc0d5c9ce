"""Frames → a video file, through PyAV (extra `video`)."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

FRAMES_PER_S = 24
HOLD_S = 2
"""How long the last frame stays."""
MIN_SIDE_PX = 256
"""Smaller frames are enlarged by whole factors, so that players do not blur them."""


def encode(frames: Iterable[NDArray[np.uint8]], kind: str) -> bytes:
    """A video of equally large frames.

    Args:
        frames: uint8, (H, W, 1 or 3).
        kind: mp4 (H.264) or webm (VP9).

    Raises:
        ConfigError: PyAV is not installed, or the kind is neither.
    """
    codec = {"mp4": "libx264", "webm": "libvpx-vp9"}.get(kind)
    if codec is None:
        raise ConfigError(f"--video: .{kind} is not a video this writes: name a .mp4 or .webm file")
    try:
        import av
    except ImportError:
        raise ConfigError("--video needs PyAV: pip install 'ddpm-pipeline[video]'") from None
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=FRAMES_PER_S)
        stream.pix_fmt = "yuv420p"
        picture = None
        for frame in frames:
            if picture is None:
                stream.height, stream.width = _for_players(frame).shape[:2]
            picture = av.VideoFrame.from_ndarray(_for_players(frame), format="rgb24")
            container.mux(stream.encode(picture))
        for _ in range(FRAMES_PER_S * HOLD_S):
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def _for_players(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB, large enough to see, with the even sides that yuv420p needs."""
    rgb = np.repeat(frame, 3, axis=2) if frame.shape[2] == 1 else frame
    factor = -(-MIN_SIDE_PX // min(rgb.shape[:2]))
    rgb = rgb.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.ascontiguousarray(np.pad(rgb, ((0, rgb.shape[0] % 2), (0, rgb.shape[1] % 2), (0, 0)), mode="edge"))
