"""Kernel distance: the unbiased squared maximum mean discrepancy with the kernel (x·y/D + 1)³. Pure.

Binkowski et al. 2018, arXiv:1801.01401, section 4 (KID there); Gretton et al. 2012, "A kernel two-sample test", eq. 3.
It is computed from all pairs, not as a mean over subsets, and not multiplied by 100 or 1000. It does not depend on the
number of images except by chance, and may be below 0 where the sets are alike.

Products are float32, as the features are, and are summed in float64; blocks of pairs are never more than 16 MiB each.
The cost is (n² + m² + 2nm) D flops.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.intervals import Figure, around, jackknife_variance

_BLOCK = 2048


def kernel_distance(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> Figure:
    """The kernel distance, with the interval of the jackknife that leaves out one image at a time, on either side.

    Leaving one out needs only the sum of the kernel over its pairs. At distance 0 the jackknife estimates about twice
    the variance, so the interval covers more than 95 % there.

    Args:
        samples: (n, D), n at least 2.
        reference: (m, D), m at least 2.
    """
    own, others = _sums_within(samples), _sums_within(reference)
    to_reference, to_samples = _sums_between(samples, reference)
    n, m = len(samples), len(reference)
    within, between = own.sum() / (n * (n - 1)), others.sum() / (m * (m - 1))
    cross = to_reference.sum() / (n * m)
    value = float(within + between - 2 * cross)
    variance = sum(_variance(*sums) for sums in ((own, to_reference, m), (others, to_samples, n)))
    return Figure(value, *around(value, variance), n, m)


def _variance(within: NDArray[np.float64], across: NDArray[np.float64], others: int) -> float:
    """Jackknife over the images of one set; terms of the other set alone are constant and left away.

    Args:
        within: (N,), sums of the kernel between an image and the others of its set.
        across: (N,), sums of the kernel between an image and the other set.
        others: size of the other set.
    """
    count = len(within)
    if count < 3:  # one image has no pairs
        return float(np.var(across / others, ddof=1) * 4 / count)
    left = (within.sum() - 2 * within) / ((count - 1) * (count - 2))
    return jackknife_variance(left - 2 * (across.sum() - across) / ((count - 1) * others))


def _kernel(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    product = (a @ b.T).astype(np.float32, copy=False)
    product *= np.float32(1 / a.shape[1])
    product += 1
    product *= product * product
    return product


def _sums_within(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    sums = np.zeros(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        kernel = _kernel(rows[block], rows[block])
        np.fill_diagonal(kernel, 0)
        sums[block] += kernel.sum(axis=1, dtype=np.float64)
        for later in range(start + _BLOCK, len(rows), _BLOCK):
            other = slice(later, later + _BLOCK)
            _add(sums, sums, block, other, rows, rows)
    return sums


def _sums_between(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sums = np.zeros(len(a)), np.zeros(len(b))
    for start in range(0, len(a), _BLOCK):
        for other in range(0, len(b), _BLOCK):
            _add(*sums, slice(start, start + _BLOCK), slice(other, other + _BLOCK), a, b)
    return sums


def _add(
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    block: slice,
    other: slice,
    a: NDArray[np.float32],
    b: NDArray[np.float32],
) -> None:
    kernel = _kernel(a[block], b[other])
    left[block] += kernel.sum(axis=1, dtype=np.float64)
    right[other] += kernel.sum(axis=0, dtype=np.float64)
