"""Are the demo's digits the digits that were asked for?

A support vector machine, fitted to the real digits, names 500 samples made with consecutive seeds. How many real digits
that it was not fitted to it names right is printed beside. Exit code 1 below 98 %.

    python benchmarks/demo_quality.py [RUN [SHARDSET]]
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from pipeline.data.loading.batches import read_all
from pipeline.data.shards.shard_set import ShardSet
from pipeline.sample import sample
from pipeline.sampling.options import SamplingRequest

SAMPLES = 500
REACH = 0.98


def read(url: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Images of a shard or sample set as rows of 64 numbers in 0..16, and their classes."""
    batch = read_all(ShardSet.open(url))
    return batch.images.flatten(1).numpy() / 255 * 16, batch.labels.numpy()


def main(run: str = "runs/demo", shards: str = "shards/digits") -> int:
    """Print the figures; 0 if enough samples are what was asked for."""
    real, digits = read(shards)
    judge = SVC(gamma=0.001, C=10)
    on_real = cross_val_score(judge, real, digits, cv=10).mean()
    judge.fit(real, digits)
    with tempfile.TemporaryDirectory() as out:
        result = sample(SamplingRequest(run, (range(SAMPLES),), out=out), quiet=True)
        drawn, asked = read(out)
    right = judge.predict(drawn) == asked
    nearest = np.sqrt(((drawn[:, None] - real[None]) ** 2).sum(-1)).min(1)
    print(f"real digits named right, 10-fold     {on_real:.1%}")
    print(f"samples named as asked for           {right.mean():.1%} of seeds 0-{SAMPLES - 1}, in {result['seconds']} s")
    print("  digit by digit                     " + " ".join(f"{d}:{right[asked == d].mean():.0%}" for d in range(10)))
    print(f"samples equal to a real digit        {(nearest < 1).mean():.1%}")
    return 0 if right.mean() >= REACH else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
