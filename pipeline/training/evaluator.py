"""Compare samples of the averaged weights with a shard set while training, on all ranks.

Each rank computes features of its share of the reference, once in a run, and draws its share of the samples; rank 0
computes the figures. Nothing of the training is read or changed but the averaged weights, and all noise is keyed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from pipeline.cluster.world import World
from pipeline.config import Config
from pipeline.data.shards.shard_set import ShardSet
from pipeline.evaluation import features
from pipeline.evaluation.frechet import frechet_figures
from pipeline.evaluation.intervals import Figure
from pipeline.evaluation.kernel_distance import kernel_distance
from pipeline.sampling.generator import Generator


class _StopRequestedError(Exception):
    """This rank was asked to stop."""


class Evaluator:
    """Evaluates `run.evaluate_samples` samples, drawn as `sample` of the configuration says.

    Args:
        config: the whole run.
        world: the ranks.
        reference: the set to compare with.
        phase: entered for each part of the work, so that the heartbeat of a long evaluation goes on.
        is_stopping: whether this rank was asked to stop.

    Raises:
        ConfigError: the features cannot be had, or do not fit the images.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        reference: ShardSet,
        phase: Callable[[], AbstractContextManager[None]],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._config, self._world, self._phase, self._is_stopping = config, world, phase, is_stopping
        name, size = config.run.evaluate_features, config.data.height_width
        file = world.on_rank0(lambda: features.read(name))  # one rank reads for all
        world.on_rank0(lambda: features.parse(*file, world.device, size).sha256)  # an error is told once
        self._extractor = features.parse(*file, world.device, size)
        self._reference = features.of_shards(reference, self._extractor, config.run.dir)

    def evaluate(self, generator: Generator) -> dict[str, Figure] | None:
        """The Fréchet distance and the kernel distance, on rank 0; {} on other ranks; None if a stop was requested.

        Args:
            generator: of the averaged weights.
        """
        missing = self._world.on_rank0(self._reference.missing)

        def compute(number: int) -> None:
            self._reference.compute(missing[number], lambda _count: self._check_stop())

        if not all(self._round(first, len(missing), compute) for first in range(0, len(missing), self._world.size)):
            return None
        options = self._config.sample
        count, parts = -(-self._config.run.evaluate_samples // options.batch), []

        def draw(number: int) -> None:
            seeds = range(number * options.batch, (number + 1) * options.batch)
            drawn = [image for _, image in generator.images(seeds, options, self._check_stop)]
            images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
            self._drawn = self._extractor(images).features.to(self._world.device)

        for first in range(0, count, self._world.size):
            self._drawn = torch.zeros(0)
            if not self._round(first, count, draw):
                return None
            parts.append(self._gathered())
        samples = torch.cat(parts)[: self._config.run.evaluate_samples].cpu().numpy()
        if not self._world.is_main:
            return {}
        with self._phase():
            reference = self._reference.read()["features"]
            distance, infinity = frechet_figures(samples, reference)
            kernel = kernel_distance(samples, reference)
        return {"frechet_distance": distance, "frechet_distance_infinity": infinity, "kernel_distance": kernel}

    def _gathered(self) -> Tensor:
        """The features that the ranks have drawn in a round; those of a rank without a batch come last and are 0."""
        width = self._world.all_reduce_max(self._drawn.shape[-1])[0]
        if not len(self._drawn):
            self._drawn = torch.zeros((self._config.sample.batch, width), device=self._world.device)
        return self._world.gather(self._drawn)

    def _round(self, first: int, count: int, work: Callable[[int], None]) -> bool:
        """Each rank does one piece of work; returns whether no rank was asked to stop."""
        number = first + self._world.rank
        with self._phase():
            try:
                if number < count:
                    work(number)
                self._check_stop()
                stops = False
            except _StopRequestedError:
                stops = True
            return not self._world.all_reduce_max(stops)[0]

    def _check_stop(self) -> None:
        if self._is_stopping():
            raise _StopRequestedError
