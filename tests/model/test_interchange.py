import diffusers
import pytest
import torch
from torch import nn

from pipeline.config import ModelSection
from pipeline.errors import ConfigError, DataError
from pipeline.model.interchange import (
    diffusers_config,
    from_diffusers,
    null_row_added,
    section_from_diffusers,
    to_diffusers,
)
from pipeline.model.unet import UNet

# config.json of google/ddpm-cifar10-32, as published.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "dropout": 0.0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "resnet_time_scale_shift": "default",
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}

SMALL = {"base_channels": 16, "channel_mults": (1, 2), "blocks_per_level": 1, "dropout": 0.0}
CASES = [
    (ModelSection(**SMALL, attention_sizes=(8,)), 3, (8, 8)),
    (ModelSection(**SMALL, attention_sizes=(8, 4), head_channels=8, num_classes=5), 1, (8, 16)),
    (ModelSection(**SMALL, attention_sizes=(), scale_shift=True, learned_variance=True), 1, (8, 8)),
    (ModelSection(**SMALL, attention_sizes=(8,), head_channels=8, norm_eps=1e-5, downsample_padding=1, freq_shift=0,
                  flip_sin_to_cos=True), 3, (8, 8)),
    (ModelSection(**SMALL, attention_sizes=(4,), resample_blocks=True, scale_shift=True, norm_eps=1e-5), 3, (8, 8)),
    (ModelSection(**SMALL, attention_sizes=(8,), resample_blocks=True), 3, (8, 8)),
    (ModelSection(base_channels=12, channel_mults=(1, 3, 1), attention_sizes=(4,), dropout=0.0), 3, (8, 8)),
]  # fmt: skip

# What train_unconditional.py of diffusers gives to UNet2DModel, an eighth as wide; the rest are its defaults.
EXAMPLE = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (16, 16, 32, 32, 64, 64), "norm_num_groups": 8,
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}  # fmt: skip


def randomised(model):
    """Weights that all matter, at the scale of trained ones."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "class_embedding" not in name:
            nn.init.xavier_uniform_(parameter, gain=0.7, generator=generator)
        else:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(section, channels, size, batch=2):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(batch, channels, *size, generator=generator), torch.tensor([3, 700])[:batch]
    labels = torch.tensor([0, section.num_classes]) if section.num_classes else None
    return x, t, labels


@torch.no_grad()
def outputs(ours, theirs, x, t, labels):
    return ours(x, t, labels), theirs(x, t, class_labels=labels).sample


def test_the_papers_cifar10_network_is_that_of_google_in_diffusers():
    section, channels, size = section_from_diffusers(CIFAR10)
    assert (section, channels, size) == (ModelSection(dropout=0.0, norm_groups=32), 3, (32, 32))
    assert ModelSection().groups == 32
    ours = randomised(UNet(section, channels=channels, size=size))
    theirs = diffusers.UNet2DModel.from_config(CIFAR10).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 35_746_307
    got, expected = outputs(ours, theirs, *inputs(section, channels, size))
    error = (got - expected).abs().max().item()
    print(f"\n35.7 M parameters: {error:.1e} off, where the output's deviation is {expected.std():.2f}")
    assert expected.std() > 0.3
    assert error < 1e-5


@pytest.mark.parametrize(("section", "channels", "size"), CASES)
def test_every_option_exports_to_the_same_function(section, channels, size):
    ours = randomised(UNet(section, channels=channels, size=size))
    theirs = diffusers.UNet2DModel.from_config(diffusers_config(section, channels, size)).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    got, expected = outputs(ours, theirs, *inputs(section, channels, size))
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # In float64 nothing but the function itself can differ.
    x, t, labels = inputs(section, channels, size)
    got, expected = outputs(ours.double(), theirs.double(), x.double(), t, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_what_diffusers_own_training_example_writes_is_the_same_function_here():
    torch.manual_seed(0)
    theirs = randomised(diffusers.UNet2DModel(**EXAMPLE))
    section, channels, size = section_from_diffusers(theirs.config)
    assert (section.head_channels, section.norm_eps, section.downsample_padding) == (8, 1e-5, 1)
    assert (section.freq_shift, section.flip_sin_to_cos) == (0, True)
    ours = UNet(section, channels=channels, size=size).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    got, expected = outputs(ours, theirs, *inputs(section, channels, size))
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # Each key matters, so that none of them is left out without a difference.
    keys = {"norm_eps": 1e-2, "downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False, "head_channels": 16}
    for key, value in keys.items():
        other = UNet(section.model_copy(update={key: value}), channels=channels, size=size).eval()
        other.load_state_dict(ours.state_dict())
        assert (outputs(other, theirs, *inputs(section, channels, size))[0] - expected).abs().max() > 1e-4, key


@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
def test_a_network_of_theirs_with_other_norm_groups_is_the_same_function_here(scale_shift):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=None, norm_num_groups=8, attn_norm_num_groups=8, resnet_time_scale_shift=scale_shift,
        norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip
    theirs = randomised(theirs)
    section, channels, size = section_from_diffusers(theirs.config)
    assert (section.norm_groups, section.base_channels) == (8, 32)
    ours = UNet(section, channels=channels, size=size).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    got, expected = outputs(ours, theirs, *inputs(section, channels, size))
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # Not because the number of groups is of no account.
    other = UNet(section.model_copy(update={"norm_groups": 32}), channels=channels, size=size).eval()
    other.load_state_dict(ours.state_dict())
    assert (outputs(other, theirs, *inputs(section, channels, size))[0] - expected).abs().max() > 1e-2
    back = diffusers_config(section, channels, size)
    assert back["norm_num_groups"] == back["attn_norm_num_groups"] == 8


@pytest.mark.parametrize(("section", "channels", "size"), CASES)
def test_names_and_configuration_come_back_unchanged(section, channels, size):
    config = diffusers_config(section, channels, size)
    settled = section.model_copy(update={"norm_groups": section.groups})
    assert section_from_diffusers(config) == (settled, channels, size)
    # Also after a round through their own class, which fills in every default.
    model = diffusers.UNet2DModel.from_config(config)
    assert section_from_diffusers(model.config) == (settled, channels, size)
    state = UNet(section, channels=channels, size=size).state_dict()
    back = from_diffusers(to_diffusers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert to_diffusers(state).keys() == model.state_dict().keys()


def test_weights_of_early_diffusers_are_read():
    section, channels, size = CASES[0]
    state = UNet(section, channels=channels, size=size).state_dict()
    old = to_diffusers(state)
    renamed = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, early in renamed.items():
        old = {name.replace(new, early): value for name, value in old.items()}
    assert sum(".proj_attn." in name for name in old) == 2 * 4
    back = from_diffusers(old)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_the_null_label_is_the_last_row_of_their_table():
    section, channels, size = CASES[1]
    config = diffusers_config(section, channels, size)
    assert config["num_class_embeds"] == 6
    assert section_from_diffusers(config)[0].num_classes == 5
    assert section_from_diffusers(config)[0].label_dropout == section.label_dropout
    untrained = section.model_copy(update={"label_dropout": 0.0})
    assert section_from_diffusers(diffusers_config(untrained, channels, size))[0].label_dropout == 0


@pytest.mark.parametrize("rows", [1, 2, 10])
@torch.no_grad()
def test_each_row_of_a_table_from_elsewhere_is_a_class(rows):
    torch.manual_seed(0)
    small = {"sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1, "num_class_embeds": rows,
             "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
             "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
    theirs = randomised(diffusers.UNet2DModel.from_config(CIFAR10 | small))
    section, channels, size = section_from_diffusers(theirs.config)
    assert (section.num_classes, section.label_dropout) == (rows, 0)
    ours = UNet(section, channels=channels, size=size).eval()
    ours.load_state_dict(null_row_added(from_diffusers(theirs.state_dict()), section))
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([0, rows - 1])
    got, expected = outputs(ours, theirs, x, t, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_null_label_of_version_0_1_is_known_by_its_norm_groups():
    section, channels, size = CASES[1]
    early = diffusers_config(section, channels, size)
    del early["_label_dropout"]
    assert section_from_diffusers(early)[0].num_classes == 5
    assert section_from_diffusers(early | {"attn_norm_num_groups": None})[0].num_classes == 6


def test_what_does_not_change_the_function_is_accepted():
    moot = {
        "act_fn": "swish",
        "decay": 0.9999,
        "id2label": {"0": "cat"},
        "num_train_timesteps": 1000,
        "_own": 1,
        "new": None,
    }
    assert section_from_diffusers(CIFAR10 | moot) == section_from_diffusers(CIFAR10)


def test_another_network_of_diffusers_is_named():
    with pytest.raises(ConfigError, match="is a UNet2DConditionModel: only a UNet2DModel"):
        section_from_diffusers({"_class_name": "UNet2DConditionModel", "sample_size": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_padding": 2}, "downsample_padding is 2"),
        ({"freq_shift": 0.5}, "freq_shift is 0.5"),
        ({"down_block_types": ["SkipDownBlock2D", *["DownBlock2D"] * 3]}, "down_block_types is"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types is"),
        ({"block_out_channels": [128, 192, 256, 256]}, "block_out_channels is"),
        ({"out_channels": 4}, "out_channels is 4"),
        ({"norm_num_groups": 24}, "norm_num_groups is 24"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is None"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep', not None"),
        ({"class_embed_type": "identity"}, "class_embed_type is 'identity', not None"),
        ({"num_class_embeds": 0}, "num_class_embeds is 0"),
        ({"num_class_embeds": "10"}, "num_class_embeds is '10'"),
        ({"num_class_embeds": 1, "_label_dropout": 0.1}, "num_class_embeds is 1"),
        ({"act_fn": "mish"}, "act_fn is 'mish', not 'silu'"),
        ({"add_attention": False}, "add_attention is False, not True"),
        ({"mid_block_type": None}, "mid_block_type is None, not 'UNetMidBlock2D'"),
        ({"downsample_type": "resnet"}, "upsample_type is None"),
        ({"downsample_type": "fir"}, "downsample_type is 'fir'"),
        ({"center_input_sample": True}, "center_input_sample is True, not False"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier', not 'positional'"),
        ({"time_embedding_dim": 64}, "time_embedding_dim is 64"),
        ({"addition_embed_type": "text"}, "addition_embed_type is 'text', which no UNet2DModel known here has"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ],
)
def test_unsupported_keys_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match="has options that this package does not support") as refusal:
        section_from_diffusers(CIFAR10 | change)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_defaults_of_diffusers_are_known():
    # A key left out means their default.
    short = {"sample_size": 32, "block_out_channels": [32, 32, 32, 32]}
    full = diffusers.UNet2DModel.from_config(short).config
    assert section_from_diffusers(short) == section_from_diffusers(full)
    assert section_from_diffusers({"sample_size": 32})[0].channel_mults == (1, 2, 3, 4)


def test_a_configuration_without_the_size_is_refused():
    with pytest.raises(ConfigError, match=r"sample_size is missing .* add the images' size"):
        section_from_diffusers(CIFAR10 | {"sample_size": None})


def test_what_diffusers_cannot_express_is_refused():
    with pytest.raises(ConfigError, match=r"model\.channel_mults: begins with 2, which diffusers cannot express"):
        diffusers_config(ModelSection(channel_mults=(2, 2)), 3, (8, 8))
    with pytest.raises(ConfigError, match=r"model\.timestep_scale: 0\.25, which diffusers cannot express"):
        diffusers_config(ModelSection(timestep_scale=0.25), 3, (32, 32))
    two = {"num_heads": 2, "channel_mults": (1, 2), "base_channels": 32}
    with pytest.raises(ConfigError, match=r"model\.num_heads: 2 heads at levels of different widths"):
        diffusers_config(ModelSection(**two, attention_sizes=(8,)), 3, (8, 8))
    assert diffusers_config(ModelSection(**two, attention_sizes=(4,)), 3, (8, 8))["attention_head_dim"] == 32


def test_queries_without_keys_are_refused():
    with pytest.raises(DataError, match=r"only \.to_q\. there; use the file of a whole UNet2DModel"):
        from_diffusers({"mid_block.attentions.0.to_q.weight": torch.zeros(4, 4)})
