"""Networks from runs, checkpoints and diffusers directories, and the images they draw."""

from __future__ import annotations

import json
import re
import shutil
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters

from pipeline import config_file
from pipeline.config import SamplingOptions
from pipeline.errors import ConfigError, DataError, NoCheckpoint
from pipeline.model.blocks import Attention, ResidualBlock
from pipeline.model.denoiser import Denoiser
from pipeline.sampling import generator, pretrained
from tests.conftest import ROOT
from tests.launch import TINY, ddpm

CPU = torch.device("cpu")
UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as diffusers saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("diffusers") / "pipeline"
    DDPMPipeline(UNet2DModel(**UNET), DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(path)
    return path


@pytest.mark.parametrize("layout", ["pipeline", "unet alone"])
def test_a_diffusers_directory_draws_what_diffusers_draws(theirs: Path, layout: str) -> None:
    source = theirs if layout == "pipeline" else theirs / "unet"
    ours = generator.load(str(source), CPU)
    schedule = "squaredcos_cap_v2" if layout == "pipeline" else "linear"
    assert ours.config.diffusion.schedule == ("cosine" if layout == "pipeline" else "linear")
    options = SamplingOptions(sampler="ddim", steps=10, spacing="leading", batch=4, precision="fp32")
    images = np.stack([image for _, image in ours.images(range(4), options)])

    unet = UNet2DModel.from_pretrained(theirs / "unet")
    scheduler = DDIMScheduler(beta_schedule=schedule, clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    x = generator.keyed_random.normals(0, torch.arange(4), generator.Use.SAMPLE_START, (3, 8, 8))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(float) - expected).max() <= 1


@pytest.mark.parametrize(
    ("settings", "variance", "clip"),
    [
        ({}, "fixed_small", True),
        ({"variance_type": "fixed_large"}, "fixed_large", True),
        ({"variance_type": "fixed_small_log", "clip_sample": False}, "fixed_small", False),
    ],
)
def test_a_diffusers_scheduler_is_honoured_step_by_step(
    tmp_path: Path, settings: dict[str, object], variance: str, clip: bool
) -> None:
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", **settings)
    DDPMPipeline(UNet2DModel(**UNET), scheduler).save_pretrained(tmp_path)
    ours = generator.load(str(tmp_path), CPU)
    assert (ours.config.sample.variance, ours.config.train.precision) == (variance, "fp32")
    assert ours._process.clip == clip
    options = ours.config.sample.model_copy(update={"batch": 2, "steps": 1000})
    states = ours._trajectory(range(2), options, lambda: None)
    next(states)  # the noise

    unet = UNet2DModel.from_pretrained(tmp_path / "unet")
    x = generator.keyed_random.normals(0, torch.arange(2), generator.Use.SAMPLE_START, (3, 8, 8))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for t, state in zip(range(999, 994, -1), states):
            noise = generator.keyed_random.normals(0, torch.arange(2), generator.Use.SAMPLE_STEP, (3, 8, 8), step=t)
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
            assert torch.allclose(state, x, atol=2e-4), t


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log'"),
        ({"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
        ({"thresholding": True}, "thresholding is True"),
        ({"clip_sample_range": 2.0}, "clip_sample_range is 2.0"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
    ],
)
def test_an_unsupported_scheduler_is_refused_in_one_line(
    theirs: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    shutil.copytree(theirs, tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        generator.load(str(tmp_path / "pipeline"), CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_the_identity_of_a_diffusers_model_is_its_weights_and_its_scheduler(theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    identities = [generator.load(str(source), CPU).sha256 for source in (theirs, tmp_path / "pipeline")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}))
    identities.append(generator.load(str(tmp_path / "pipeline"), CPU).sha256)
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        ("cut", DataError, "is damaged or cut short"),
        ("empty", DataError, "is damaged or cut short"),
        ("inf", DataError, r"holds weights that are not finite \(.*conv_in.*\): give an earlier checkpoint"),
        ("no json", DataError, "config.json is not JSON"),
        ("wrong type", ConfigError, "not the configuration of a diffusers model"),
        ("not a mapping", ConfigError, "not the configuration of a diffusers model"),
        ("another width", ConfigError, "its weights are not those of the network that its configuration describes"),
    ],
)
def test_damaged_diffusers_files_are_refused_in_one_line(
    theirs: Path, tmp_path: Path, damage: str, kind: type[Exception], message: str
) -> None:
    shutil.copytree(theirs / "unet", tmp_path / "unet")
    weights, config = tmp_path / "unet/diffusion_pytorch_model.safetensors", tmp_path / "unet/config.json"
    settings = json.loads(config.read_text())
    if damage in ("cut", "empty"):
        weights.write_bytes(weights.read_bytes()[: 5000 if damage == "cut" else 0])
    elif damage == "inf":
        values = load_file(weights)
        values["conv_in.weight"][3, 0, 1, 1] = torch.inf
        save_file(values, weights)
    else:
        config.write_text({
            "no json": "{", "wrong type": json.dumps(settings | {"block_out_channels": "wide"}), "not a mapping": "[]",
            "another width": json.dumps(settings | {"block_out_channels": [64, 64]}),
        }[damage])  # fmt: skip
    with pytest.raises(kind, match=message) as caught:
        generator.load(str(tmp_path / "unet"), CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unsupported_network_is_refused_in_one_line(tmp_path: Path) -> None:
    UNet2DModel(**(UNET | {"act_fn": "gelu"})).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="act_fn") as caught:
        generator.load(str(tmp_path), CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    UNet2DModel(**UNET).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(DataError, match="safe_serialization=True"):
        generator.load(str(tmp_path), CPU)


def test_a_run_a_checkpoint_and_its_two_sets_of_weights(tiny_run: Path) -> None:
    checkpoint = max((tiny_run / "checkpoints").glob("step_*"))
    run, same = (generator.load(str(path), CPU) for path in (tiny_run, checkpoint))
    last = generator.load(str(tiny_run), CPU, ema=False)
    assert run.sha256 == same.sha256 and run.class_names == tuple("0123456789")
    options = SamplingOptions(sampler="ddim", steps=3, batch=4, precision="fp32")
    drawn = [dict(g.images(range(4), options)) for g in (run, same, last)]
    assert all((drawn[0][seed] == drawn[1][seed]).all() for seed in range(4))
    assert any((drawn[0][seed] != drawn[2][seed]).any() for seed in range(4))


def test_weights_rounded_ahead_give_the_bits_of_autocast(theirs: Path) -> None:
    drawing = generator.load(str(theirs), CPU)
    (plain,) = drawing.networks("fp32")
    torch.manual_seed(0)
    for parameter in plain.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)  # 0 and 1, as those of norms are, are never rounded
    (ahead,) = drawing.networks("bf16")
    assert any(parameter.dtype == torch.bfloat16 for parameter in ahead.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in plain.parameters())
    for size in (8, 16):  # from 16 on, weights are summed for upsampling
        x = generator.keyed_random.normals(0, torch.arange(4), generator.Use.SAMPLE_START, (3, size, size))
        with torch.no_grad():
            of_plain, of_ahead = (Denoiser(network, "bf16", 0)(x, torch.arange(4) * 200) for network in (plain, ahead))
        assert torch.equal(of_plain, of_ahead)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_network_draws_nearly_the_same_and_leaves_the_other_as_it_is(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Without the code generator, which takes most of a minute here; what is traced and cut is the same."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    drawing = generator.load(str(tiny_run), CPU)
    plain = SamplingOptions(sampler="ddim", steps=3, batch=4, guidance=2.0, precision=precision)
    compiled = plain.model_copy(update={"compile": True})

    def drawn(options: SamplingOptions) -> np.ndarray:
        return np.stack([image for _, image in drawing.images(range(6), options)]).astype(int)

    expected = drawn(plain)
    assert not counters["stats"]
    assert np.abs(drawn(compiled) - expected).max() <= 2
    kinds = counters["stats"]["unique_graphs"]
    assert 0 < kinds < sum(isinstance(m, ResidualBlock | Attention) for m in drawing.networks("fp32")[0].modules())
    assert not counters["graph_break"]
    assert (drawn(plain) == expected).all()
    assert not any(module._compiled_call_impl for module in drawing.networks(precision)[0].modules())
    drawn(compiled)
    assert counters["stats"]["unique_graphs"] == kinds


def test_an_empty_run_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="no checkpoint yet"):
        generator.load(str(tmp_path), CPU)


def test_weights_of_another_network_are_refused_with_the_difference(tiny_run: Path) -> None:
    config = config_file.load(TINY[1], ("model.base_channels=16",), lambda name: Path(name).read_text())
    with pytest.raises(ConfigError, match=r"model\.base_channels: 8 there, 16 here"):
        pretrained.load_for_training(str(tiny_run), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.size=16", "model.attention_sizes=[8]"), None),
        (("data.size=16",), r"the levels with attention, by model.attention_sizes: \[1\] there, \[2?\] here"),
        (
            ("model.attention_sizes=[8]",),
            r"the levels with attention, by model.attention_sizes: \[1\] there, \[0\] here",
        ),
        (("model.dropout=0.5",), None),
    ],
)
def test_weights_fit_images_of_another_size_if_the_same_levels_attend(
    tiny_run: Path, settings: tuple[str, ...], message: str | None
) -> None:
    config = config_file.load(TINY[1], settings, lambda name: Path(name).read_text())
    if message is None:
        assert pretrained.load_for_training(str(tiny_run), config).weights
        return
    with pytest.raises(ConfigError, match=message):
        pretrained.load_for_training(str(tiny_run), config)


def test_a_run_starts_from_a_diffusers_directory(theirs: Path, digits: Path, tmp_path: Path) -> None:
    image = tmp_path / "color"
    ddpm("shard", ROOT / "shards/digits.zip", "--out", image, "--size", 8).check_returncode()
    settings = ("data.channels=3", "model.base_channels=32", "model.num_classes=0", "model.head_channels=null",
                "model.norm_groups=32", "train.steps=1", "train.lr=1e-12", "train.warmup_steps=0")  # fmt: skip
    result = ddpm(
        "train", *TINY, f"data.shards={image}", f"run.dir={tmp_path / 'run'}", f"train.init_from={theirs}", *settings
    )
    assert result.returncode == 0, result.stderr
    new = load_file(tmp_path / "run/checkpoints/step_00000001/model.safetensors")
    read = config_file.load(TINY[1], settings, lambda name: Path(name).read_text())
    old = pretrained.load_for_training(str(theirs), read).weights
    assert all((new[name] - old[name]).abs().max() < 1e-9 for name in new)
