"""Weights of other projects give here the function that they are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import ModelSection
from pipeline.errors import ConfigError
from pipeline.model import foreign_weights
from pipeline.model.foreign_weights import Told
from pipeline.model.interchange import null_row_added
from pipeline.model.unet import UNet
from tests import foreign

SIZE = (8, 8)
X = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(5))
T = torch.tensor([3, 71])
WHOLE = Told()


def ours(weights: foreign.Weights, told: Told = WHOLE, **more: Any) -> UNet:
    kind = foreign_weights.kind_of(weights)
    assert kind
    found = foreign_weights.network(kind, weights, told, "file.pt")
    sizes = tuple(min(SIZE) >> level for level in found.attending)
    section = ModelSection(attention_sizes=sizes, **found.section, **more)
    network = UNet(section, channels=found.channels, size=SIZE).eval()
    network.load_state_dict(null_row_added(found.convert(weights), section))
    return network


@torch.no_grad()
def assert_same(got: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


OPENAI: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"num_heads": 4}),
    ({"scale_shift": True, "classes": 3}, {"num_heads": 2}),
    ({"learn_sigma": True, "mults": (1, 2, 3), "blocks": 1, "attending": (0, 2)}, {"num_heads": 4}),
    ({"scale_shift": True, "mults": (1, 1, 2), "blocks": 1}, {"head_channels": 16, "new_order": True}),
    ({"mults": (1,), "attending": ()}, {"head_channels": 8}),
    ({"updown": True, "scale_shift": True, "mults": (1, 1, 2), "attending": (1, 2)}, {"head_channels": 16}),
    ({"base": 64, "blocks": 1, "classes": 2}, {"num_heads": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("description", "attention"), OPENAI)
@torch.no_grad()
def test_networks_of_openai_are_the_same_function(description: dict[str, Any], attention: dict[str, Any]) -> None:
    weights = foreign.openai(**description)
    labels = torch.tensor([0, description["classes"] - 1]) if "classes" in description else None
    order = "new" if attention.get("new_order") else "legacy"
    told = {"num_heads": attention.get("num_heads"), "head_channels": attention.get("head_channels")}
    network = ours(weights, Told(**told, attention_order=order))
    expected = foreign.openai_output(weights, X, T, labels, **attention)
    assert_same(network(X, T, labels), expected)
    if attention.get("num_heads") != 1:  # the order of rows matters, and no shape tells it
        other = ours(weights, Told(**told, attention_order="legacy" if order == "new" else "new"))
        assert (other(X, T, labels) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_timesteps_may_be_rescaled() -> None:
    weights = foreign.openai(blocks=1)
    expected = foreign.openai_output(weights, X, T, num_heads=4, timestep_scale=0.25)
    assert_same(ours(weights, Told(num_heads=4), timestep_scale=0.25)(X, T), expected)
    assert (ours(weights, Told(num_heads=4))(X, T) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "description", [{}, {"mults": (1, 2, 2), "blocks": 1, "attending": (0, 2)}, {"mults": (1,), "attending": ()}]
)
@torch.no_grad()
def test_networks_of_w86763777_are_the_same_function(description: dict[str, Any]) -> None:
    weights = foreign.w86763777(**description)
    assert foreign_weights.timesteps(weights) == 100
    assert_same(ours(weights)(X, T), foreign.w86763777_output(weights, X, T))


def test_a_table_of_time_embeddings_that_was_trained_is_refused() -> None:
    weights = foreign.w86763777()
    weights["time_embedding.timembedding.0.weight"] += 0.5
    with pytest.raises(ConfigError, match="its table of time embeddings is not that of sines and cosines"):
        ours(weights)
