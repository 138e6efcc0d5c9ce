"""The public names of `import pipeline`: a trained model, a shard set as a torch dataset, figures of an evaluation.

They call the same code as the commands, so they give the same images and figures, and raise the same errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pipeline import evaluate as evaluation_job
from pipeline.checkpoints.checkpoint import step_of_manifest
from pipeline.checkpoints.run_dir import step_of
from pipeline.cluster.device import own_device
from pipeline.config import Config
from pipeline.data.loading.batches import read_range
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, Stopped
from pipeline.errors import PipelineError as PipelineError  # noqa: PLC0414  public
from pipeline.evaluation.intervals import Figure as Figure  # noqa: PLC0414  public
from pipeline.sampling import generator as generators
from pipeline.sampling.options import SamplingRequest, choose


def load_model(source: str, *, device: str | None = None, ema: bool = True) -> Model:
    """Load a trained model.

    Args:
        source: a run (its newest valid checkpoint), a checkpoint, or a directory of diffusers; a path or URL.
        device: such as `cpu` or `cuda:1`; None: the GPU if there is one.
        ema: use the averaged weights, or those of the last training step.

    Raises:
        PipelineError: there is no such model, or its files are damaged. The message is one line.
    """
    return Model(source, generators.load(source, torch.device(device) if device else own_device(), ema=ema))


class Model:
    """A trained network that draws one image for each seed: the image that `ddpm sample` draws for it."""

    def __init__(self, source: str, generator: generators.Generator) -> None:
        self._source, self._generator = source, generator
        self._step = step_of(source) or step_of_manifest(source, generator.sha256)

    def __repr__(self) -> str:
        size, classes = "x".join(map(str, self.config.data.height_width)), len(self.classes or ())
        step = "" if self._step is None else f"step {self._step}, "
        return f"<Model {self._source}: {step}{size} pixels, {classes or 'no'} class{'es' * (classes != 1)}>"

    @property
    def config(self) -> Config:
        """The configuration of its run. For a model from diffusers, what its files say."""
        return self._generator.config

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, by number; None for an unconditional model."""
        return self._generator.class_names

    def images(self, seeds: Iterable[int], **options: Any) -> NDArray[np.uint8]:
        """Draw images.

        Args:
            seeds: one image for each; any order.
            options: keys of `sample` in the configuration, such as `steps=25`, `guidance=1.5`, `batch=8`; `label` may
                be the name of a class. All others are those of the run. Batches are always full: with few seeds a small
                `batch` is faster, but the last bits of an image depend on it.

        Returns:
            uint8, (N, H, W, C), in the order of the seeds; C is 3, or 1 for grey.

        Raises:
            PipelineError: the model cannot do what an option asks for.
        """
        wanted = [int(seed) for seed in seeds]
        ordered = sorted(set(wanted))
        request = SamplingRequest("", tuple(range(seed, seed + 1) for seed in ordered), dict(options))
        try:
            chosen, _ = choose(request, self._generator, {}, quiet=True)
        except ConfigError as error:
            raise ConfigError(_with_keywords(str(error))) from None
        drawn = dict(self._generator.images(ordered, chosen))
        data = self.config.data
        shape = (*(chosen.height_width or data.height_width), data.channels)
        return np.stack([drawn[seed] for seed in wanted]) if wanted else np.empty((0, *shape), np.uint8)

    def pil_images(self, seeds: Iterable[int], **options: Any) -> list[Image.Image]:
        """The same images as Pillow has them, mode RGB or L. Arguments and errors as in `images`."""
        return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
                for image in self.images(seeds, **options)]  # fmt: skip


def _with_keywords(message: str) -> str:
    """A message with the keywords of Python where it has options of the command line: `steps=0:` for `--steps 0:`."""
    message = re.sub(r"^--([a-z-]+) (\S+|[\[({].*?[\])}]):", r"--\1=\2:", message, flags=re.MULTILINE)
    return re.sub(r"--([a-z][a-z-]*)", lambda option: option[1].replace("-", "_"), message)


class ShardDataset(Dataset[tuple[Any, int]]):
    """A shard set as a dataset of (image, label), in the order of its index; for `torch.utils.data.DataLoader`.

    Every image is compared with its checksum when it is read. Training of this project does not use this class: its
    loader reads each shard once, in order.

    Args:
        url: a shard set or a sample set; a path or URL. With a URL and loader workers, give the DataLoader
            `multiprocessing_context="spawn"`.
        transform: called with each image; default: none.

    Attributes:
        classes: names by class number; None without classes.
        size: (height, width) in pixels.

    Raises:
        PipelineError: there is no such set, or it is damaged.
    """

    def __init__(self, url: str, transform: Callable[[Tensor], Any] | None = None) -> None:
        self._shards, self._transform = ShardSet.open(url), transform
        self.classes, self.size = self._shards.classes, self._shards.size

    def __len__(self) -> int:
        return self._shards.samples

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Image, uint8 (C, H, W) unless transformed, and label; the label is -1 if the image has none."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """Several at once, as a DataLoader asks for them: files are opened once for neighbours."""
        count = len(self)
        if bad := [i for i in indices if not -count <= i < count]:
            raise IndexError(f"{self._shards.url} has {count} images: no number {bad[0]}")
        numbers = [i % count for i in indices]
        ordered = sorted(set(numbers))
        batch, place = read_range(self._shards, ordered), {number: i for i, number in enumerate(ordered)}
        images = [batch.images[place[number]] for number in numbers]
        labels = [int(batch.labels[place[number]]) for number in numbers]
        return [(self._transform(image) if self._transform else image, label) for image, label in zip(images, labels)]


def figures(
    samples: str, *, against: str, features: str = "inception", cache: str | None = None, quiet: bool = True
) -> dict[str, Figure]:
    """The figures of `ddpm evaluate`, with their 95 % intervals. Stored features are not computed again.

    Args:
        samples: a sample set, or any shard set.
        against: the shard set to compare with.
        features: a feature file, or `inception`.
        cache: where features are kept; None: beside each set.
        quiet: show no progress.

    Returns:
        Name → `Figure` with `value`, `low` and `high`: as `figures` in `evaluation.json` has them.

    Raises:
        PipelineError: the sets cannot be compared, or a file is damaged.
    """
    request = evaluation_job.EvaluationRequest(samples, against, features, cache=cache)
    result = evaluation_job.evaluate(request, quiet=quiet)
    if not result["complete"]:
        raise Stopped("other processes still compute these features: call it again to get the figures")
    counts = result["n"], result["reference_n"]
    return {name: Figure(**figure, n=counts[0], reference_n=counts[1]) for name, figure in result["figures"].items()}
