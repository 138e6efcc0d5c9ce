"""The files of a diffusers directory, as others publish them: what is read is the same function, the rest is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError, DataError
from pipeline.model import diffusers_directory
from pipeline.sampling import generator, pretrained
from tests.sampling.test_generator import UNET

NAME = "diffusion_pytorch_model"
INDEX = f"{NAME}.safetensors.index.json"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    network = UNet2DModel(**UNET, num_class_embeds=3).eval()
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return network


@pytest.fixture
def place(unet: UNet2DModel, tmp_path: Path) -> Path:
    """A pipeline in the usual layout."""
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(unet: UNet2DModel, place: Path) -> Path:
    """The same with its weights in several files."""
    shutil.rmtree(place / "unet")
    unet.save_pretrained(place / "unet", max_shard_size="1MB")
    assert (place / "unet" / INDEX).exists()
    return place


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def assert_same_function(place: Path, theirs: UNet2DModel, atol: float = 1e-5) -> None:
    ours = generator.load(str(place), CPU).networks("fp32")[0]
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    expected = theirs(x, t, class_labels=labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, labels), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
@pytest.mark.parametrize("shards", [None, "300KB"])
def test_variants_and_shards_are_the_same_function(
    unet: UNet2DModel, tmp_path: Path, variant: str | None, shards: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    dtype = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    rounded = UNet2DModel(**UNET, num_class_embeds=3)
    rounded.load_state_dict({name: value.to(dtype) for name, value in unet.state_dict().items()})
    cast = UNet2DModel(**UNET, num_class_embeds=3).to(dtype)
    cast.load_state_dict(unet.state_dict())
    DDPMPipeline(cast, DDPMScheduler()).save_pretrained(tmp_path, variant=variant, max_shard_size=shards or "10GB")
    assert bool(list(tmp_path.glob("unet/*index*"))) == bool(shards)
    assert_same_function(tmp_path, rounded.eval())
    assert (f"the variant {variant}" in capsys.readouterr().err) == bool(variant)


def test_weights_without_a_variant_come_first_and_of_several_none(place: Path, unet: UNet2DModel) -> None:
    directory = place / "unet"
    save_file({}, directory / f"{NAME}.fp16.safetensors")
    assert_same_function(place, unet)
    (directory / f"{NAME}.safetensors").rename(directory / f"{NAME}.ema.safetensors")
    with pytest.raises(DataError, match="holds the variants ema, fp16, but none without one"):
        generator.load(str(place), CPU)


def test_a_flat_directory_keeps_its_scheduler(place: Path, unet: UNet2DModel) -> None:
    """As google/ddpm-cat-256 and its sisters are published."""
    for file in [*place.glob("unet/*"), *place.glob("scheduler/*")]:
        shutil.move(file, place / file.name)
    edit(place / "scheduler_config.json", beta_schedule="squaredcos_cap_v2")
    shutil.rmtree(place / "unet")
    shutil.rmtree(place / "scheduler")
    assert_same_function(place, unet)
    assert pretrained.read(str(place), ema=True).config.diffusion.schedule == "cosine"


def test_a_missing_scheduler_is_reported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrained.read(str(place / "unet"), ema=True)
    assert "has no scheduler_config.json: it is used with the diffusion of Ho et al. 2020" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.safetensors", "another form"),
        ("/etc/passwd", "another form"),
        ("file:///etc/passwd", "another form"),
        (f"{NAME}-00001-of-00002.safetensors/../../x", "another form"),
        (f"{NAME}-00001-of-00002.bin", "another form"),
        ("a\x1b[2J", r"a\\x1b\[2J, which"),
        (f"{NAME}-00077-of-00099.safetensors", "is missing: copy the whole directory"),
        (7, "has no weight_map"),
    ],
)
def test_names_in_an_index_stay_beside_it(sharded: Path, name: Any, message: str) -> None:
    index = sharded / "unet" / INDEX
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=places | {"conv_in.weight": name})
    with pytest.raises(DataError, match=message) as refusal:
        generator.load(str(sharded), CPU)
    assert "\x1b" not in str(refusal.value)


@pytest.mark.parametrize(
    "places", [None, {}, [], "x", {f"w{i}": f"{NAME}-{i:05d}-of-09999.safetensors" for i in range(1001)}]
)
def test_an_index_that_says_nothing_or_too_much_is_damage(sharded: Path, places: Any) -> None:
    edit(sharded / "unet" / INDEX, weight_map=places)
    with pytest.raises(DataError, match=r"has no weight_map|more than 1000"):
        generator.load(str(sharded), CPU)


def test_a_part_of_another_model_is_damage(sharded: Path) -> None:
    file = sorted(sharded.glob("unet/*.safetensors"))[0]
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)
    with pytest.raises(DataError, match=r"does not hold the weights that .*index\.json says"):
        generator.load(str(sharded), CPU)


@pytest.mark.parametrize("ending", ["bin", "fp16.bin", "msgpack", "safetensors.bin"])
def test_other_weight_formats_are_refused_with_the_remedy(place: Path, ending: str) -> None:
    weights = place / f"unet/{NAME}.safetensors"
    weights.rename(weights.with_name(f"{NAME}.{ending}"))
    with pytest.raises(DataError, match=rf"has its weights in {NAME}\.{ending}, .*safe_serialization=True"):
        generator.load(str(place), CPU)


def test_quantised_weights_are_refused(place: Path) -> None:
    file = place / f"unet/{NAME}.safetensors"
    save_file(load_file(file) | {"conv_in.weight": torch.ones(32, 3, 3, 3, dtype=torch.int8)}, file)
    with pytest.raises(DataError, match=r"quantized weights \(conv_in\.weight: int8\)"):
        generator.load(str(place), CPU)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}, r"is a LDMPipeline with vqvae \(VQModel\)"),
        (
            {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "safety_checker": [None, None]},
            r"is a StableDiffusionPipeline with vae \(AutoencoderKL\), text_encoder \(CLIPTextModel\): only",
        ),
        ({"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiT\x1b"]}, r"transformer \(DiT\\x1b\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_unet", [True, False])
def test_pipelines_of_more_than_a_unet_are_named(
    place: Path, index: dict[str, Any], message: str, with_unet: bool
) -> None:
    edit(place / "model_index.json", **index)
    if not with_unet:
        shutil.rmtree(place / "unet")
    with pytest.raises(ConfigError, match=message):
        generator.load(str(place), CPU)


def test_a_pipeline_class_of_ones_own_is_read(place: Path, unet: UNet2DModel) -> None:
    edit(
        place / "model_index.json",
        _class_name="MyClassPipeline",
        safety_checker=[None, None],
        note={"a": 1},
        n=[1, 2, 3],
    )
    assert_same_function(place, unet)
    shutil.rmtree(place / "unet")
    with pytest.raises(ConfigError, match=r"is a MyClassPipeline without unet/config\.json"):
        generator.load(str(place), CPU)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_classes_are_called_as_id2label_says(place: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit(place / file, id2label={"0": "cat", "2": "owl", "1": "dog"})
    assert generator.load(str(place), CPU).class_names == ("cat", "dog", "owl")
    assert "names of classes" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "names", [{"0": "cat"}, {"0": "a", "1": "b", "2": 3}, {str(i): "x" for i in range(4)}, ["a"], "abc"]
)
def test_class_names_that_do_not_fit_are_reported(place: Path, names: Any, capsys: pytest.CaptureFixture[str]) -> None:
    edit(place / "unet/config.json", id2label=names)
    assert generator.load(str(place), CPU).class_names == ("0", "1", "2")
    assert "its names of classes are not those of its 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"layers_per_block": 10**9}, {"block_out_channels": [2**40, 2**41]}, {"num_class_embeds": 10**15},
     {"layers_per_block": 2}, {"sample_size": 10**12}],
)  # fmt: skip
def test_sizes_are_checked_against_the_weights(place: Path, change: dict[str, Any]) -> None:
    edit(place / "unet/config.json", **change)
    if "sample_size" in change:  # the network is the same at any size
        pretrained.check_weights(pretrained.read(str(place), ema=True), "x")
        return
    with pytest.raises(ConfigError, match="its weights are not those of the network"):
        pretrained.check_weights(pretrained.read(str(place), ema=True), "x")


def test_another_directory_is_not_taken_for_one_of_diffusers(tmp_path: Path) -> None:
    assert diffusers_directory.find(str(tmp_path)) is None
