"""Frames → a video file, through PyAV (extra `video`)."""

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
"""How long the last frame stays."""
MIN_SIDE_PX = 256
"""Smaller frames are enlarged by whole factors, so that players do not blur them."""


def check(name: str) -> None:
    """Refuse what `encode` cannot write, before there is a frame.

    Raises:
        ConfigError: PyAV is not installed, or the name has another ending than .mp4 or .webm.
    """
    if kind(name) not in _CODECS:
        raise ConfigError(f"--video {name}: not a kind of video that this writes: name a .mp4 or .webm file")
    if not importlib.util.find_spec("av"):
        raise ConfigError("--video needs PyAV: pip install 'ddpm-pipeline[video]'")


def kind(name: str) -> str:
    """The ending of a file's name."""
    return name.rpartition(".")[2].lower()


def encode(frames: Iterable[NDArray[np.uint8]], kind: str) -> bytes:
    """A video of equally large frames.

    Args:
        frames: uint8, (H, W, 1 or 3).
        kind: mp4 (H.264) or webm (VP9).
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(_CODECS[kind], rate=FRAMES_PER_S)
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
