import pytest
import torch
from torch import nn

from pipeline.config import ModelSection
from pipeline.model.ema import ema_state, make_ema, set_updates
from pipeline.model.unet import UNet


def walk(model, steps, seed=0):
    """A random walk of the weights, as an optimizer would make; yields after each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        yield


def small_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(dtype)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_the_average_is_the_closed_form(decay):
    # As a weighted sum over all weights seen, not as the recursion: w_n = (1 - d_n) Π_{m>n} d_m.
    model, steps = small_model(), 300
    ema = make_ema(model, decay)
    seen = []
    for _ in walk(model, steps):
        ema.update()
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    n = torch.arange(1, steps + 1, dtype=torch.float64)
    decays = (1 - n**-0.75).clamp(max=decay)
    weights = (1 - decays) * torch.cat((decays.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)))
    assert weights.sum().item() == pytest.approx(1)
    expected = weights @ torch.stack(seen)
    average = nn.utils.parameters_to_vector(ema.ema_model.parameters())
    torch.testing.assert_close(average, expected, rtol=0, atol=1e-5)
    assert (expected - seen[-1]).abs().max() > 0.1


def test_the_random_weights_of_the_beginning_are_forgotten():
    model = small_model()
    ema = make_ema(model, 0.9999)
    for parameter in model.parameters():
        parameter.data += 1000
    for _ in range(3):
        ema.update()
    for average, parameter in zip(ema.ema_model.parameters(), model.parameters()):
        torch.testing.assert_close(average, parameter)


def test_state_has_the_models_own_names_and_leads_on_exactly():
    model = small_model(torch.float32)
    ema = make_ema(model, 0.99)
    for _ in walk(model, 20):
        ema.update()
    weights, updates = ema_state(ema)
    assert updates == 20
    assert list(weights) == [name for name, _ in model.named_parameters()]
    weights = {name: value.clone() for name, value in weights.items()}

    other_model = small_model(torch.float32)
    other_model.load_state_dict(model.state_dict())
    other = make_ema(other_model, 0.99)
    other.ema_model.load_state_dict(weights)
    set_updates(other, updates)
    for _ in zip(walk(model, 20, seed=1), walk(other_model, 20, seed=1)):
        ema.update()
        other.update()
    assert ema_state(other)[1] == 40
    for name, value in ema_state(ema)[0].items():
        assert torch.equal(value, ema_state(other)[0][name])


def test_state_of_no_updates_begins_anew():
    model = small_model()
    ema = make_ema(model, 0.99)
    assert ema_state(ema)[1] == 0
    set_updates(ema, 0)
    for _ in walk(model, 1):
        ema.update()
    torch.testing.assert_close(ema.ema_model[0].weight, model[0].weight, rtol=0, atol=0)


def test_the_averaged_network_has_no_dropout_no_gradient_and_no_second_model():
    model = UNet(ModelSection(base_channels=4, channel_mults=(1,), blocks_per_level=1), channels=1, size=(4, 4))
    ema = make_ema(model, 0.99)
    assert not any(module.training for module in ema.ema_model.modules())
    assert not any(parameter.requires_grad for parameter in ema.ema_model.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name.partition(".")[0] for name in ema.state_dict()} == {"ema_model", "initted", "step"}
    assert ema.step.device.type == ema.initted.device.type == "cpu"
    assert list(ema_state(ema)[0]) == list(model.state_dict())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_is_refused(wrap):
    with pytest.raises(TypeError, match=r"unwrap it from DDP or torch\.compile"):
        make_ema(wrap(small_model()), 0.99)


def test_16_bit_weights_are_refused():
    with pytest.raises(TypeError, match="float32 weights"):
        make_ema(small_model(torch.bfloat16), 0.99)
