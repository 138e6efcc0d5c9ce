"""(seed, id, use, step) → uniforms, normals: the only source of randomness.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is counter-based: each number is a
pure function of seed, id, use and step. It does not depend on rank, batch, world size or earlier draws, and checkpoints
store no random state. Counter words: element block, use and step, id low, id high; the key is the seed. The integers
are equal on every device, the normals up to rounding.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Use(IntEnum):
    """The purpose of a number; each has its own stream. Never change a value: that would change every run."""

    TIMESTEP = 1
    NOISE = 2
    FLIP = 3
    LABEL_DROPOUT = 4
    SHARD_ORDER = 5
    LANE_ORDER = 6
    SAMPLE_START = 7
    SAMPLE_STEP = 8
    VALIDATION_TIMESTEP = 9
    VALIDATION_NOISE = 10
    SHARDING_CROP = 11
    LIKELIHOOD = 12
    EVALUATION_GROUP = 13


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute one Philox4x32-10 block for each element.

    Args:
        counter: four int64 tensors that broadcast together, each holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap to the low 64 bits of the unsigned product, so shift and mask recover both halves.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32 & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _draw(seed: int, ids: Tensor, step: int, *streams: tuple[Use, int]) -> tuple[tuple[Tensor, ...], ...]:
    """Philox words of each id, for several (use, number of blocks): four int64 tensors, (B, blocks), for each stream.

    All streams share one pass, which is about a hundred small kernels on a GPU; nothing is copied to the device.
    """
    if not 0 <= seed < 1 << 64 or not 0 <= step < 1 << 24:
        raise ValueError(f"seed {seed} or step {step} out of range")
    blocks, device = [blocks for _, blocks in streams], ids.device
    block = torch.cat([torch.arange(count, dtype=torch.int64, device=device) for count in blocks])
    stream = torch.cat(
        [torch.full((count,), use << 24 | step, dtype=torch.int64, device=device) for use, count in streams]
    )
    ids = ids.to(torch.int64)[:, None]
    words = philox((block, stream, ids & _MASK32, ids >> 32 & _MASK32), (seed & _MASK32, seed >> 32))
    return tuple(zip(*(torch.split(word, blocks, dim=1) for word in words), strict=True))


def uniforms(seed: int, ids: Tensor, use: Use, shape: tuple[int, ...] = (), step: int = 0) -> Tensor:
    """Numbers in [0, 1) with 53 random bits.

    Args:
        seed: the run's seed, 0 ≤ seed < 2⁶⁴.
        ids: int64, (B,): sample positions or sample seeds.
        use: the stream.
        shape: shape of the numbers for each id.
        step: timestep or epoch, below 2²⁴.

    Returns:
        float64, (B, *shape), on the device of `ids`.
    """
    (words,) = _draw(seed, ids, step, (use, (math.prod(shape) + 1) // 2))
    return _as_uniforms(words, shape)


def normals(seed: int, ids: Tensor, use: Use, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Standard normal numbers by Box–Muller, computed in float64 so that devices differ by rounding only.

    Args:
        seed: as for `uniforms`.
        ids: int64, (B,).
        use: the stream.
        shape: shape of the numbers for each id.
        step: timestep, below 2²⁴.

    Returns:
        float32, (B, *shape), on the device of `ids`.
    """
    (words,) = _draw(seed, ids, step, (use, (math.prod(shape) + 3) // 4))
    return _as_normals(words, shape)


def integers(seed: int, ids: Tensor, use: Use, high: int) -> Tensor:
    """Integers in [0, high), int64, (B,); `high` below 2³¹; the bias is below high·2⁻³²."""
    (words,) = _draw(seed, ids, 0, (use, 1))
    return _as_integers(words, high)


def training_draws(seed: int, ids: Tensor, timesteps: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of a training step, in one pass: the same numbers as from three calls.

    Returns:
        `integers` of TIMESTEP below `timesteps`, `normals` of NOISE, and `uniforms` of LABEL_DROPOUT.
    """
    noise = (Use.NOISE, (math.prod(shape) + 3) // 4)
    t, epsilon, label_dropout = _draw(seed, ids, 0, (Use.TIMESTEP, 1), noise, (Use.LABEL_DROPOUT, 1))
    return _as_integers(t, timesteps), _as_normals(epsilon, shape), _as_uniforms(label_dropout, ())


def _as_uniforms(words: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    w0, w1, w2, w3 = words
    high, low = torch.stack((w0, w2), -1), torch.stack((w1, w3), -1)
    bits = (high << 21) | (low >> 11)
    return (bits.to(torch.float64) * 2.0**-53).flatten(1)[:, : math.prod(shape)].reshape(len(w0), *shape)


def _as_normals(words: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    u = [(word.to(torch.float64) + 0.5) * 2.0**-32 for word in words]
    pairs = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r, phi = torch.sqrt(-2 * torch.log(radius)), 2 * math.pi * angle
        pairs += [r * torch.cos(phi), r * torch.sin(phi)]
    return torch.stack(pairs, -1).to(torch.float32).flatten(1)[:, : math.prod(shape)].reshape(len(words[0]), *shape)


def _as_integers(words: tuple[Tensor, ...], high: int) -> Tensor:
    return (words[0][:, 0] * high) >> 32


def seed_from(*parts: int) -> int:
    """A 63-bit seed for `torch.manual_seed` from several integers, equal for all Python runs and versions."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
