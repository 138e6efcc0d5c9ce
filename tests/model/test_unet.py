import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ModelSection
from pipeline.errors import ConfigError
from pipeline.model.blocks import Attention, Downsample, GroupNorm, Head, ResidualBlock
from pipeline.model.recompute import RecomputeConv2d
from pipeline.model.unet import UNet, sinusoids

SIZE = (8, 8)
TINY = {"base_channels": 16, "channel_mults": (1, 2), "blocks_per_level": 1, "attention_sizes": (4,), "dropout": 0.0}
OPTIONS = [
    {},
    {"num_classes": 3},
    {"learned_variance": True, "scale_shift": True},
    {"head_channels": 8, "num_classes": 2, "learned_variance": True, "scale_shift": True},
    {"channel_mults": (2, 1), "attention_sizes": (8,), "blocks_per_level": 2},
    {"resample_blocks": True, "scale_shift": True, "num_heads": 2, "flip_sin_to_cos": True, "freq_shift": 0},
    {"downsample_padding": 1, "norm_eps": 1e-5, "timestep_scale": 0.25},
]


def tiny(size=SIZE, channels=3, seed=0, **options):
    torch.manual_seed(seed)
    return UNet(ModelSection(**(TINY | options)), channels=channels, size=size)


def awake(model, seed=1):
    """Gives the layers that begin near zero, and the biases, weights that matter."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.abs().max() < 1e-3:
            nn.init.xavier_uniform_(parameter)
    return model


def inputs(model, batch=2, size=SIZE, channels=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    if model.class_embedding is None:
        return x, t
    return x, t, torch.arange(batch) % model.null_label


@pytest.mark.parametrize(
    ("mults", "size", "millions"), [((1, 2, 2, 2), 32, 35.746307), ((1, 1, 2, 2, 4, 4), 256, 113.673219)]
)
def test_the_papers_networks_have_their_numbers_of_parameters(mults, size, millions):
    with torch.device("meta"):
        model = UNet(ModelSection(channel_mults=mults), channels=3, size=(size, size))
    assert sum(parameter.numel() for parameter in model.parameters()) == round(millions * 1e6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_gradients_flow_into_every_parameter(options, checkpointing):
    model = awake(tiny(**options))
    model.checkpointing = checkpointing
    x, t, *labels = inputs(model, batch=4)
    if labels:
        labels = [torch.tensor([0, 1, model.null_label, model.null_label])]
    model(x, t, *labels).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_every_layer_is_registered():
    # Layers in a plain Python list would run but not be found, and so not be trained, moved or saved.
    seen = set()

    def tensors(thing):
        if id(thing) in seen or isinstance(thing, torch.Tensor):
            return {id(thing)} if isinstance(thing, nn.Parameter) else set()
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            return tensors(vars(thing))
        parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
        return set().union(*(tensors(part) for part in parts))

    model = tiny(num_classes=2)
    assert tensors(model) == {id(parameter) for parameter in model.parameters()}


def test_a_new_network_predicts_zero_and_its_branches_do_nothing():
    model = tiny(learned_variance=True)
    x, t = inputs(model)
    output = model(x, t)
    assert output.shape == (2, 6, *SIZE)
    assert output.abs().max() < 1e-3
    features = torch.randn(2, 32, 4, 4)
    (attention,) = model.middle.attentions
    torch.testing.assert_close(attention(features), features, rtol=0, atol=1e-3)
    torch.testing.assert_close(model.middle.blocks[0](torch.randn(2, 64), features), features, rtol=0, atol=1e-3)


def test_weights_begin_with_the_variance_of_the_original_code():
    torch.manual_seed(0)
    block = ResidualBlock(64, 128, embedding=256, groups=32, eps=1e-6, dropout=0.0, scale_shift=False)
    assert block.conv1.weight.var().item() == pytest.approx(2 / (9 * (64 + 128)), rel=0.02)
    assert block.conv2.weight.var().item() == pytest.approx(1e-10 / (9 * 128), rel=0.02)
    attention = Attention(128, 1, 32, 1e-6)
    assert attention.qkv.weight.var().item() == pytest.approx(1 / 128, rel=0.02)
    assert block.conv1.bias.abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"scale_shift": True, "num_classes": 2}], ids=str)
def test_the_output_depends_on_time_and_class(options):
    model = awake(tiny(**options))
    x, t, *labels = inputs(model)
    assert (model(x, t, *labels) - model(x, t + 1, *labels)).abs().max() > 1e-6
    if labels:
        assert (model(x, t, labels[0]) - model(x, t, 1 - labels[0])).abs().max() > 1e-3


def test_no_label_is_the_null_label():
    model = awake(tiny(num_classes=3))
    x, t, _ = inputs(model)
    torch.testing.assert_close(model(x, t), model(x, t, torch.tensor([3, 3])), rtol=0, atol=0)
    with pytest.raises(ValueError, match="labels given to a network without classes"):
        tiny()(x, t, torch.tensor([0, 0]))


def test_images_of_a_batch_do_not_see_each_other():
    model = awake(tiny())
    x, t = inputs(model, batch=3)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, t), alone, rtol=0, atol=1e-5)


def test_the_time_embedding_has_sines_then_cosines_at_frequencies_from_1_to_1e_4():
    t = torch.tensor([0, 7, 999])
    got = sinusoids(t, 8).double()
    expected = [
        [f(step * 10_000 ** -(k / 3)) for f in (math.sin, math.cos) for k in range(4)] for step in (0.0, 7.0, 999.0)
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_downsampling_looks_right_and_down_only():
    layer = Downsample(1)
    nn.init.ones_(layer.conv.weight)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 0, 0] = image[0, 0, 2, 2] = 1.0
    torch.testing.assert_close(layer(image)[0, 0], torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    on_all_sides = Downsample(1, padding=1)
    nn.init.ones_(on_all_sides.conv.weight)
    torch.testing.assert_close(on_all_sides(image)[0, 0], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def with_policy(policy, **options):
    model = awake(tiny(**options))
    model.checkpointing = policy
    return model


@pytest.mark.parametrize("options", [{"dropout": 0.3, "num_classes": 2}, *OPTIONS[2::2], OPTIONS[5]], ids=str)
@pytest.mark.parametrize("policy", ["attention", "blocks", "full"])
def test_checkpointing_changes_no_gradient_even_with_dropout(policy, options):
    gradients = []
    for kind in ("none", policy):
        model = with_policy(kind, **options)
        torch.manual_seed(7)
        model(*inputs(model)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


def saved_bytes(policy):
    model = with_policy(policy, dropout=0.1)
    held = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs(model, batch=4))
    total = sum(nbytes for _, nbytes in held.values())
    output.mean().backward()
    return total


def test_each_checkpointing_policy_saves_more_than_the_one_before():
    held = [saved_bytes(policy) for policy in ("none", "attention", "blocks", "full")]
    print(f"\nbytes held for the backward pass: {held}")
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4
    assert held[1] < 0.7 * held[0]
    assert held[2] < 0.35 * held[0]


def test_checkpointing_recomputes_nothing_without_gradients():
    model, calls = with_policy("full"), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert not model(*inputs(model)).requires_grad
    assert calls == [1]


def test_bf16_autocast_keeps_the_output_the_embedding_and_the_statistics_in_float32():
    model = awake(tiny(num_classes=2, scale_shift=True))
    dtypes = {}

    def note(name):
        def hook(module, args, output):
            dtypes[name] = output.dtype

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    args = inputs(model)
    exact = model(*args)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*args)
    assert output.dtype == torch.float32
    assert dtypes["time_mlp"] == dtypes["down.0.blocks.0.embed"] == torch.float32
    assert dtypes["down.0.blocks.0.conv1"] == dtypes["middle.attentions.0"] == torch.bfloat16
    assert dtypes["down.0.blocks.0.norm1"] == torch.bfloat16  # stored in 16 bits; see the next test
    assert 0 < (output - exact).abs().max() < 0.1 * exact.std()


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", CUDA])  # autocast lists differ: CUDA's would make the result float32
def test_statistics_of_16_bit_features_are_taken_in_float32(device):
    # Sums of 4096 values near 100 would lose the deviation altogether in bfloat16.
    x = (100 + torch.randn(1, 8, 32, 64, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        got = GroupNorm(2, 8, 1e-6).to(device)(x.to(device)).cpu()
    groups = x.double().reshape(1, 2, -1)
    expected = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected.reshape(x.shape), rtol=2**-8, atol=2**-8)


def test_neighbouring_timesteps_differ_under_bf16_autocast():
    model = awake(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model._embed(torch.arange(1000), None)
    assert len(torch.unique(embeddings, dim=0)) == 1000


@pytest.mark.parametrize("size", [(8, 16), (24, 8)])
def test_images_need_not_be_square_nor_of_the_training_size(size):
    model = awake(tiny())
    x, t = inputs(model, size=size)
    assert model(x, t).shape == x.shape
    same = awake(tiny(size=size))  # built for it; attention by the short side is at the same levels here
    torch.testing.assert_close(model(x, t), same(x, t), rtol=0, atol=0)


def test_attention_follows_the_short_side():
    model = tiny(size=(16, 4), attention_sizes=(4,))
    assert isinstance(model.down[0].attentions[0], Attention)
    assert isinstance(model.down[1].attentions[0], nn.Identity)


def test_a_size_that_cannot_be_halved_is_refused_with_the_nearest_that_can():
    message = (
        "data.size: 30x45 cannot be halved 3 times, as the 4 levels of model.channel_mults need:"
        " use multiples of 8, such as 32x48"
    )
    with pytest.raises(ConfigError) as building:
        UNet(ModelSection(base_channels=16), channels=3, size=(30, 45))
    assert str(building.value) == message
    with pytest.raises(ConfigError, match=r"data\.size: 8x9 cannot be halved 1 times"):
        tiny()(torch.zeros(1, 3, 8, 9), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_channels": 12}, r"12 does not divide the 32 channels of a level: set model.head_channels=8 \(or "),
        ({"head_channels": 64}, r"channels of a level: set model.head_channels=32 \(or another divisor of 32\)"),
        ({"num_heads": 3}, r"model.num_heads: 3 does not divide .*: set model.num_heads=2 \(or"),
        ({"base_channels": 7}, "model.base_channels: 7 must be an even number of at least 4"),
    ],
)
def test_impossible_architectures_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


def test_channels_last_gives_the_same_images():
    model = awake(tiny())
    x, t = inputs(model)
    expected = model(x, t)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last), t), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["none", "attention", "blocks", "full"])
def test_torch_compile_sees_one_graph_with_checkpoints(policy):
    model = with_policy(policy, num_classes=2)
    args = inputs(model)
    expected = model(*args)
    expected.mean().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(*args)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    output.mean().backward()
    for gradient, parameter in zip(plain, model.parameters()):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


KEPT: list[DistributedDataParallel] = []


def test_ddp_finds_every_parameter_in_use(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = with_policy("full", num_classes=2, dropout=0.1)
        wrapped = DistributedDataParallel(model)
        # To free it right after a backward pass can hang (seen with torch 2.13.0): the main thread waits for one of
        # gloo's threads with the GIL held, and that thread needs the GIL to free what recomputation has saved.
        KEPT.append(wrapped)
        for _ in range(2):  # an unused parameter fails in the second round
            wrapped(*inputs(model)).mean().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_the_head_is_the_papers():
    assert [type(module) for module in Head(32, 3, 32, 1e-6).children()] == [GroupNorm, RecomputeConv2d]
    assert {norm.eps for norm in tiny().modules() if isinstance(norm, GroupNorm)} == {1e-6}


def ordinary(model, seed=1):
    """Weights of variance 1/fan-in everywhere, as a network has that has learned something."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model.eval()


def conditional(base, mults, groups, **options):
    section = {"base_channels": base, "channel_mults": mults, "attention_sizes": (), "num_classes": 2}
    return ordinary(tiny(**section, norm_groups=groups, **options))


def change(before, after):
    return ((after - before).norm() / before.norm()).item()


BASES = [4, 8, 16, 32, 64, 96, 128]


@pytest.mark.parametrize("mults", [(1,), (1, 2)])
@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_time_and_class_reach_the_output_at_any_width(base, mults):
    model = conditional(base, mults, "auto")
    x, noisy, early, labels = inputs(model)[0], torch.tensor([900, 900]), torch.tensor([10, 10]), torch.tensor([0, 0])
    assert change(model(x, early, labels), model(x, noisy, labels)) > 1e-3
    assert change(model(x, early, labels), model(x, early, labels + 1)) > 1e-3


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_with_one_channel_a_group_they_do_not(base):
    # What the automatic number guards against: the norm subtracts what the embedding has added to the whole channel.
    model = conditional(base, (1,), base)
    x, early, labels = inputs(model)[0], torch.tensor([10, 10]), torch.tensor([0, 0])
    assert change(model(x, early, labels), model(x, early + 890, labels)) < 1e-5
    assert change(model(x, early, labels), model(x, early, labels + 1)) < 1e-5


def test_the_levels_that_they_cannot_reach_are_known():
    def line(**options):
        return ModelSection(base_channels=16, channel_mults=(1, 2, 1, 4), **options).blindness

    assert "norm_groups=16 leaves one channel a group where channel_mults is 1:" in line(norm_groups=16)
    assert (line(norm_groups=8), line(), line(norm_groups=16, scale_shift=True)) == (None, None, None)


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_every_block_of_every_level_hears_the_embedding(base):
    model = conditional(base, (1, 2), "auto")
    args, outputs = inputs(model), {}
    one, other = model._embed(torch.tensor([10, 10]), args[2]), model._embed(torch.tensor([900, 900]), 1 - args[2])
    model._embed = lambda t, labels: one
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, ResidualBlock)}
    assert len(blocks) == 2 + 2 + 4
    for name, block in blocks.items():
        block.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    model(*args)
    before = dict(outputs)
    for name, block in blocks.items():
        handle = block.register_forward_pre_hook(lambda module, args: (other, *args[1:]))
        model(*args)
        handle.remove()
        assert change(before[name], outputs[name]) > 1e-3, name
