"""What is counted without memory is what a real step takes."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Config
from pipeline.model.unet import Checkpointing
from pipeline.training import memory_estimate
from pipeline.training.memory_estimate import (
    POLICIES,
    Footprint,
    Step,
    StorageTracker,
    count,
    imitate_cuda,
    trace,
    update_bytes,
)

TINY: dict[str, dict[str, object]] = {
    "data": {"size": 16},
    "model": {"base_channels": 32, "channel_mults": [1, 2], "attention_sizes": [8], "num_classes": 3},
    "train": {"precision": "bf16"},
}


def _config(**sections: dict[str, object]) -> Config:
    merged = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {*TINY, *sections}}
    return Config.model_validate(merged)


_WIDE = _config(data={"size": 4}, model={"base_channels": 128, "attention_sizes": []})


@cache
def _tiny() -> dict[Checkpointing, Footprint]:
    return trace(_config())


@cache
def _wide() -> dict[Checkpointing, Footprint]:
    """The first and the last policy only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_estimate, "POLICIES", ("none", "full"))
        return trace(_WIDE)


@cache
def _paper(size: int) -> Footprint:
    """The first policy only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_estimate, "POLICIES", ("none",))
        return trace(Config.model_validate({"data": {"size": size}}))["none"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fake_step_has_the_memory_and_flops_of_a_real_one(policy: Checkpointing) -> None:
    """After each operation, to the byte: activations, gradients, transients, beside weights, moments and average."""

    def counts() -> memory_estimate.Counts:
        step = Step(_config())
        step.network.checkpointing = policy
        return count(step, 2)

    real = counts()
    with FakeTensorMode():
        fake = counts()
    assert fake == real
    assert len(real.live) > 500 and sum(real.gradients) > 0


def test_the_end_of_a_fake_step_has_the_memory_of_a_real_one() -> None:
    with FakeTensorMode():
        fake = update_bytes(Step(_config()))
    step = Step(_config())
    assert update_bytes(step) == fake
    held = sum(tensor.nbytes for tensor in step.persistent())
    gradients = sum(parameter.nbytes for parameter in step.network.parameters())
    assert held + gradients <= fake < held + 1.1 * gradients
    assert held == pytest.approx(4 * gradients, rel=0.001)  # weights, average, two moments


def test_an_average_on_the_host_is_not_counted() -> None:
    (config, network), on_gpu = (_config(train={"ema_device": "cpu"}), Step(_config()).network), _tiny()["none"]
    weights = sum(parameter.nbytes for parameter in network.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_estimate, "POLICIES", ("none",))
        on_host = trace(config)["none"]
    for accumulating in (False, True):
        for batch in (1, 64):
            peaks = (each.peak_bytes(batch, accumulating=accumulating) for each in (on_gpu, on_host))
            assert next(peaks) - next(peaks) == weights
    assert (on_host.saved_bytes(5), on_host.flops) == (on_gpu.saved_bytes(5), on_gpu.flops)


def test_what_is_saved_is_what_autograd_says_it_saves() -> None:
    step = Step(_config())
    held = {tensor.untyped_storage().data_ptr() for tensor in step.persistent()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss(6)
    kept = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in held)
    assert kept == pytest.approx(count(step, 6).saved - loss.nbytes, rel=0.001)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_batch_takes_what_two_small_ones_foretell(policy: Checkpointing) -> None:
    """Peaks too, although what is the highest point of a step changes with the batch."""
    with FakeTensorMode(), imitate_cuda():
        step = Step(_config())
        step.network.checkpointing = policy
        counted, told = count(step, 64), _tiny()[policy]
    assert told.saved_bytes(64) == counted.saved
    assert told.peak_bytes(64, accumulating=False) == max(*counted.live, told._update)
    assert (told.forward_flops * 64, told.flops * 64) == (counted.forward_flops, counted.flops)


def test_a_second_micro_batch_takes_what_the_first_foretells(policy: Checkpointing = "full") -> None:
    """It finds gradients, and adds to them: for a moment one of them is there twice, which is the peak of wide nets."""
    for config, told in ((_config(), _tiny()), (_WIDE, _wide())):
        with FakeTensorMode(), imitate_cuda():
            step = Step(config)
            step.network.checkpointing = policy
            for batch in (2, 64):
                torch.autograd.backward(step.loss(batch))
                with StorageTracker([*step.persistent(), *step.gradients()]) as tracker:
                    torch.autograd.backward(step.loss(batch))
                assert told[policy].peak_bytes(batch, accumulating=True) == max(tracker.timeline)
                step.drop_gradients()


def test_group_norm_is_counted_as_cuda_does_it() -> None:
    """The copy that is not channels-last is made in the forward pass and when a checkpoint runs it again."""

    def counted(norm: Callable[[Tensor], Tensor], batch: Tensor) -> tuple[int, int]:
        with StorageTracker() as tracker:
            result = norm(batch)
            passed = tracker.live
            torch.autograd.backward(result.sum())
        return passed, max(tracker.timeline)

    with FakeTensorMode():
        norm, batch = torch.nn.GroupNorm(4, 32), torch.empty(2, 32, 8, 8).to(memory_format=torch.channels_last)
        again = partial(checkpoint, norm, use_reentrant=False)
        plain, plain_again = counted(norm, batch), counted(again, batch)
        with imitate_cuda():
            copied, copied_again = counted(norm, batch), counted(again, batch)
    assert copied[0] - plain[0] == batch.nbytes
    assert copied_again[0] == plain_again[0] and copied_again[1] - plain_again[1] >= batch.nbytes
    assert torch.nn.functional.group_norm.__name__ == "group_norm"


def test_convolutions_are_counted_as_cuda_does_them() -> None:
    """They work channels-last if the weights are so, and turn round what is not, forward and backward."""
    with FakeTensorMode():
        weight = torch.empty(8, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
        straight = torch.empty(2, 8, 16, 16, requires_grad=True)
        takes = {}
        for turned in (False, True):
            with StorageTracker() as tracker:
                x = straight.to(memory_format=torch.channels_last) if turned else straight
                result = torch.nn.functional.conv2d(x, weight, padding=1)
                forward = tracker.timeline[-1] - tracker.live
                gradient = torch.ones(result.shape)
                before = tracker.live
                torch.autograd.grad(result, (x, weight), gradient)
            takes[turned] = forward, max(tracker.timeline) - before - straight.nbytes - weight.nbytes
    assert takes[True] == (0, gradient.nbytes)
    assert takes[False] == (straight.nbytes, gradient.nbytes + straight.nbytes)


def test_more_images_take_more_and_more_checkpointing_keeps_less() -> None:
    for batch in (1, 4, 16, 64):
        saved = [_tiny()[policy].saved_bytes(batch) for policy in POLICIES]
        assert saved == sorted(saved, reverse=True)
    for told in _tiny().values():
        for accumulating in (False, True):
            peaks = [told.peak_bytes(batch, accumulating=accumulating) for batch in (1, 4, 16, 64)]
            assert peaks == sorted(set(peaks))
            assert peaks[-1] > told.saved_bytes(64)
    none, *others = (_tiny()[policy].flops for policy in POLICIES)
    assert all(none < flops <= 1.35 * none for flops in others)


@pytest.mark.parametrize(("size", "gflop"), [(32, 12.4)])
def test_the_papers_network_takes_the_flops_that_are_known(size: int, gflop: float) -> None:
    """Multiplications and additions of a forward pass count as two."""
    told = _paper(size)
    assert told.forward_flops / 1e9 == pytest.approx(gflop, rel=0.005)
    assert told.flops / told.forward_flops == pytest.approx(3, abs=0.05)


def test_flops_are_those_of_torchs_own_counter() -> None:
    with FakeTensorMode(), imitate_cuda():
        step = Step(_config())
        with FlopCounterMode(display=False) as counter:
            step.loss(4).backward()  # type: ignore[no-untyped-call]
    attention = _attention_flops(step, 4)
    assert counter.get_total_flops() == 4 * _tiny()["none"].flops - attention  # it does not know the CPU's attention


def _attention_flops(step: Step, batch: int) -> int:
    """Of the scores and of what is done with them: 2 products forward, 5 backward, 2·N²·C each."""
    layers = sum(type(module).__name__ == "Attention" for module in step.network.modules())
    return layers * batch * 7 * 2 * 64**2 * 64


def test_attention_never_holds_all_scores() -> None:
    """At 32x32 positions N·N scores of an image would be 2 MiB in 16 bits; all else of it is smaller."""
    config = _config(data={"size": 32}, model={"attention_sizes": [32], "channel_mults": [1]})
    with FakeTensorMode(), imitate_cuda():
        step = Step(config)
        with _largest() as sizes:
            step.loss(2).backward()  # type: ignore[no-untyped-call]
    assert max(sizes) < 2 * 1024**2 * 2


@contextmanager
def _largest() -> Iterator[list[int]]:
    sizes: list[int] = []

    class Sizes(StorageTracker):  # type: ignore[no-untyped-call]
        def _track(self, tensor: Tensor) -> None:
            sizes.append(tensor.untyped_storage().nbytes())

    with Sizes():
        yield sizes


def test_no_memory_is_taken() -> None:
    """A step on four images of this size would take 5 GiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _paper(128).peak_bytes(4, accumulating=True) > 2**30
    assert _paper(256).peak_bytes(4, accumulating=True) > 5 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
