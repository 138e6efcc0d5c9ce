"""Are the demo's digits the digits that were asked for?

A support vector machine, fitted to the real digits, names 500 samples made with consecutive seeds. Its own mistakes on real digits
it was not fitted to are printed beside them. Exit code 1 below 98 %.

    python benchmarks/demo_quality.py [RUN [SHARDSET]]
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from pipeline import sample

SAMPLES = 500
REACH = 0.98


def read(directory: Path, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures as rows of 64 numbers in 0..16, and their classes, from the tars of a shard or sample set."""
    pictures, labels = {}, {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                data = tar.extractfile(member).read()
                if kind == "png":
                    pictures[key] = (
                        np.asarray(Image.open(io.BytesIO(data)).resize((8, 8), Image.Resampling.BOX)) / 255 * 16
                    )
                elif kind == "json" and label == "meta":
                    labels[key] = json.loads(data)["label"]
                elif kind == "cls" and label == "cls":
                    labels[key] = int(data)
    keys = sorted(pictures)
    return np.stack([pictures[key].ravel() for key in keys]), np.array([labels[key] for key in keys])


def main(run: str = "runs/demo", shards: str = "shards/digits") -> int:
    real, digits = read(Path(shards), "cls")
    judge = SVC(gamma=0.001, C=10)
    on_real = cross_val_score(judge, real, digits, cv=10).mean()
    judge.fit(real, digits)
    with tempfile.TemporaryDirectory() as out:
        result = sample.from_flags(
            run, {}, seeds=f"0-{SAMPLES - 1}", out=out, shard_samples=None, ema=True, precision=None, label=None,
            size=None, quiet=True,
        )  # fmt: skip
        drawn, asked = read(Path(out), "meta")
    named = judge.predict(drawn)
    right = float((named == asked).mean())
    distance = np.sqrt(((drawn[:, None] - real[None]) ** 2).sum(-1)).min(1)
    print(f"real digits named right (10-fold)   {on_real:.1%}")
    print(
        f"samples named as asked for          {right:.1%} of {len(drawn)}, seeds 0-{SAMPLES - 1}, {result['seconds']} s"
    )
    print(
        "by digit                            "
        + " ".join(f"{d}:{(named == asked)[asked == d].mean():.0%}" for d in range(10))
    )
    print(
        f"samples that copy a real digit      {(distance < 1e-6).mean():.1%}  (nearest real digit at median {np.median(distance):.1f} of 16)"
    )
    return 0 if right >= REACH else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
