"""Models of other projects become runs, which the other commands take; what a file does not tell is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError
from pipeline.import_model import ImportSettings, import_model
from pipeline.sampling import generator, pretrained
from pipeline.verify import verify
from tests import foreign
from tests.launch import TINY, ddpm
from tests.test_export import SMALL

CPU = torch.device("cpu")
X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([3, 71])
OPENAI = ImportSettings(size=(8, 8), num_heads=4)


def ckpt(path: Path, weights: foreign.Weights, **more: Any) -> Path:
    """A ckpt.pt of w86763777: the averaged weights are half of the others."""
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    halved = {name: value if "timembedding.0" in name else value / 2 for name, value in weights.items()}
    content = {"net_model": weights, "ema_model": halved, "sched": schedule.state_dict(), "step": 800,
               "optim": optimizer.state_dict(), "x_T": torch.randn(4, 3, 8, 8)}  # fmt: skip
    torch.save(content | more, path)
    return path


@torch.no_grad()
def assert_output(run: Path, expected: Tensor, labels: Tensor | None = None, *, ema: bool = True) -> None:
    network = generator.load(str(run), CPU, ema=ema).networks("fp32")[0]
    torch.testing.assert_close(network(X, T, labels), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_checkpoint_of_w86763777_becomes_a_run_that_every_command_takes(tmp_path: Path, digits: Path) -> None:
    weights = foreign.w86763777()
    file, run = ckpt(tmp_path / "ckpt.pt", weights), tmp_path / "run"
    told = ddpm("import", file, "--out", run)
    assert told.returncode == 0, told.stderr
    assert "from w86763777/pytorch-ddpm; values that no option gave: schedule linear, timesteps 100" in told.stdout
    halved = {name: value if "timembedding.0" in name else value / 2 for name, value in weights.items()}
    assert_output(run, foreign.w86763777_output(halved, X, T))
    assert_output(run, foreign.w86763777_output(weights, X, T), ema=False)
    config = pretrained.read(str(run), ema=True).config
    assert (config.diffusion.timesteps, config.data.height_width, config.sample.clip) == (100, (8, 8), False)
    assert verify(str(run)) == []

    drawn = ddpm("sample", run, "--seeds", "0-1", "--out", tmp_path / "samples", "--steps", 2, "--batch", 2)
    assert drawn.returncode == 0, drawn.stderr
    resumed = ddpm("train", *TINY, f"data.shards={digits}", f"run.dir={run}")
    assert resumed.returncode == 2 and resumed.stderr.count("\n") == 1
    assert f"{run} was imported: it has weights, but no data and no optimizer" in resumed.stderr
    assert f"train.init_from={run}" in resumed.stderr
    assert not (run / "control").exists()
    first = ddpm("sample", file, "--seeds", "0", "--out", tmp_path / "x")
    assert first.returncode == 2 and f"`ddpm import {file} --out RUN`" in first.stderr


@pytest.mark.parametrize(
    ("description", "settings", "attention"),
    [
        ({"classes": 3, "scale_shift": True, "blocks": 1}, {"num_heads": 4}, {"num_heads": 4}),
        ({"learn_sigma": True, "blocks": 1}, {"head_channels": 16, "attention_order": "new", "schedule": "cosine"},
         {"head_channels": 16, "new_order": True}),
        ({"updown": True, "blocks": 1}, {"num_heads": 2, "timesteps": 4000, "rescale_timesteps": True},
         {"num_heads": 2, "timestep_scale": 0.25}),
    ],
)  # fmt: skip
def test_weights_of_openai_become_a_run(
    tmp_path: Path, description: dict[str, Any], settings: dict[str, Any], attention: dict[str, Any]
) -> None:
    weights, run = foreign.openai(**description), tmp_path / "run"
    torch.save(weights, tmp_path / "ema_0.9999_500000.pt")
    result = import_model(str(tmp_path / "ema_0.9999_500000.pt"), str(run), ImportSettings(size=(8, 8), **settings))
    labels = torch.tensor([0, 2]) if "classes" in description else None
    assert_output(run, foreign.openai_output(weights, X, T, labels, **attention), labels)
    assert result["parameters"] == sum(w.numel() for w in weights.values()) + 128 * ("classes" in description)
    assert result["taken"]["timesteps"] == settings.get("timesteps", 1000)
    config = pretrained.read(str(run), ema=True).config
    assert config.diffusion.schedule == settings.get("schedule", "linear") and config.sample.clip
    assert config.model.learned_variance == ("learn_sigma" in description)


def test_a_directory_of_diffusers_becomes_a_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = UNet2DModel(**SMALL, num_class_embeds=3).to(torch.bfloat16)
    pipeline = DDPMPipeline(theirs, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipeline.save_pretrained(tmp_path / "theirs", variant="bf16", max_shard_size="50KB")
    names = {"0": "cat", "1": "dog", "2": "owl"}
    file = tmp_path / "theirs/unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": names}))
    import_model(str(tmp_path / "theirs"), str(tmp_path / "run"), ImportSettings())
    model = pretrained.read(str(tmp_path / "run"), ema=True)
    assert model.config.diffusion.schedule == "cosine" and model.class_names == ("cat", "dog", "owl")
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        assert_output(tmp_path / "run", theirs.float()(X, T, class_labels=labels).sample, labels)
    with pytest.raises(ConfigError, match="is a run or a checkpoint already"):
        import_model(str(tmp_path / "run"), str(tmp_path / "again"), ImportSettings())
    with pytest.raises(ConfigError, match="--schedule is for files of weights"):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "again"), ImportSettings(schedule="linear"))


def lucidrains(*, whole: bool) -> dict[str, Any]:
    model = {"model.init_conv.weight": torch.ones(1), "model.mid_attn.fn.mem_kv": torch.ones(1), "betas": torch.ones(3)}
    content = {"step": 1, "model": model, "opt": {}, "ema": {}, "scaler": None, "version": "2.1.1"}
    return content if whole else model


def _without(start: str) -> foreign.Weights:
    return {name: value for name, value in foreign.openai().items() if not name.startswith(start)}


WHOLE = foreign.openai()
OTHERS = foreign.w86763777()
BROKEN: dict[str, tuple[Any, ImportSettings, type[Exception], str]] = {
    "no size": (WHOLE, ImportSettings(num_heads=4), ConfigError, "--size: the weights of"),
    "no heads": (WHOLE, ImportSettings(size=(8, 8)), ConfigError, "--num-heads, --head-channels: the weights"),
    "both heads": (WHOLE, ImportSettings((8, 8), 4, 4), ConfigError, "give one of these options"),
    "five heads": (WHOLE, ImportSettings((8, 8), 5), ConfigError, "--num-heads 5 does not divide the 64"),
    "a wide head": (WHOLE, ImportSettings((8, 8), head_channels=128), ConfigError, "--head-channels 128 does not"),
    "rescaled?": (WHOLE, ImportSettings((8, 8), 4, timesteps=4000), ConfigError, "--rescale-timesteps: the"),
    "odd size": (WHOLE, ImportSettings((9, 9), 4), ConfigError, "cannot be halved 1 times"),
    "variance": (
        foreign.openai(learn_sigma=True), ImportSettings((8, 8), 4, variance="fixed_small"), ConfigError,
        "has learned its variance",
    ),
    "few steps": (
        WHOLE, ImportSettings((8, 8), 4, timesteps=10, rescale_timesteps=False), ConfigError,
        "10 is too few for the linear schedule",
    ),
    "channels": (foreign.openai(channels=6), OPENAI, ConfigError, "this package supports|does not support"),
    "lucidrains": (lucidrains(whole=True), OPENAI, ConfigError, "denoising-diffusion-pytorch: its network has RMSNorm"),
    "its weights": (lucidrains(whole=False), OPENAI, ConfigError, "denoising-diffusion-pytorch"),
    "optimizer": ({"state": {}, "param_groups": []}, OPENAI, ConfigError, "not of a known project .it holds state,"),
    "a list": ([torch.ones(1)], OPENAI, ConfigError, "not of a known project .it holds list"),
    "missing": (_without("out.2.bias"), OPENAI, ConfigError, "head.conv.bias"),
    "cut": (_without("output_blocks.3"), OPENAI, DataError, "blocks in place of"),
    "more": (WHOLE | {"strange.weight": torch.ones(1)}, OPENAI, DataError, "unknown weights .'strange'"),
    "other shape": (WHOLE | {"out.0.weight": torch.ones(5)}, OPENAI, ConfigError, "its weights are not those"),
    "no multiple": (
        WHOLE | {"input_blocks.1.0.out_layers.3.weight": torch.ones(48, 48, 3, 3)}, OPENAI, ConfigError,
        "no multiples of the first layer's 32",
    ),
    "a number": (WHOLE | {"out.0.weight": torch.tensor(1.0)}, OPENAI, ConfigError, "its weights are not"),
    "not finite": (WHOLE | {"out.0.weight": torch.full((32,), torch.nan)}, OPENAI, DataError, "not finite"),
    "text": (WHOLE | {"out.0.weight": "x"}, OPENAI, DataError, "out.0.weight is a tensor that does not fit"),
    "heads": ({"net_model": OTHERS, "ema_model": OTHERS}, OPENAI, ConfigError, "--num-heads is for networks of OpenAI"),
    "timesteps": (
        {"net_model": OTHERS, "ema_model": OTHERS}, ImportSettings((8, 8), timesteps=500), ConfigError,
        "has a table of 100: leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    content, settings, kind, message = BROKEN[case]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(kind, match=message) as refusal:
        import_model(str(tmp_path / "model.pt"), str(tmp_path / "run"), settings)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_wrong_places_are_told(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    with pytest.raises(ConfigError, match="exists and is not empty: give a new directory"):
        import_model("none", str(tmp_path / "full"), OPENAI)
    with pytest.raises(ConfigError, match="none: no such file or directory"):
        import_model("none", str(tmp_path / "out"), OPENAI)
    with pytest.raises(ConfigError, match="not a diffusers model: give a diffusers directory"):
        import_model(str(tmp_path / "full"), str(tmp_path / "out"), OPENAI)
    wrong = ddpm("import", tmp_path, "--out", tmp_path / "out", "--attention-order", "other")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "legacy" in wrong.stderr
