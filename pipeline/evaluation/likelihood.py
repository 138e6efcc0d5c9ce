"""Bits per dimension of a shard set, by term of the variational bound (Ho et al. 2020, arXiv:2006.11239, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.data.loading.batches import Batch
from pipeline.data.shards.shard_set import ShardSet
from pipeline.diffusion.likelihood import Bound
from pipeline.evaluation.intervals import Figure, around
from pipeline.evaluation.result_file import Arrays
from pipeline.evaluation.shard_results import ShardResults
from pipeline.storage import files


def of_shards(
    shards: ShardSet, bound: Callable[[Batch], Bound], network: dict[str, str], cache: str, batch: int
) -> ShardResults:
    """The bound of each image: arrays `prior`, (N,), and `terms`, (N, T), in bits per dimension.

    Args:
        shards: the set.
        bound: computes the bound of a batch.
        network: what the bound depends on besides the images; `model_sha256` names the directory.
        cache: directory or URL under which the results are kept.
        batch: images in a batch.
    """

    def compute(images: Batch) -> Arrays:
        found = bound(images)
        return {"prior": found.prior.float().cpu().numpy(), "terms": found.terms.float().cpu().numpy()}

    directory = files.join(cache, f"likelihood-{network['model_sha256'][:12]}")
    return ShardResults(shards, directory, network, compute, batch)


def figures(arrays: Arrays) -> dict[str, Figure]:
    """The mean of the bound and of its parts, with 95 % intervals over the images, by the normal distribution.

    Returns:
        `bits_per_dim`, the sum of `prior` (L_T), `diffusion` (L_1 to L_T-1) and `decoder` (L_0).
    """
    prior, terms = arrays["prior"].astype(np.float64), arrays["terms"].astype(np.float64)
    parts = {"prior": prior, "diffusion": terms[:, 1:].sum(axis=1), "decoder": terms[:, 0]}
    found = {}
    for name, values in {"bits_per_dim": prior + terms.sum(axis=1), **parts}.items():
        n = len(values)
        low, high = around(values.mean(), values.var(ddof=1) / n if n > 1 else np.inf)
        found[name] = Figure(float(values.mean()), low, high, n, 0)
    return found
