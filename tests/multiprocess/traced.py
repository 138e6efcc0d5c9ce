"""`python -m tests.multiprocess.traced train …`: the command, but each rank writes down what its steps are made of."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from pipeline import cli, keyed_random
from pipeline.data.loading.batches import Batch
from pipeline.keyed_random import Use
from pipeline.training.trainer import Gradient, Trainer

_gradient = Trainer.gradient


def _traced(self: Trainer, batch: Batch) -> Gradient:
    """One line a sample: step, position in the order, image, and the timestep that was used, in order of position."""
    result = _gradient(self, batch)
    epsilon = keyed_random.normals(self.config.train.seed, batch.positions, Use.NOISE, (4,))
    directory = Path(os.environ["TRACE"])
    with (directory / f"{os.environ['START']}-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
        for i, q in enumerate(batch.positions.tolist()):
            image = hashlib.sha256(batch.images[i].numpy().tobytes()).hexdigest()[:16]
            file.write(json.dumps([self.state.step, q, image, int(result.t[i]), epsilon[i].tolist()]) + "\n")
    return result


Trainer.gradient = _traced  # type: ignore[method-assign]
if __name__ == "__main__":
    assert torch.get_num_threads()
    cli.main(["train", *sys.argv[1:]])
