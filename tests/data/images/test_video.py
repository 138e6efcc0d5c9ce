"""Videos, checked by decoding them."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.images import video
from pipeline.errors import ConfigError

av = pytest.importorskip("av", reason="needs the extra `video`")


def play(data: bytes) -> tuple[list[NDArray[np.uint8]], float]:
    """Frames as RGB, and the length in seconds."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return frames, float(len(frames) / container.streams.video[0].average_rate)


def blocks(step: int, height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    """An image whose four quarters have levels that follow from the step."""
    image = np.zeros((height, width, channels), np.uint8)
    image[: height // 2] = 40 + 20 * step
    image[:, : width // 2] += 60
    return image


@pytest.mark.parametrize("kind", ["mp4", "webm"])
@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (10, 26, 3), (256, 300, 3), (257, 259, 3)])
def test_every_frame_comes_back_and_the_last_one_stays(kind: str, height: int, width: int, channels: int) -> None:
    frames = [blocks(step, height, width, channels) for step in range(5)]
    played, seconds = play(video.encode(iter(frames), kind))
    assert len(played) == 5 + video.FRAMES_PER_S * video.HOLD_S
    assert seconds == pytest.approx(5 / 24 + 2)
    factor = played[0].shape[0] // height
    assert min(played[0].shape[:2]) >= min(video.MIN_SIDE_PX, factor * min(height, width))
    for image, frame in zip(played, [*frames, *[frames[-1]] * 48]):
        expected = np.broadcast_to(frame, (height, width, 3)).repeat(factor, 0).repeat(factor, 1).astype(float)
        shown = image[: height * factor, : width * factor].astype(float)
        assert np.abs(shown - expected).mean() < 4  # lossy, but the image and not another


def test_small_images_are_enlarged_by_whole_factors_to_even_sides() -> None:
    for height, width in ((9, 9), (255, 300), (300, 301)):
        (image, *_), _ = play(video.encode([blocks(1, height, width)], "mp4"))
        factor = -(-256 // min(height, width))
        assert image.shape == (height * factor + height * factor % 2, width * factor + width * factor % 2, 3)


def test_frames_are_taken_one_at_a_time() -> None:
    """A thousand steps of a hundred images need not be in memory together."""
    alive = 0

    def frames():
        nonlocal alive
        for step in range(4):
            alive += 1
            assert alive == step + 1
            yield blocks(step, 8, 8)

    assert len(play(video.encode(frames(), "mp4"))[0]) == 52


@pytest.mark.parametrize("name", ["v.gif", "v", "", "mp4/v", "s3://bucket/v.mpeg"])
def test_another_kind_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not a kind of video that this writes: name a \.mp4 or \.webm file"):
        video.check(name)


@pytest.mark.parametrize("name", ["v.mp4", "v.MP4", "s3://bucket/v.webm"])
def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    video.check(name)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"^--video needs PyAV: pip install 'ddpm-pipeline\[video\]'$"):
        video.check(name)
