"""From the run, the set begun and the flags to the options of a drawing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import Config, SamplingOptions
from pipeline.diffusion.schedule import make_schedule
from pipeline.diffusion.spacing import resolve
from pipeline.errors import ConfigError
from pipeline.sampling import generator as generators
from pipeline.sampling.options import merge
from tests.launch import TINY, ddpm

OWN = {"sampler": "ddim", "steps": 40, "spacing": "uniform", "eta": 0.5, "guidance": 2.0}


def options(flags: dict[str, Any], begun: dict[str, Any] | None = None, **own: Any) -> tuple[Any, ...]:
    """Sampler, steps, spacing and η that come out for a run with these options."""
    config = Config(sample=SamplingOptions(**(OWN | own)))
    got = resolve(merge(config, flags, begun or {}, quiet=True), make_schedule("linear", 1000))
    assert got.guidance == 2.0  # what is no sampler's own stays
    return got.sampler, got.steps, got.spacing, got.eta


def test_without_flags_the_run_decides_and_a_stored_spacing_holds() -> None:
    assert options({}) == ("ddim", 40, "uniform", 0.5)
    assert options({}, spacing="auto") == ("ddim", 40, "quadratic", 0.5)


def test_a_sampler_given_by_name_brings_its_own_steps_and_spacing() -> None:
    assert options({"sampler": "dpmpp"}) == ("dpmpp", 25, "quadratic", 0.0)
    assert options({"sampler": "heun", "steps": 9}) == ("heun", 9, "logsnr", 0.0)
    assert options({"sampler": "ddpm"}) == ("ddpm", 1000, "uniform", 0.0)


def test_steps_alone_take_the_best_sampler_unless_another_flag_is_for_the_runs_own() -> None:
    assert options({"steps": 10}) == ("dpmpp3m", 10, "logsnr", 0.0)
    assert options({"steps": 20}) == ("dpmpp", 20, "quadratic", 0.0)
    assert options({"steps": 20, "spacing": "karras"}) == ("dpmpp", 20, "karras", 0.0)
    assert options({"steps": 20, "eta": 1.0}) == ("ddim", 20, "uniform", 1.0)
    assert options({"steps": 1000}) == ("ddim", 1000, "uniform", 0.5)


def test_a_begun_set_is_continued_with_its_own_options() -> None:
    begun = {"sampler": "dpmpp", "steps": 20, "spacing": "uniform", "eta": 0.0}
    for flags in ({}, {"steps": 20}, {"sampler": "dpmpp", "steps": 20}):
        assert options(flags, begun) == ("dpmpp", 20, "uniform", 0.0)
    assert merge(Config(), {"steps": 20}, begun, quiet=True).max_step_ratio is None  # as version 0.1 drew
    listed = begun | {"spacing": "logsnr", "timesteps": [900, 500, 0], "steps": 3}
    assert merge(Config(), {}, listed, quiet=True).timesteps == (900, 500, 0)  # whatever the spacing gives today
    assert merge(Config(), {"spacing": "karras"}, listed, quiet=True).timesteps is None  # and refused by the set


def run_of(tmp_path: Path, tiny_run: Path, **sample: Any) -> Path:
    """A run whose stored `sample:` section says this."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (newest,) = (run / "checkpoints").glob("*6")
    state = json.loads((newest / "state.json").read_text())
    config = yaml.safe_load(state["config"])
    config["sample"] |= sample
    data = json.dumps(state | {"config": yaml.safe_dump(config)}).encode()
    (newest / "state.json").write_bytes(data)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_a_list_of_timesteps_is_recorded_and_flags_replace_it(tmp_path: Path, tiny_run: Path) -> None:
    run = run_of(tmp_path, tiny_run, sampler="ddim", steps=None, spacing="auto", timesteps=[90, 50, 10, 0])
    for seeds in ("0-3", "0-9"):
        assert ddpm("sample", run, "--seeds", seeds, "--out", tmp_path / "grown").returncode == 0
    assert ddpm("sample", run, "--seeds", "0-9", "--out", tmp_path / "at_once").returncode == 0
    for name in ("shard_000000.tar", "shard_000001.tar"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()
    assert '"timesteps": [\n   90,\n   50,\n   10,\n   0\n  ]' in (tmp_path / "grown/shard_000000.json").read_text()
    other = ddpm("sample", run, "--seeds", "0-9", "--out", tmp_path / "grown", "--spacing", "karras")
    assert other.returncode == 2
    assert "(spacing: auto there, karras now; timesteps: [90, 50, 10, 0] there" in other.stderr


def test_a_guide_is_an_earlier_checkpoint_of_the_same_run(tiny_run: Path, digits: Path, tmp_path: Path) -> None:
    early, cpu = str(next((tiny_run / "checkpoints").glob("*4"))), torch.device("cpu")
    run, drawing = str(tiny_run), {"batch": 4, "steps": 5, "sampler": "ddim"}

    def images(guide: str | None, guidance: float) -> Any:
        generator = generators.load(run, cpu, guide=guide)
        assert (generator.guide_sha256 is None, generator.sha256) == (guide is None, generators.load(run, cpu).sha256)
        drawn = generator.images(range(4), SamplingOptions(**drawing, guidance=guidance))  # type: ignore[arg-type]
        return torch.stack([torch.from_numpy(image).int() for _, image in drawn])

    plain, guided = images(None, 1.0), images(early, 3.0)
    assert (plain != guided).any()
    with pytest.raises(ConfigError, match="is the model itself and would change nothing"):
        images(run, 3.0)
    wider = tmp_path / "wider"
    made = ddpm("train", *TINY, f"data.shards={digits}", f"run.dir={wider}", "train.steps=2", "model.base_channels=16")
    assert made.returncode == 0
    with pytest.raises(ConfigError, match=r"is another network or diffusion \(model\.base_channels: 16 there, 8 here"):
        images(str(wider), 3.0)
    for flags, line in (
        (("--guide", early), "--guide changes nothing without a strength: give --guidance W"),
        (("--guidance-interval", "5-10"), "--guidance-interval changes nothing without guidance"),
        (("--guidance", "2", "--guidance-interval", "5-100"), "this model has the timesteps 0 to 99"),
        (("--eta", "0.5", "--sampler", "heun"), "--eta is for ddim, and the sampler is heun"),
    ):
        refused = ddpm("sample", run, "--seeds", "0-3", "--out", tmp_path / "o", *flags)
        assert refused.returncode == 2 and line in refused.stderr, refused.stderr
        assert not (tmp_path / "o").exists()
