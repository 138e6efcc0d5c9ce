"""What fits, found by trying, with a device that runs out of memory above a known limit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.training.micro_batch import CPU_MICRO_BATCH, choose_what_fits, peak_bytes, sizes_to_try

COST = {"none": 8.0, "attention": 6.0, "blocks": 2.0, "full": 1.0}
"""Memory an image takes under each policy."""


class Device:
    """Runs out above `limit`, and remembers what was tried."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.tried: list[tuple[str, int]] = []

    def fits(self, policy: str, size: int) -> bool:
        self.tried.append((policy, size))
        return COST[policy] * size <= self.limit


@pytest.fixture(autouse=True)
def _little_garbage() -> Iterator[None]:
    """Each attempt that fails collects garbage; all that the other tests have imported need not be looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


SIZES = [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1000, ("none", 16)),
        (127, ("none", 8)),  # halving once is cheaper than the next policy
        (63, ("attention", 8)),
        (47, ("blocks", 16)),
        (31, ("blocks", 8)),
        (15, ("full", 8)),
        (7.9, ("full", 4)),
        (1, ("full", 1)),
    ],
)
def test_the_first_that_fits_is_taken_halving_once_before_a_dearer_policy(
    limit: float, expected: tuple[str, int]
) -> None:
    device = Device(limit)
    assert choose_what_fits(device.fits, list(COST), SIZES) == expected
    assert device.tried[-1] == expected
    assert len(set(device.tried)) == len(device.tried)  # nothing is tried twice


def test_a_fixed_policy_tries_every_size() -> None:
    assert choose_what_fits(Device(8).fits, ["none"], SIZES) == ("none", 1)


def test_a_fixed_size_tries_every_policy() -> None:
    assert choose_what_fits(Device(16).fits, list(COST), [16]) == ("full", 16)


def test_nothing_fits_is_told_with_the_cure() -> None:
    with pytest.raises(
        ConfigError, match=r"not even micro-batch 1 with checkpointing full fits this device: set .*smaller"
    ):
        choose_what_fits(Device(0.5).fits, list(COST), SIZES)


def test_any_other_error_is_not_taken_for_lack_of_memory() -> None:
    def broken(policy: str, size: int) -> bool:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        choose_what_fits(broken, ["none", "full"], SIZES)


def test_what_a_failed_attempt_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fits(policy: str, size: int) -> bool:
        assert all(ref() is None for ref in held)
        activations = torch.zeros(size)
        activations.itself = activations  # type: ignore[attr-defined]  # as a graph of autograd, held by a cycle
        held.append(weakref.ref(activations))
        return size <= 2

    assert choose_what_fits(fits, ["full"], SIZES) == ("full", 2)
    assert len(held) == 4


@pytest.mark.parametrize("share", [1, 2, 12, 96, 97, 128])
def test_micro_batches_are_the_divisors_of_a_ranks_share(share: int) -> None:
    sizes = sizes_to_try(share, torch.device("cuda"))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == share and sizes[-1] == 1
    assert set(sizes) == {size for size in range(1, share + 1) if share % size == 0}


@pytest.mark.parametrize(("share", "size"), [(1, 1), (64, 64), (128, 64), (96, 48), (97, 1), (130, 26)])
def test_a_cpu_takes_the_largest_reasonable_one_untried(share: int, size: int) -> None:
    assert sizes_to_try(share, torch.device("cpu")) == [size]
    assert size <= CPU_MICRO_BATCH


def test_peak_memory_is_in_bytes() -> None:
    before = peak_bytes(torch.device("cpu"))
    block = torch.ones(50 << 18)  # 50 MiB, touched
    assert 20 << 20 < before < 1 << 40
    assert peak_bytes(torch.device("cpu")) >= before
    del block


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_runs_out_is_usable_at_once() -> None:
    free, _ = torch.cuda.mem_get_info()

    def fits(policy: str, size: int) -> bool:
        try:
            return bool([torch.empty(free // 16, dtype=torch.uint8, device="cuda") for _ in range(size * 3)])
        except torch.OutOfMemoryError:
            return False

    assert choose_what_fits(fits, ["none"], [16, 8, 4, 2, 1]) == ("none", 4)
