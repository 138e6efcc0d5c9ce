"""A step of training: what it changes, what it must not depend on, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import configfile
from pipeline.config import Config
from pipeline.data.batches import Batch, read_all
from pipeline.data.shardset import ShardSet
from pipeline.errors import ConfigError
from pipeline.run import world
from pipeline.run.world import World
from pipeline.trainer import Position, Trainer
from tests.launch import TINY


@pytest.fixture(scope="module")
def alone() -> World:
    return world.enter("cpu", 60)


@pytest.fixture
def batch(digits: Path) -> Batch:
    return read_all(ShardSet.open(str(digits)), 12)


def tiny(*settings: str) -> Config:
    return configfile.load(TINY[1], ("model.label_dropout=0.5", *settings), lambda name: Path(name).read_text())


def trained(config: Config, alone: World, batch: Batch, steps: int = 1) -> tuple[Trainer, Position]:
    trainer, position = Trainer(config, alone), Position(lanes=12)
    trainer.settle(position)
    for _ in range(steps):
        gradient = trainer.gradient(batch, position)
        trainer.update(position, bad=not bool(gradient.finite))
    return trainer, position


def test_a_step_trains_every_parameter(alone: World, batch: Batch) -> None:
    """Half of the network of one public trainer was never trained, its layers being kept in a plain list."""
    before = Trainer(tiny(), alone).tensors()["model"]
    after = trained(tiny(), alone, batch, steps=2)[0].tensors()["model"]
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []


@pytest.mark.parametrize("micro_batch", [1, 3, 12])
def test_the_gradient_does_not_depend_on_the_micro_batch(alone: World, batch: Batch, micro_batch: int) -> None:
    config = tiny("model.dropout=0", "train.micro_batch=4")
    other = tiny("model.dropout=0", f"train.micro_batch={micro_batch}")
    mine, theirs = (trained(c, alone, batch, steps=0)[0] for c in (config, other))
    losses = []
    for trainer, c in ((mine, config), (theirs, other)):
        losses.append(trainer.gradient(batch, Position(micro_batch=int(c.train.micro_batch))).losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(mine.model.named_parameters(), theirs.model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_is_a_function_of_its_position(alone: World, batch: Batch) -> None:
    config = tiny("model.dropout=0.3")
    once, again = (trained(config, alone, batch, steps=2)[0].tensors() for _ in range(2))
    torch.manual_seed(123)  # whatever was drawn in between
    for part, tensors in once.items():
        assert all(torch.equal(tensor, again[part][name]) for name, tensor in tensors.items())


def test_a_bad_step_changes_nothing_but_its_counters(alone: World, batch: Batch) -> None:
    trainer, position = trained(tiny(), alone, batch)
    before = {part: {k: v.clone() for k, v in tensors.items()} for part, tensors in trainer.tensors().items()}
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.inf)
    gradient = trainer.gradient(batch, position)
    assert not gradient.finite
    trainer.update(position, bad=True)
    assert (position.step, position.samples, position.bad_steps, position.ema_updates) == (2, 24, 1, 1)
    for part in ("ema", "optimizer"):
        assert all(torch.equal(tensor, before[part][name]) for name, tensor in trainer.tensors()[part].items())


def test_too_many_bad_steps_in_a_row_end_the_run(alone: World, batch: Batch) -> None:
    trainer, position = trained(tiny("train.max_bad_steps=3"), alone, batch)
    trainer.update(position, bad=True)
    trainer.gradient(batch, position)
    trainer.update(position, bad=False)
    trainer.update(position, bad=True)
    trainer.update(position, bad=True)
    with pytest.raises(ConfigError, match=r"not finite in 3 steps in a row, up to step 6: lower train\.lr"):
        trainer.update(position, bad=True)


@pytest.mark.parametrize("policy", ["none", "attention", "blocks", "full"])
def test_checkpointing_does_not_change_a_bit(alone: World, batch: Batch, policy: str) -> None:
    plain, saving = (
        trained(tiny("model.dropout=0.3", f"train.checkpointing={p}"), alone, batch)[0].tensors()
        for p in ("none", policy)
    )
    assert all(torch.equal(tensor, saving["model"][name]) for name, tensor in plain["model"].items())


def test_bf16_trains_close_to_fp32_and_keeps_float32_weights(alone: World, batch: Batch) -> None:
    gradients = []
    for precision in ("fp32", "bf16"):
        trainer, position = trained(tiny("model.dropout=0", f"train.precision={precision}"), alone, batch, steps=3)
        gradients.append(trainer.gradient(batch, position).losses)
        assert {tensor.dtype for part in trainer.tensors().values() for tensor in part.values()} == {torch.float32}
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.05, atol=0.02)
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("settings", [
    ("diffusion.schedule=cosine", "diffusion.prediction_type=v_prediction", "diffusion.loss_weighting=min_snr"),
    ("diffusion.prediction_type=sample", "model.scale_shift=true", "model.head_channels=4"),
    ("model.learned_variance=true", "model.num_classes=0"),
])  # fmt: skip
def test_every_option_learns_to_fit_one_batch(alone: World, batch: Batch, settings: tuple[str, ...]) -> None:
    config = tiny("model.dropout=0", "model.label_dropout=0", "train.lr=3e-3", "train.warmup_steps=0",
                  "train.micro_batch=12", *settings)  # fmt: skip
    trainer, position = trained(config, alone, batch, steps=0)
    position.micro_batch = 12
    losses = []
    for _ in range(60):
        gradient = trainer.gradient(batch, position)
        trainer.update(position, bad=not bool(gradient.finite))
        losses.append(float(gradient.losses.mean()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_picture_without_a_class_trains_as_unlabelled(alone: World, batch: Batch) -> None:
    unlabelled = Batch(batch.images, torch.full_like(batch.labels, -1), batch.positions)
    hidden = trained(tiny("model.label_dropout=1"), alone, batch, steps=2)[0].tensors()["model"]
    nameless = trained(tiny("model.label_dropout=0"), alone, unlabelled, steps=2)[0].tensors()["model"]
    assert all(torch.equal(tensor, nameless[name]) for name, tensor in hidden.items())
