"""A run that `ddpm export` writes is, for diffusers, the same model: it draws the same images from the same noise."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from pipeline.config import SamplingOptions
from pipeline.errors import ConfigError, NoCheckpoint
from pipeline.export import export
from pipeline.import_model import ImportSettings, import_model
from pipeline.sampling import generator, pretrained
from tests.launch import ddpm
from tests.model.test_interchange import randomised

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1,
    "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


@torch.no_grad()
def assert_same_images(source: Path, exported: Path, label: int | None = None) -> None:
    """Over all steps, with the noise of two seeds."""
    ours, theirs = generator.load(str(source), CPU), DDPMPipeline.from_pretrained(exported)
    data, total = ours.config.data, ours.config.diffusion.timesteps
    options = ours.config.sample.model_copy(
        update={"sampler": "ddpm", "steps": total, "batch": 2, "label": label, "precision": "fp32"}
    )
    shape, seeds = (data.channels, *data.height_width), torch.arange(2)
    x = generator.keyed_random.normals(0, seeds, generator.Use.SAMPLE_START, shape)
    labels = {} if label is None else {"class_labels": torch.full((2,), label)}
    theirs.scheduler.set_timesteps(total)
    worst = 0.0
    with pytest.MonkeyPatch.context() as patch:
        states = ours._trajectory(range(2), options, lambda: None)
        assert torch.equal(next(states), x)
        for t, state in zip(reversed(range(total)), states, strict=True):
            noise = generator.keyed_random.normals(0, seeds, generator.Use.SAMPLE_STEP, shape, step=t)
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
            x = theirs.scheduler.step(theirs.unet(x, t, **labels).sample, t, x).prev_sample
            size = max(1.0, float(x.abs().max()))  # what is not clipped grows beyond all images
            worst = max(worst, float((state - x).abs().max()) / size)
    print(f"\n{total} steps: {worst:.1e} apart at most")
    assert worst < 1e-4


def test_a_run_draws_the_same_images_there(tiny_run: Path, tmp_path: Path) -> None:
    told = ddpm("export", tiny_run, "--out", tmp_path / "there", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == {
        "out": str(tmp_path / "there"), "parameters": sum(p.numel() for p in load_file(
            max((tiny_run / "checkpoints").glob("*/model.safetensors"))).values()),
        "weights": "ema", "samples": False, "figures": False,
    }  # fmt: skip
    assert_same_images(tiny_run, tmp_path / "there", label=3)
    assert {path.name for path in tmp_path.iterdir()} == {"there"}
    back = pretrained.read(str(tmp_path / "there"), ema=True)
    assert back.class_names == tuple("0123456789") and back.config.model.label_dropout == 0.1
    export(str(tiny_run), str(tmp_path / "last"), ema=False)
    files = [tmp_path / name / "unet/diffusion_pytorch_model.safetensors" for name in ("there", "last")]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize(
    ("unet", "scheduler"),
    [
        ({}, {"num_train_timesteps": 25, "clip_sample": False, "beta_start": 0.1 / 25, "beta_end": 20 / 25}),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8, "out_channels": 6},
         {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}),
        ({"attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False,
          "freq_shift": 1},
         {"num_train_timesteps": 20, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
    ],
)  # fmt: skip
def test_what_diffusers_wrote_comes_back_to_it_unchanged(
    unet: dict[str, Any], scheduler: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = randomised(UNet2DModel(**SMALL | unet))
    DDPMPipeline(network, DDPMScheduler(**scheduler)).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "run"), ImportSettings())
    export(str(tmp_path / "run"), str(tmp_path / "back"))
    assert_same_images(tmp_path / "run", tmp_path / "back")
    files = [tmp_path / name / "unet/diffusion_pytorch_model.safetensors" for name in ("theirs", "back")]
    theirs, back = map(load_file, files)
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[name], back[name]) for name in theirs)
    configs = [
        json.loads((tmp_path / name / "scheduler/scheduler_config.json").read_text()) for name in ("theirs", "back")
    ]
    assert [config[key] for config in configs[1:] for key in scheduler] == [configs[0][key] for key in scheduler]


def test_a_shifted_schedule_is_listed_and_comes_back(tmp_path: Path) -> None:
    """`trained_betas`, as diffusers has no name for such a schedule."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(randomised(UNet2DModel(**SMALL)), scheduler).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "run"), ImportSettings())
    state = next((tmp_path / "run/checkpoints").glob("*/state.json"))
    stored = json.loads(state.read_text())
    stored["config"] = stored["config"].replace("log_snr_shift: 0.0", "log_snr_shift: -1.39")
    stored["config"] = stored["config"].replace("log_snr_min: null", "log_snr_min: -9.0")
    _replace(state, json.dumps(stored))
    export(str(tmp_path / "run"), str(tmp_path / "back"))
    assert_same_images(tmp_path / "run", tmp_path / "back")
    diffusion = pretrained.read(str(tmp_path / "back"), ema=True).config.diffusion
    assert (diffusion.log_snr_shift, diffusion.log_snr_min) == (-1.39, -9.0)
    file = tmp_path / "back/scheduler/scheduler_config.json"
    other = json.loads(file.read_text())
    file.write_text(json.dumps(other | {"trained_betas": [0.1, *other["trained_betas"][1:]]}))
    with pytest.raises(ConfigError, match=r"trained_betas in scheduler_config\.json do not agree"):
        pretrained.read(str(tmp_path / "back"), ema=True)


def _replace(file: Path, text: str) -> None:
    """Change a file of a checkpoint, and its manifest with it."""
    file.write_text(text)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


def test_the_card_has_a_head_data_figures_and_samples(tiny_run: Path, tmp_path: Path) -> None:
    run, samples = tmp_path / "run", tmp_path / "samples"
    shutil.copytree(tiny_run, run)
    (run / "previews").mkdir()
    for step, color in ((4, 10), (6, 200)):
        Image.new("L", (8, 8), color).save(run / f"previews/step_{step:08d}.png")
    samples.mkdir()
    figures = {"frechet_distance": {"value": 3.25, "low": 3.0, "high": 3.5}, "precision": {"value": 0.5}, "x|y": 3}
    evaluation = {"n": 50_000, "features_sha256": "abc", "reference_sha256": "def", "figures": figures}
    (samples / "evaluation.json").write_text(json.dumps(evaluation))
    result = export(str(run), str(tmp_path / "out"), samples=str(samples))
    assert result["samples"] and result["figures"]
    card = (tmp_path / "out/README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "diffusers" and "license" not in yaml.safe_load(head)
    assert {"unconditional-image-generation", "ddpm"} <= set(yaml.safe_load(head)["tags"])
    expected = (
        "| frechet distance | 3.25 | 3 to 3.5 |", "| precision | 0.5 |  |", "of 50,000 samples", "1,797", "step 6",
        "(samples.png)", "| model.base\\_channels | 8 |", "class_labels=labels", "0, 1, 2, 3",
    )  # fmt: skip
    assert [part for part in expected if part not in text] == []
    assert str(tiny_run.parent) not in card  # no path of the machine that trained
    assert (tmp_path / "out/samples.png").read_bytes() == (run / "previews/step_00000006.png").read_bytes()
    code = text.split("```python\n")[1].split("```")[0].replace('"DIR"', repr(str(tmp_path / "out")))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["x"].shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        ("not empty", ConfigError, "exists and is not empty: give a new directory"),
        ("a file", ConfigError, "exists and is not empty: give a new directory"),
        ("no run", ConfigError, "no such run or checkpoint"),
        ("no checkpoint", NoCheckpoint, "no checkpoint yet"),
        ("no figures", ConfigError, "has no evaluation.json: make it with `ddpm evaluate"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    tiny_run: Path, tmp_path: Path, damage: str, kind: type[Exception], message: str
) -> None:
    out, source, samples = tmp_path / "out", tiny_run, None
    if damage == "not empty":
        out.mkdir()
        (out / "x").write_text("")
    elif damage == "a file":
        out.write_text("")
    elif damage == "no run":
        source = tmp_path / "none"
    elif damage == "no checkpoint":
        source = tmp_path / "empty"
        source.mkdir()
    else:
        samples = str(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message) as refusal:
        export(str(source), str(out), samples=samples)
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_fails_half_way_leaves_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.model.diffusers_directory.files.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        export(str(tiny_run), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_options_of_sampling_come_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=1000, variance_type="fixed_large", clip_sample=False)
    DDPMPipeline(randomised(UNet2DModel(**SMALL)), scheduler).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "run"), ImportSettings())
    config = pretrained.read(str(tmp_path / "run"), ema=True).config
    assert (config.sample.variance, config.sample.clip) == ("fixed_large", False)
    export(str(tmp_path / "run"), str(tmp_path / "back"))
    card = (tmp_path / "back/README.md").read_text()  # says nothing of a training that it does not know
    assert "of a model of diffusers" in card and "steps of training" not in card and "| train." not in card
    assert generator.load(str(tmp_path / "run"), CPU)._process.clip is False
    assert SamplingOptions().clip is True
