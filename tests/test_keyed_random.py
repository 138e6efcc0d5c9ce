"""Keyed noise: the published generator, and numbers that depend on their coordinates alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.keyed_random import Use, integers, normals, philox, seed_from, training_draws, uniforms

# Golden values, made with this module once its known answers held.
UNIFORMS = [
    [5957268831736272, 8857898922309610, 186917009420944],
    [5783621206192444, 5812221164600382, 7871092606121107],
]
INTEGERS = [465, 942]
NORMALS = [
    [-0.7736342549324036, -0.4162340462207794, 1.1858551502227783, -0.5393447875976562, -0.17342710494995117],
    [-1.7930856943130493, -1.2060973644256592, 1.2303746938705444, -0.3460349142551422, 0.6805984377861023],
]
MIXED = [4761921975702974394, 8149998584550362645]

WORD = st.integers(0, 2**32 - 1)


def reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al. 2011 in unbounded integers, round by round."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for i in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        x, y = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (b // 2**32) ^ c1 ^ x, b % 2**32, (a // 2**32) ^ c3 ^ y, a % 2**32
    return c0, c1, c2, c3


def words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return tuple(int(word) for word in philox((c0, c1, c2, c3), key))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, https://github.com/DEShawResearch/random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_known_answers(counter, key, expected) -> None:
    assert words(counter, key) == expected == reference(counter, key)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_philox_in_wrapping_int64_is_philox_in_unbounded_integers(counter, key) -> None:
    assert words(counter, key) == reference(counter, key)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.sampled_from(Use), st.integers(0, 2**24 - 1), st.integers(0, 9)
)
def test_coordinates_fill_the_counter_as_documented(seed: int, id: int, use: Use, step: int, element: int) -> None:
    """Words: element block, use and step, id low, id high; key: the seed. 53 bits are 32 and the top 21 of the next."""
    counter = (element // 2, use * 2**24 + step, id % 2**32, id // 2**32)
    block = reference(counter, (seed % 2**32, seed // 2**32))
    high, low = block[0:2] if element % 2 == 0 else block[2:4]
    got = uniforms(seed, torch.tensor([id]), use, (10,), step)
    assert got.dtype == torch.float64
    assert got[0, element].item() == (high * 2**21 + low // 2**11) / 2**53


@pytest.mark.parametrize("draw", [uniforms, normals])
def test_a_number_does_not_depend_on_batch_or_order(draw) -> None:
    ids = torch.tensor([5, 2**32 + 5, 0, 2**40 + 1, 7, 2**62])
    together = draw(3, ids, Use.NOISE, (3, 5, 7), 11)
    assert together.shape == (6, 3, 5, 7)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(draw(3, ids[order], Use.NOISE, (3, 5, 7), 11), together[order])
    for i, id in enumerate(ids):
        assert torch.equal(draw(3, id[None], Use.NOISE, (3, 5, 7), 11)[0], together[i])
    assert len({row.numpy().tobytes() for row in together}) == 6  # ids beyond 2**32 are ids of their own


@pytest.mark.parametrize("threads", [2, 5])
def test_normals_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    ids, shape = torch.arange(24), (3, 32, 33)
    try:
        torch.set_num_threads(1)
        alone = normals(1, ids, Use.NOISE, shape)
        torch.set_num_threads(threads)
        assert torch.equal(normals(1, ids, Use.NOISE, shape), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 4)])
def test_what_a_step_draws_together_is_what_three_draws_give(shape: tuple[int, ...]) -> None:
    ids = torch.tensor([5, 2**32 + 5, 0, 2**62])
    t, noise, dropout_draw = training_draws(3, ids, 1000, shape)
    assert torch.equal(t, integers(3, ids, Use.TIMESTEP, 1000))
    assert torch.equal(noise, normals(3, ids, Use.NOISE, shape))
    assert torch.equal(dropout_draw, uniforms(3, ids, Use.LABEL_DROPOUT))


def test_nothing_is_drawn_from_or_left_in_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = normals(0, torch.arange(4), Use.NOISE, (5,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(normals(0, torch.arange(4), Use.NOISE, (5,)), first)


def test_normals_are_standard_normal() -> None:
    x = normals(7, torch.arange(256), Use.NOISE, (1024,)).flatten().double().sort().values
    n = len(x)
    assert x.dtype == torch.float64
    for power, moment in enumerate([0, 1, 0, 3, 0, 15], start=1):
        sigma = math.sqrt(math.prod(range(1, 2 * power, 2)) / n)  # the variance of x**k is at most E x**2k = (2k-1)!!
        assert abs((x**power).mean().item() - moment) < 4.5 * sigma, f"moment {power}"
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    gap = (cdf - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert gap < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001
    assert normals(0, torch.arange(2), Use.NOISE, (3,)).dtype == torch.float32


def test_normals_are_box_muller_to_the_last_bit_of_float32() -> None:
    """Radius and angle from pairs of words, each the middle of its 2**-32: devices differ by a rounding at most."""
    ids, count = [0, 3, 2**33 + 1], 4096
    got = normals(9, torch.tensor(ids), Use.NOISE, (count,), 2)
    for row, id in zip(got, ids):
        for block in range(0, count // 4, 7):
            u = [
                (word + 0.5) / 2**32
                for word in reference((block, Use.NOISE * 2**24 + 2, id % 2**32, id // 2**32), (9, 0))
            ]
            for pair in (0, 2):
                radius, angle = math.sqrt(-2 * math.log(u[pair])), 2 * math.pi * u[pair + 1]
                exact = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)], dtype=torch.float64)
                shown = row[4 * block + pair : 4 * block + pair + 2].double()
                assert ((shown - exact).abs() <= exact.abs() * 2**-23 + 1e-15).all()


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    u = uniforms(7, torch.arange(512), Use.FLIP, (512,)).flatten()
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    chi2 = ((counts - len(u) / 64) ** 2 / (len(u) / 64)).sum().item()
    assert 27 < chi2 < 119  # 63 degrees of freedom, p = 1e-5 on either side
    low_bits = (u * 2**53).to(torch.int64) & 1
    assert abs(low_bits.double().mean().item() - 0.5) < 4.5 * 0.5 / math.sqrt(len(u))


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 2**31 - 1])
def test_integers_are_even_and_in_range(high: int) -> None:
    t = integers(3, torch.arange(100_000), Use.TIMESTEP, high)
    assert t.dtype == torch.int64 and t.shape == (100_000,)
    assert int(t.min()) >= 0 and int(t.max()) < high
    assert abs(t.double().mean().item() / high - 0.5 * (high - 1) / high) < 4.5 / math.sqrt(12 * 100_000)
    if high <= 1000:
        assert len(t.unique()) == high


def test_streams_are_unrelated() -> None:
    """Neighbours in seed, id, use and step share nothing, nor do neighbours within a stream."""
    n = 1 << 14
    draw = lambda seed=0, id=0, use=Use.NOISE, step=0: normals(seed, torch.tensor([id]), use, (n,), step)[0].double()  # noqa: E731
    streams = [draw(), draw(seed=1), draw(seed=2**32), draw(id=1), draw(id=2**32), draw(step=1), draw(id=1, step=1)]
    streams += [draw(use=use) for use in Use if use != Use.NOISE]
    streams += [draw().roll(1), draw().roll(2), draw().roll(4)]
    correlation = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_streams_are_frozen() -> None:
    """Golden values: changing one changes every run that goes on after an upgrade."""
    assert [(use.name, use.value) for use in Use] == [
        ("TIMESTEP", 1), ("NOISE", 2), ("FLIP", 3), ("LABEL_DROPOUT", 4), ("SHARD_ORDER", 5), ("LANE_ORDER", 6),
        ("SAMPLE_START", 7), ("SAMPLE_STEP", 8), ("VALIDATION_TIMESTEP", 9), ("VALIDATION_NOISE", 10),
        ("SHARDING_CROP", 11), ("LIKELIHOOD", 12), ("EVALUATION_GROUP", 13),
    ]  # fmt: skip
    ids = torch.tensor([0, 123_456_789_012])
    assert (uniforms(42, ids, Use.FLIP, (3,), 5) * 2**53).to(torch.int64).tolist() == UNIFORMS
    assert integers(42, ids, Use.TIMESTEP, 1000).tolist() == INTEGERS
    expected = torch.tensor(NORMALS)
    torch.testing.assert_close(normals(42, ids, Use.NOISE, (5,), 7), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**24)])
def test_coordinates_that_would_collide_are_refused(seed: int, step: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        uniforms(seed, torch.tensor([0]), Use.FLIP, (), step)


def test_seed_from_is_the_same_in_every_interpreter() -> None:
    code = "from pipeline.keyed_random import seed_from; print(seed_from(0), seed_from(1, 2, 3))"
    env = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(value) for value in MIXED] == [str(seed_from(0)), str(seed_from(1, 2, 3))]


def test_seed_from_separates_its_parts() -> None:
    """`seed + epoch` would give epoch 1 of seed 0 the order of epoch 0 of seed 1."""
    seen = {seed_from(a, b) for a in range(40) for b in range(40)}
    assert len(seen) == 1600
    assert len({seed_from(1, 23), seed_from(12, 3), seed_from(123), seed_from(1, 2, 3), seed_from(-1, 23)}) == 5
    assert all(0 <= value < 2**63 for value in seen)
    torch.manual_seed(max(seen))
