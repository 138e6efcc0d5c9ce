"""Starting from an image: the noise that its strength says, and the steps that are left."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import keyed_random
from pipeline.config import SamplingOptions
from pipeline.diffusion import samplers
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import ConfigError, DataError
from pipeline.keyed_random import Use
from pipeline.sampling.image_start import ImageStart, check_strength, read

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (1.0, (999, 600, 300, 0)),
        (0.5, (499, 300, 0)),
        (0.301, (300, 0)),  # its own timestep is one that is visited
        (0.3, (299, 0)),
        (0.0001, (0,)),
    ],
)
def test_the_first_timestep_is_that_of_the_strength(strength: float, expected: tuple[int, ...]) -> None:
    assert ImageStart(PIXELS, strength).timesteps((999, 600, 300, 0), 1000) == expected
    assert ImageStart(PIXELS, 1.0).timesteps((700, 0), 1000) == (700, 0)  # where a spacing starts below the last one


@pytest.mark.parametrize("strength", [0.2, 0.6])
def test_the_edit_of_gaussian_data_is_the_closed_form(strength: float) -> None:
    """Data N(0, s²): the network is known, and DDIM solves an equation that scales x_t by s/√(ᾱ s² + 1 - ᾱ)."""
    process, s, ids = DiffusionProcess(Schedule.linear(1000), clip=False), 0.5, torch.arange(256)
    start = ImageStart(PIXELS, strength)
    bars = process.schedule.alphas_cumprod

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar = bars[t].reshape(-1, 1, 1, 1)
        return ((1 - bar).sqrt() / (bar * s**2 + 1 - bar) * x).to(x.dtype)

    noise = keyed_random.normals(0, ids, Use.SAMPLE_START, (1, 8, 8))
    visited = start.timesteps(range(999, -1, -1), 1000)
    options = SamplingOptions(sampler="ddim", timesteps=visited)
    *_, last = samplers.sample(denoise, start.noised(noise, visited[0], process), process, options, lambda t: noise)
    bar = bars[round(strength * 1000) - 1].item()
    scale = s / math.sqrt(bar * s**2 + 1 - bar)
    image = torch.from_numpy(PIXELS).permute(2, 0, 1) / 127.5 - 1
    expected = scale * (math.sqrt(bar) * image + math.sqrt(1 - bar) * noise)
    torch.testing.assert_close(last.x, expected, rtol=0, atol=0.01)
    kept = (last.x.mean(0) * image).sum() / (image * image).sum()
    assert kept.item() == pytest.approx(scale * math.sqrt(bar), abs=0.02)  # the share of the image that is left


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError, match=r"--strength .*: give a number above 0"):
        check_strength(strength)


def test_an_image_is_prepared_as_for_a_shard_set(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((40, 60, 3), (200, 100, 0), np.uint8)).save(path)
    colour, grey = (read(str(path), 0.5, (8, 16), channels) for channels in (3, 1))
    assert (colour.pixels.shape, grey.pixels.shape) == ((8, 16, 3), (8, 16, 1))
    assert (colour.pixels == (200, 100, 0)).all()
    buffer = io.BytesIO()
    Image.open(path).save(buffer, "BMP")
    (tmp_path / "photo.bmp").write_bytes(buffer.getvalue())
    assert read(str(tmp_path / "photo.bmp"), 0.5, (8, 16), 3).sha256 == colour.sha256 != grey.sha256


def test_what_is_no_image_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--from .*nowhere\.png: no such file: name an image"):
        read(str(tmp_path / "nowhere.png"), 0.5, (8, 8), 3)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(
        DataError, match=r"--from .*text\.png: no image in one of the formats read.*: give another image"
    ):
        read(str(tmp_path / "text.png"), 0.5, (8, 8), 3)
    with pytest.raises(DataError):
        read(str(tmp_path), 0.5, (8, 8), 3)
