"""A step of training: what it changes, what it must not depend on, and what it refuses."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pipeline import config_file
from pipeline.cluster import world
from pipeline.cluster.world import PendingVote, World
from pipeline.config import Config
from pipeline.data.loading.batches import Batch, read_all
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, Diverged
from pipeline.model.blocks import Attention, ResidualBlock
from pipeline.model.unet import UNet
from pipeline.monitoring.meter import Meter
from pipeline.training.trainer import Trainer
from tests.launch import TINY

SMALL_PREVIEW = ("run.preview_samples=4", "run.preview_steps=3")


@pytest.fixture(scope="module")
def alone() -> World:
    return world.init_distributed("cpu", 60)


@pytest.fixture
def batch(digits: Path) -> Batch:
    return read_all(ShardSet.open(str(digits)), 12)


def tiny(*settings: str) -> Config:
    return config_file.load(TINY[1], ("model.label_dropout=0.5", *settings), lambda name: Path(name).read_text())


def trained(config: Config, alone: World, batch: Batch, steps: int = 1) -> Trainer:
    trainer = Trainer(config, alone)
    trainer.choose_micro_batch()
    for _ in range(steps):
        take_step(trainer, batch)
    return trainer


def take_step(trainer: Trainer, batch: Batch, *, bad: bool = False) -> Tensor:
    """Take a step, or a bad one; its losses."""
    gradient = trainer.gradient(batch)
    trainer.finish_step(replace(gradient, finite=gradient.finite & (not bad)))
    return gradient.losses


def copied(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    return {part: {k: v.clone() for k, v in tensors.items()} for part, tensors in trainer.tensors().items()}


def assert_same(parts: dict[str, dict[str, Tensor]], others: dict[str, dict[str, Tensor]]) -> None:
    for part, tensors in parts.items():
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[part][name])] == []


def test_a_step_trains_every_parameter(alone: World, batch: Batch) -> None:
    """Half of the network of one public trainer was never trained, its layers being kept in a plain list."""
    before = Trainer(tiny(), alone).tensors()["model"]
    after = trained(tiny(), alone, batch, steps=2).tensors()["model"]
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []


@pytest.mark.parametrize("micro_batch", [1, 3, 12])
def test_the_gradient_does_not_depend_on_the_micro_batch(alone: World, batch: Batch, micro_batch: int) -> None:
    configs = [tiny("model.dropout=0", f"train.micro_batch={size}") for size in (4, micro_batch)]
    first, second = (trained(config, alone, batch, steps=0) for config in configs)
    losses = [trainer.gradient(batch).losses for trainer in (first, second)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_is_a_function_of_its_position(alone: World, batch: Batch) -> None:
    config = tiny("model.dropout=0.3")
    once, again = (trained(config, alone, batch, steps=2).tensors() for _ in range(2))
    torch.manual_seed(123)  # whatever was drawn in between
    for part, tensors in once.items():
        assert all(torch.equal(tensor, again[part][name]) for name, tensor in tensors.items())


def test_a_bad_step_changes_nothing_but_its_counters(alone: World, batch: Batch) -> None:
    trainer = trained(tiny(), alone, batch)
    before = copied(trainer)
    gradient = trainer.gradient(batch)
    next(trainer.model.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
    assert trainer.finish_step(replace(gradient, finite=torch.tensor(False))).bad == 1
    state = trainer.state
    assert (state.step, state.samples, state.bad_steps, state.ema_updates) == (2, 24, 1, 1)
    assert_same(copied(trainer), before)
    assert gradient.finite


def test_a_step_is_bad_if_a_weight_or_a_loss_is_not_finite(alone: World, batch: Batch) -> None:
    trainer = trained(tiny(), alone, batch)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.inf)
    assert not trainer.gradient(batch).finite


def test_a_bad_step_in_between_leaves_the_good_ones_as_they_were(alone: World, batch: Batch) -> None:
    """Adam counts its own steps for the correction of its moments, and the average its updates for its warm-up."""
    settings = ("train.warmup_steps=0", "train.ema_decay=0.99")
    plain = trained(tiny(*settings), alone, batch, steps=0)
    bumpy = trained(tiny(*settings), alone, batch, steps=0)
    for i in range(4):
        if i == 2:
            take_step(bumpy, batch, bad=True)
            bumpy.state.step -= 1  # dropout is keyed by the step
        take_step(plain, batch)
        take_step(bumpy, batch)
    assert (bumpy.state.bad_steps, bumpy.state.bad_in_a_row, bumpy.state.ema_updates) == (1, 0, 4)
    assert_same(copied(plain), copied(bumpy))


def test_an_average_on_the_host_changes_no_bit(alone: World, batch: Batch) -> None:
    """Nor does a bad step: the host computes the update of a step when the gradient of the next one is there."""
    beside = trained(tiny(*SMALL_PREVIEW), alone, batch, steps=0)
    away = trained(tiny("train.ema_device=cpu", *SMALL_PREVIEW), alone, batch, steps=0)
    for bad in (False, False, True, False):
        take_step(beside, batch, bad=bad)
        take_step(away, batch, bad=bad)
    assert away.state == beside.state and away.state.ema_updates == 3
    assert_same(copied(beside), copied(away))
    before = copied(away)
    assert away.validation_loss(batch) == beside.validation_loss(batch)
    assert np.array_equal(away.preview(), beside.preview())
    assert_same(copied(away), before)


def test_the_copy_of_an_average_on_the_host_does_not_outlive_its_use(alone: World, batch: Batch) -> None:
    def networks() -> int:
        return sum(type(thing) is UNet for thing in gc.get_objects())

    trainer = trained(tiny("train.ema_device=cpu", *SMALL_PREVIEW), alone, batch)
    gc.collect()
    gc.disable()
    try:
        before = networks()
        trainer.validation_loss(batch)
        trainer.preview()
        assert networks() == before
        assert trainer.ema.network() is not trainer.ema.ema_model  # also where the host is the device
    finally:
        gc.enable()


def test_finish_step_returns_the_highest_vote_of_each_kind(alone: World, batch: Batch) -> None:
    trainer = trained(tiny(), alone, batch)
    assert trainer.finish_step(trainer.gradient(batch), stop=5, lost=True) == (0, 5, 1)
    assert trainer.state.ema_updates == 2


def test_too_many_bad_steps_in_a_row_end_the_run(alone: World, batch: Batch) -> None:
    trainer = trained(tiny("train.max_bad_steps=3"), alone, batch)
    for bad in (True, False, True, True):
        take_step(trainer, batch, bad=bad)
    with pytest.raises(Diverged, match=r"not finite in 3 steps in a row, up to step 6: lower train\.lr"):
        take_step(trainer, batch, bad=True)


@pytest.mark.parametrize("settings", [
    (), ("train.precision=bf16", "train.micro_batch=3"), ("model.num_classes=0", "train.ema_device=cpu"),
    ("model.learned_variance=true", "train.checkpointing=full", "model.dropout=0.3"),
])  # fmt: skip
def test_to_look_whether_weights_are_sound_changes_no_bit(
    alone: World, batch: Batch, settings: tuple[str, ...]
) -> None:
    plain = trained(tiny(*settings), alone, batch, steps=2)
    looked = trained(tiny(*settings), alone, batch, steps=0)
    for _ in range(2):
        assert looked.is_sound()
        take_step(looked, batch)
    assert looked.is_sound() and looked.state == plain.state
    assert_same(copied(looked), copied(plain))
    assert all(parameter.grad is None for parameter in looked.model.parameters())


@pytest.mark.parametrize(("part", "value"), [
    ("model", torch.nan), ("model", torch.inf), ("model", 1e30), ("ema", torch.nan), ("ema", -torch.inf),
])  # fmt: skip
def test_weights_that_no_step_can_follow_from_are_not_sound(
    alone: World, batch: Batch, part: str, value: float
) -> None:
    trainer = trained(tiny(), alone, batch)
    weights = trainer.tensors()[part]
    for tensor in weights.values():
        if np.isfinite(value):
            tensor.mul_(value)
    if not np.isfinite(value):
        weights["class_embedding.weight"][7, 0] = value  # of a class that not every batch has
    assert not trainer.is_sound()


@pytest.mark.parametrize("policy", ["full"])  # plain ones are compiled in tests/sampling and tests/model
def test_compiled_blocks_train_as_others_and_each_kind_is_compiled_once(
    alone: World, batch: Batch, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Without the code generator, which takes most of a minute here; what is traced and cut is the same.

    Without dropout: with torch 2.14 a compiled block drops other pixels than a plain one.
    """
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    settings: tuple[str, ...] = ("model.dropout=0", "model.blocks_per_level=2", "model.channel_mults=[1, 2, 3]")
    settings += (f"train.checkpointing={policy}",)
    plain = trained(tiny(*settings), alone, batch, steps=2)
    torch._dynamo.reset()
    counters.clear()
    settings += ("sample.compile=true", "run.preview_samples=2", "run.preview_steps=2")
    compiled = trained(tiny("train.compile=true", *settings), alone, batch, steps=2)
    blocks = sum(isinstance(module, ResidualBlock | Attention) for module in compiled.model.modules())
    assert 0 < counters["stats"]["unique_graphs"] < blocks
    assert counters["frames"]["ok"] == counters["frames"]["total"] and not counters["graph_break"]
    assert compiled.tensors().keys() == plain.tensors().keys()
    for part, tensors in plain.tensors().items():
        assert tensors.keys() == compiled.tensors()[part].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(compiled.tensors()[part][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    before = counters["stats"]["unique_graphs"]
    compiled.validation_loss(batch)
    compiled.preview()
    take_step(compiled, batch)
    assert counters["stats"]["unique_graphs"] == before  # the average is not compiled, nor anything twice


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a number, shapes that depend on values, copies of lists."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if masks or name in {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh"}:
            raise AssertionError(f"{func} in a step: a GPU would be waited for")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [
    (), ("model.num_classes=0",), ("train.checkpointing=full",), ("train.precision=bf16",),
    ("model.learned_variance=true", "diffusion.loss_weighting=min_snr"), ("train.ema_device=cpu",),
])  # fmt: skip
def test_a_step_waits_for_the_device_once_to_read_its_vote(
    alone: World, batch: Batch, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tiny("model.dropout=0.3", *settings), alone, batch)
    meter = Meter(100, alone.device, trainer.flops)
    waits, read = [], PendingVote.read

    def read_once(vote: PendingVote) -> list[int]:
        waits.append(vote)
        with _disable_current_modes():
            return read(vote)

    def unwatched(method: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            with _disable_current_modes():  # the average reads its own counters, which stay on the CPU
                method()

        return call

    monkeypatch.setattr(PendingVote, "read", read_once)
    for name in ("update", "flush"):
        monkeypatch.setattr(trainer.ema, name, unwatched(getattr(trainer.ema, name)))
    with _NoWaiting():
        gradient = trainer.gradient(batch)
        assert trainer.finish_step(gradient).bad == 0
        assert len(waits) == 1
        meter.add(gradient.losses, gradient.t, gradient.norm)
        with pytest.raises(AssertionError, match="waited for"):
            gradient.finite.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ema_device", ["same", "cpu"])
def test_a_step_waits_for_the_gpu_once_for_its_vote(batch: Batch, ema_device: str) -> None:
    gpu = world.init_distributed("cuda", 60)
    config = tiny("model.dropout=0.3", "train.device=cuda", f"train.ema_device={ema_device}")
    trainer = trained(config, gpu, batch, steps=2)
    pinned = Batch(batch.images.pin_memory(), batch.labels, batch.positions)
    meter = Meter(100, gpu.device, trainer.flops)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with meter.waiting():
                pass
            gradient = trainer.gradient(pinned)
            trainer.finish_step(gradient)  # waits for an event, which the debug mode does not count
            meter.add(gradient.losses, gradient.t, gradient.norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (trainer.state.step, trainer.state.ema_updates) == (5, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_average_on_the_host_takes_no_memory_of_the_gpu_and_is_the_same(batch: Batch) -> None:
    settings = ("train.device=cuda", "train.deterministic=true", *SMALL_PREVIEW)
    gpu, bytes_held, parts = world.init_distributed("cuda", 60), [], []
    for ema_device in ("same", "same", "cpu"):  # the first also makes cuBLAS's workspace, which stays
        before = torch.cuda.memory_allocated()
        trainer = trained(tiny(*settings, f"train.ema_device={ema_device}"), gpu, batch, steps=5)
        trainer.validation_loss(batch)
        trainer.preview()
        bytes_held.append(torch.cuda.memory_allocated() - before)
        parts.append(copied(trainer))
        average = parts[-1]["ema"].values()
        del trainer
        gc.collect()
    assert {tensor.device.type for tensor in average} == {"cpu"}
    assert bytes_held[1] - bytes_held[2] >= sum(tensor.nbytes for tensor in average)
    for name, tensor in parts[1]["ema"].items():
        torch.testing.assert_close(parts[2]["ema"][name], tensor.cpu(), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("policy", ["none", "attention", "blocks", "full"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_checkpointing_does_not_change_a_bit(alone: World, batch: Batch, policy: str, micro_batch: int) -> None:
    settings = ("model.dropout=0.3", f"train.micro_batch={micro_batch}")
    plain, saving = (
        trained(tiny(*settings, f"train.checkpointing={p}"), alone, batch).tensors() for p in ("none", policy)
    )
    assert all(torch.equal(tensor, saving["model"][name]) for name, tensor in plain["model"].items())


def test_bf16_trains_close_to_fp32_and_keeps_float32_weights(alone: World, batch: Batch) -> None:
    gradients = []
    for precision in ("fp32", "bf16"):
        trainer = trained(tiny("model.dropout=0", f"train.precision={precision}"), alone, batch, steps=3)
        gradients.append(trainer.gradient(batch).losses)
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
    trainer = trained(config, alone, batch, steps=0)
    trainer.state.micro_batch = 12
    losses = []
    for _ in range(60):
        losses.append(float(take_step(trainer, batch).mean()))
    assert losses[-1] < 0.5 * losses[0]


def test_an_image_without_a_class_trains_as_unlabelled(alone: World, batch: Batch) -> None:
    unlabelled = Batch(batch.images, torch.full_like(batch.labels, -1), batch.positions)
    hidden = trained(tiny("model.label_dropout=1"), alone, batch, steps=2).tensors()["model"]
    nameless = trained(tiny("model.label_dropout=0"), alone, unlabelled, steps=2).tensors()["model"]
    assert all(torch.equal(tensor, nameless[name]) for name, tensor in hidden.items())


def test_a_network_larger_than_any_memory_is_refused(alone: World) -> None:
    with pytest.raises(ConfigError, match="memory is too small for the weights of the network: lower"):
        Trainer(tiny("model.base_channels=1000000000000"), alone)
