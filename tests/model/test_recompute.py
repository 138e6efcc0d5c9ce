import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.recompute import RecomputeConv2d


def layer(recompute, out=6, **options):
    torch.manual_seed(0)
    conv = RecomputeConv2d(8, out, 3, **options)
    conv.recompute = recompute
    return conv


def features(dtype=torch.float32, size=(6, 10)):
    x = torch.randn(3, 8, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return x.to(dtype).requires_grad_()


def normed(x, weight, bias):
    return F.dropout(F.silu(F.group_norm(x, 4, weight.to(x.dtype), bias.to(x.dtype))), 0.3)


def affine():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(8, generator=generator).requires_grad_() for _ in range(2)]


PREPARATIONS = {
    "normed": (normed, affine, {"padding": 1}),
    "padded": (lambda x: F.pad(x, (0, 1, 0, 1)), list, {"stride": 2}),
    "enlarged": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), list, {"padding": 1}),
}


@pytest.mark.parametrize("name", PREPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_is_computed_again_changes_no_bit(name, dtype, memory_format):
    prepare, more, options = PREPARATIONS[name]
    results = []
    for recompute in (False, True):
        conv = layer(recompute, **options).to(memory_format=memory_format)
        x = features(dtype).detach().contiguous(memory_format=memory_format).requires_grad_()
        inputs = [x, *more()]
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = conv(*inputs, prepare=prepare)
        follows = torch.rand(())  # the generator stands where it would
        output.float().square().sum().backward()
        after = torch.rand(())
        results.append([output, follows, after, *(t.grad for t in (*inputs, conv.weight, conv.bias))])
    for plain, recompute in zip(*results):
        assert plain.dtype == recompute.dtype
        assert torch.equal(plain, recompute)


def held(conv, prepare, *inputs):
    """The storages kept for the backward pass, beside those of inputs and parameters: their sizes in elements."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *conv.parameters())}
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = conv(*inputs, prepare=prepare)
    del output
    return [size for storage, size in sizes.items() if storage not in known]


@pytest.mark.parametrize("name", PREPARATIONS)
def test_only_inputs_are_saved_for_backward(name):
    prepare, more, options = PREPARATIONS[name]
    inputs = [features(), *more()]
    assert held(layer(True, **options), prepare, *inputs) == []
    assert max(held(layer(False, **options), prepare, *inputs)) >= inputs[0].numel()


def test_a_checkpoint_around_stops_ahead_of_the_convolution():
    def flops(around):
        conv, inputs = layer(True, padding=1), [features(), *affine()]
        with FlopCounterMode(display=False) as counter:
            around(lambda *inputs: conv(*inputs, prepare=normed), inputs).sum().backward()
        return counter.get_total_flops()

    plain = flops(lambda function, inputs: function(*inputs))
    assert plain > 0
    assert flops(lambda function, inputs: checkpoint(function, *inputs, use_reentrant=False)) == plain


def test_without_preparation_and_without_gradients_it_is_a_convolution():
    conv, x = layer(True, padding=1), features()
    assert torch.equal(conv(x), nn.Conv2d.forward(conv, x))
    with torch.no_grad():
        assert torch.equal(conv(x, prepare=torch.relu), nn.Conv2d.forward(conv, x.relu()))
