"""What `ddpm plan` says of a configuration is what a run then does."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import configfile
from pipeline.config import Config
from pipeline.data.order import check_world
from pipeline.plan import SAMPLES, plan
from tests.launch import TINY, ddpm

ROOT = Path(__file__).parents[1]


def _plan(*settings: str, samples: int | None = None) -> dict[str, Any]:
    return plan(configfile.load(TINY[1], settings, lambda name: Path(name).read_text()), samples)


def test_a_checkpoint_is_as_large_as_planned(tiny_run: Path) -> None:
    figures = _plan()
    (newest, *_) = sorted((tiny_run / "checkpoints").iterdir(), reverse=True)
    tensors = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    everything = sum(file.stat().st_size for file in newest.iterdir())
    assert figures["checkpoint_bytes"] == tensors
    assert figures["checkpoint_bytes"] == pytest.approx(everything, rel=0.01)


def test_the_parameters_are_those_of_the_paper() -> None:
    assert plan(Config())["parameters"] == 35_746_307  # 35.7 M, Ho et al. 2020, appendix B


def test_no_memory_is_taken() -> None:
    """A checkpoint of this network is 1.8 GB."""
    config = configfile.load(str(ROOT / "configs/256px.yaml"), (), lambda name: Path(name).read_text())
    plan(Config())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert plan(config)["checkpoint_bytes"] > 1.7e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_world_sizes_are_those_that_training_accepts() -> None:
    figures = _plan("train.global_batch=48", "train.micro_batch=4", "data.lanes=24")
    assert (figures["lanes"], figures["world_sizes"]) == (24, [1, 2, 3, 4, 6, 12])  # of 8 and 24 the shares are not 4·n
    for ranks in figures["world_sizes"]:
        check_world(24, ranks)
        assert 48 // ranks % 4 == 0
    assert _plan("train.global_batch=48")["lanes"] == 48  # the default: the largest divisor up to 64


def test_samples_take_no_more_than_planned(tiny_run: Path, tmp_path: Path) -> None:
    count = 40
    ddpm("sample", tiny_run, "--seeds", f"0-{count - 1}", "--out", tmp_path / "samples").check_returncode()
    tars = [tar.stat().st_size for tar in (tmp_path / "samples").glob("*.tar")]
    end_of_tar = 10240
    assert 0 < sum(tars) <= _plan()["samples_bytes_at_most"] * count / SAMPLES + end_of_tar * len(tars)


def test_noise_takes_no_more_than_planned() -> None:
    """The worst that PNG can meet."""
    for size, channels in ((8, 1), (64, 3), (256, 3)):
        picture = np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture.squeeze()).save(buffer, "PNG")
        blocks = 512 * (3 + -(-len(buffer.getvalue()) // 512))
        config = Config.model_validate(
            {"data": {"size": size, "channels": channels}, "model": {"channel_mults": [1, 2]}}
        )
        bound = plan(config)["samples_bytes_at_most"] / SAMPLES
        assert blocks <= bound <= 1.2 * blocks


def test_epochs_are_told_in_steps() -> None:
    settings = ("train.steps=50ep", "run.keep_every=10ep")
    assert "lengths" not in _plan(*settings)
    lengths = _plan(*settings, samples=1797)["lengths"]
    assert (lengths["train.steps"], lengths["run.keep_every"]) == (7488, 1498)  # 50·1797/12 and 10·1797/12, rounded up
    assert lengths["run.checkpoint_every"] == 2


def test_the_command_gives_a_table_or_json() -> None:
    figures = _plan("train.lr=1e-3", samples=1797)
    text = ddpm("plan", *TINY, "train.lr=1e-3", "--samples", 1797).stdout
    assert f"{figures['parameters']:,}" in text and ", ".join(map(str, figures["world_sizes"])) in text
    assert json.loads(ddpm("plan", *TINY, "--samples", 1797, "--json").stdout) == figures


def test_a_wrong_configuration_is_one_line() -> None:
    done = ddpm("plan", *TINY, "train.global_batch=12", "data.lanes=5")
    assert done.returncode == 2 and done.stdout == "" and "data.lanes" in done.stderr and "Traceback" not in done.stderr
