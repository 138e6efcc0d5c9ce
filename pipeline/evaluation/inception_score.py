"""Inception score: exp E KL(p(y|x) ‖ p(y)), from the logits of a classifier. Pure; float64.

Salimans et al. 2016, arXiv:1606.03498, section 4, over all samples at once instead of ten splits: with few samples p(y)
follows them and the score is too low (Chong and Forsyth 2020, arXiv:1911.07023).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import exp

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.intervals import Figure, around, jackknife_variance

_BLOCK = 4096


def inception_score(logits: NDArray[np.float32]) -> Figure:
    """The score, between 1 and the number of classes.

    The interval is that of the jackknife of its logarithm, leaving out one sample at a time: around the value that the
    jackknife expects for infinitely many samples, which is above the score itself.

    Args:
        logits: (n, classes), n at least 2; logarithms of probabilities up to a constant for each sample.

    Raises:
        DataError: some logits are not finite.
    """
    count, classes = logits.shape
    total = np.zeros(classes)
    entropy = np.empty(count)
    for block, p in _probabilities(logits):
        total += p.sum(axis=0)
        entropy[block] = _entropy(p)
    score = _entropy(total / count) - entropy.mean()
    left_out = np.empty(count)
    for block, p in _probabilities(logits):
        rest = ((total - p) / (count - 1)).clip(min=0)
        left_out[block] = _entropy(rest) - (entropy.sum() - entropy[block]) / (count - 1)
    unbiased = count * score - (count - 1) * left_out.mean()
    low, high = around(float(unbiased), jackknife_variance(left_out), 0, np.log(classes))
    return Figure(exp(score), exp(low), exp(high), count, 0)


def _probabilities(logits: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    for start in range(0, len(logits), _BLOCK):
        block = slice(start, start + _BLOCK)
        rows = logits[block].astype(np.float64)
        if not np.isfinite(rows).all():
            raise DataError("some logits of the samples are not finite: use other --features")
        p = np.exp(rows - rows.max(axis=1, keepdims=True))
        yield block, p / p.sum(axis=1, keepdims=True)


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """-Σ p log p over the last axis, with 0 log 0 = 0."""
    entropy: NDArray[np.float64] = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    return entropy
