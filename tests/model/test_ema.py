import pytest
import torch
from torch import nn

from pipeline.config import ModelSection
from pipeline.model.ema import Average, ema_state, set_updates
from pipeline.model.unet import UNet


def walk(model, ema, steps, seed=0):
    """A random walk of the weights, as an optimizer would make, in place; yields after each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with ema.track_step():
            for parameter in model.parameters():
                parameter.data += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        yield


def small_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(dtype)


def small_unet():
    torch.manual_seed(0)
    model = UNet(ModelSection(base_channels=4, channel_mults=(1,), blocks_per_level=1), channels=1, size=(4, 4))
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_the_average_is_the_closed_form(decay, on_host):
    # As a weighted sum over all weights seen, not as the recursion: w_n = (1 - d_n) Π_{m>n} d_m.
    model, steps = small_model(), 300
    ema = Average(model, decay, on_host=on_host)
    seen = []
    for _ in walk(model, ema, steps):
        ema.update()
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    n = torch.arange(1, steps + 1, dtype=torch.float64)
    decays = (1 - n**-0.75).clamp(max=decay)
    weights = (1 - decays) * torch.cat((decays.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)))
    assert weights.sum().item() == pytest.approx(1)
    expected = weights @ torch.stack(seen)
    average = nn.utils.parameters_to_vector(ema.network().parameters())
    torch.testing.assert_close(average, expected, rtol=0, atol=1e-5)
    assert (expected - seen[-1]).abs().max() > 0.1


def test_the_random_weights_of_the_beginning_are_forgotten():
    model = small_model()
    ema = Average(model, 0.9999)
    for parameter in model.parameters():
        parameter.data += 1000
    for _ in range(3):
        ema.update()
    for average, parameter in zip(ema.ema_model.parameters(), model.parameters()):
        torch.testing.assert_close(average, parameter)


@pytest.mark.parametrize(("on_host", "later_on_host"), [(False, False), (False, True), (True, False)])
def test_state_has_the_models_own_names_and_leads_on_exactly(on_host, later_on_host):
    model = small_model(torch.float32)
    ema = Average(model, 0.99, on_host=on_host)
    for _ in walk(model, ema, 20):
        ema.update()
    weights, updates = ema_state(ema)
    assert updates == 20
    assert list(weights) == [name for name, _ in model.named_parameters()]
    weights = {name: value.clone() for name, value in weights.items()}

    other_model = small_model(torch.float32)
    other_model.load_state_dict(model.state_dict())
    other = Average(other_model, 0.99, on_host=later_on_host)
    other.ema_model.load_state_dict(weights)
    set_updates(other, updates)
    for _ in zip(walk(model, ema, 20, seed=1), walk(other_model, other, 20, seed=1)):
        ema.update()
        other.update()
    assert ema_state(other)[1] == 40
    for name, value in ema_state(ema)[0].items():
        assert torch.equal(value, ema_state(other)[0][name])


def test_state_of_no_updates_begins_anew():
    model = small_model()
    ema = Average(model, 0.99)
    assert ema_state(ema)[1] == 0
    set_updates(ema, 0)
    for _ in walk(model, ema, 1):
        ema.update()
    torch.testing.assert_close(ema.ema_model[0].weight, model[0].weight, rtol=0, atol=0)


@pytest.mark.parametrize("on_host", [False, True])
def test_the_averaged_network_has_no_dropout_no_gradient_and_no_second_model(on_host):
    model = small_unet()
    ema = Average(model, 0.99, on_host=on_host)
    assert type(ema.network()) is UNet
    for network in (ema.ema_model, ema.network()):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name.partition(".")[0] for name in ema.state_dict()} == {"ema_model", "initted", "step"}
    assert ema.step.device.type == ema.initted.device.type == "cpu"
    assert list(ema_state(ema)[0]) == list(model.state_dict())


def test_only_the_weights_of_the_last_step_reach_the_host():
    model = small_model()
    ema = Average(model, 0.99, on_host=True)
    for _ in walk(model, ema, 1):
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for parameter in model.parameters():  # as the next step does, which must not be seen before its end
            parameter.data += 1
        ema.update()
    for name, tensor in ema_state(ema)[0].items():
        assert torch.equal(tensor, kept[name])


def test_the_network_of_an_average_on_the_host_is_a_copy():
    model = small_unet()
    ema = Average(model, 0.99, on_host=True)
    for _ in walk(model, ema, 2):
        ema.update()
    network, average = ema.network().state_dict(), ema_state(ema)[0]
    assert all(torch.equal(tensor, average[name]) for name, tensor in network.items())
    assert not {tensor.data_ptr() for tensor in network.values()} & {tensor.data_ptr() for tensor in average.values()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_are_copied_from_the_gpu_after_its_step_and_completely():
    """A copy that is long in coming is neither missed by `update` nor overtaken by the next step."""
    model = small_unet().cuda()
    beside, away = Average(model, 0.9), Average(model, 0.9, on_host=True)
    staged = list(away.model.parameters())
    assert all(tensor.is_pinned() and tensor.device.type == "cpu" for tensor in staged)
    assert [tensor.stride() for tensor in staged] == [parameter.stride() for parameter in model.parameters()]
    generator = torch.Generator("cuda").manual_seed(0)

    def move():
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator, device="cuda")

    for _ in range(5):
        with torch.cuda.stream(away._stream):
            torch.cuda._sleep(10**8)
        with away.track_step():
            move()
        beside.update()
        away.update()
    for (name, tensor), other in zip(ema_state(away)[0].items(), ema_state(beside)[0].values()):
        torch.testing.assert_close(tensor, other.cpu(), rtol=1e-6, atol=1e-6, msg=name)
    assert next(away.network().parameters()).is_cuda

    with torch.cuda.stream(away._stream):
        torch.cuda._sleep(10**8)
    with away.track_step():
        move()
    sent = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(InterruptedError), away.track_step():
        move()
        raise InterruptedError  # nothing more is sent
    torch.cuda.synchronize()
    assert all(torch.equal(tensor, weights.cpu()) for tensor, weights in zip(staged, sent))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_is_refused(wrap):
    with pytest.raises(TypeError, match=r"unwrap it from DDP or torch\.compile"):
        Average(wrap(small_model()), 0.99)


def test_16_bit_weights_are_refused():
    with pytest.raises(TypeError, match="float32 weights"):
        Average(small_model(torch.bfloat16), 0.99)
