"""Adam, and its state by the names of the parameters."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline.training.optimizer import make_adam, named_state


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 2, 3))
    return model.to(memory_format=torch.channels_last)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[torch.Tensor]:
    """Train on data that follows from the step."""
    for step in range(first, first + count):
        x = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + step % 3)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_it_is_adam_as_torch_has_it_by_default() -> None:
    ours, theirs = network(), network()
    mine = steps(ours, make_adam(ours, 1e-3), 0, 20)
    default = steps(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3), 0, 20)
    assert any(not torch.equal(a, b) for a, b in zip(mine, network().parameters()))
    for a, b in zip(mine, default):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_its_constants_are_the_papers() -> None:
    (group,) = make_adam(network(), 2e-4).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == (
        2e-4,
        (0.9, 0.999),
        1e-8,
        0,
        False,
    )


def test_state_before_the_first_step_changes_nothing() -> None:
    """It is put there by hand; it must be what Adam itself would have made."""
    ours, theirs = network(), network()
    optimizer, plain = make_adam(ours, 1e-3), torch.optim.Adam(theirs.parameters(), lr=1e-3, fused=True)
    for a, b in zip(steps(ours, optimizer, 0, 5), steps(theirs, plain, 0, 5)):
        assert torch.equal(a, b)
    for mine, default in zip(named_state(optimizer, ours).items(), named_state(plain, theirs).items()):
        assert mine[0] == default[0] and torch.equal(mine[1], default[1])


def test_every_parameter_has_its_state_by_name_and_type() -> None:
    model = network()
    state = named_state(make_adam(model, 1e-3), model)
    names = dict(model.named_parameters())
    assert state.keys() == {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in names}
    for key, value in state.items():
        assert value.dtype == torch.float32
        kind, _, name = key.partition(".")
        assert value.shape == (() if kind == "step" else names[name].shape)


def test_tensors_are_the_live_ones() -> None:
    model = network()
    optimizer = make_adam(model, 1e-3)
    state = named_state(optimizer, model)
    steps(model, optimizer, 0, 3)
    assert all(value == 3 for key, value in state.items() if key.startswith("step."))
    assert state.keys() == named_state(optimizer, model).keys()
    assert all(a is b for a, b in zip(state.values(), named_state(optimizer, model).values()))


@pytest.mark.parametrize("done", [0, 1, 7])
def test_a_run_that_goes_on_from_the_saved_state_is_the_run_that_never_stopped(done: int) -> None:
    model = network()
    optimizer = make_adam(model, 1e-3)
    steps(model, optimizer, 0, done)
    weights = copy.deepcopy(model.state_dict())
    saved = safetensors.torch.save({k: v.contiguous() for k, v in named_state(optimizer, model).items()})
    unbroken = steps(model, optimizer, done, 5)

    other = network()
    other.load_state_dict(weights)
    resumed = make_adam(other, 1e-3)
    stored = safetensors.torch.load(saved)
    for name, tensor in named_state(resumed, other).items():
        tensor.copy_(stored[name])
    for a, b in zip(unbroken, steps(other, resumed, done, 5)):
        assert torch.equal(a, b)


def test_without_its_state_it_is_another_run() -> None:
    """The defect of the reference article, and proof that the test above can fail."""
    model = network()
    optimizer = make_adam(model, 1e-3)
    steps(model, optimizer, 0, 7)
    other = copy.deepcopy(model)
    unbroken = steps(model, optimizer, 7, 5)
    assert any(not torch.equal(a, b) for a, b in zip(unbroken, steps(other, make_adam(other, 1e-3), 7, 5)))
