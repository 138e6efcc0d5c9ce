"""A trained network that draws images from seeds, for the jobs `train` and `sample`.

A seed determines an image: its initial noise and the noise of every step depend on the seed, not on the other images
of the batch.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import keyed_random, messages
from pipeline.config import Config, DiffusionSection, SamplingOptions, differences
from pipeline.data.sources.labels import class_names
from pipeline.diffusion import guidance, samplers
from pipeline.diffusion.process import Denoise, DiffusionProcess, Variance
from pipeline.diffusion.spacing import advice, resolve
from pipeline.errors import ConfigError
from pipeline.keyed_random import Use
from pipeline.model.denoiser import Denoiser
from pipeline.model.torch_flags import set_torch_flags
from pipeline.model.unet import UNet
from pipeline.sampling.pretrained import (
    Pretrained,
    check_weights,
    different_networks,
    listed_differences,
    read,
    with_classes,
)
from pipeline.solvers import Step

_LOSS_KEYS = ("loss_weighting", "min_snr_gamma", "sigmoid_bias")
_SEED = 0  # samples are keyed by their own seed alone


class Generator:
    """Draws images from seeds.

    Args:
        config: of the run the network comes from.
        network: on `device`; its weights must not change afterwards.
        process: the diffusion it was trained with, on `device`.
        device: where to draw.
        sha256: identifies the weights; recorded in sample sets.
        ema: whether the weights are the averaged ones; recorded in sample sets.
        class_names: by number; None if they are not known. Recorded in sample sets.
        guide: a worse network, which guides this one away from itself (autoguidance).
        guide_sha256: identifies the guide; recorded in sample sets.
    """

    def __init__(
        self,
        config: Config,
        network: UNet,
        process: DiffusionProcess,
        device: torch.device,
        *,
        sha256: str = "",
        ema: bool = True,
        class_names: Sequence[str] | None = None,
        guide: UNet | None = None,
        guide_sha256: str | None = None,
    ) -> None:
        self.config, self.device, self.ema = config, device, ema
        self.sha256, self.guide_sha256 = sha256, guide_sha256
        names = class_names or [str(number) for number in range(config.model.num_classes)]
        self.class_names = tuple(names) if config.model.num_classes else None
        self._networks = {("fp32", False): [part.eval() for part in (network, guide) if part is not None]}
        self._process = process

    def networks(self, precision: str, *, compiled: bool = False) -> list[UNet]:
        """The network and its guide, if it has one, in this precision; copies are made once."""
        kind = precision, compiled
        if kind not in self._networks:
            networks = copy.deepcopy(self._networks["fp32", False])
            for network in networks:
                if precision == "bf16":
                    network.cast_weights_to_bf16_()
                if compiled:
                    network.compile_blocks()
            self._networks[kind] = networks
        return self._networks[kind]

    def labels(self, seeds: Iterable[int], options: SamplingOptions) -> dict[int, int]:
        """Seed → class; empty for a model without classes."""
        classes, label = self.config.model.num_classes, options.label
        return {seed: seed % classes if label is None else label for seed in seeds} if classes else {}

    def images(
        self, seeds: Sequence[int], options: SamplingOptions, check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Draw (seed, image uint8 (H, W, C)) for ascending seeds.

        Batches start at multiples of `options.batch` and are always full: a seed has the same slot and neighbours
        whichever seeds are requested, because kernels may round differently for another shape.

        Args:
            seeds: ascending.
            options: sampler, steps and so on.
            check_stop: called before each pass through the network; may raise.
        """
        batch = options.batch
        for start, asked in groupby(seeds, key=lambda seed: seed // batch * batch):
            steps = self._trajectory(range(start, start + batch), options, check_stop)
            (last,) = deque(steps, maxlen=1)  # holds one step at a time
            drawn = _to_numpy(last.x)
            yield from ((seed, drawn[seed - start]) for seed in asked)

    def denoising(
        self, seeds: Sequence[int], options: SamplingOptions, frames: int, check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.uint8]]:
        """The images of the first batch's seeds between noise and result: up to `frames` times uint8 (n, H, W, C)."""
        batch = options.batch
        start = seeds[0] // batch * batch
        slots = [seed - start for seed in seeds if seed < start + batch]
        every = -(-len(self.resolved(options).timesteps or ()) // frames)
        step = None
        for i, step in enumerate(self._trajectory(range(start, start + batch), options, check_stop)):
            if i % every == 0:
                yield _to_numpy(step.x)[slots]
        if step is not None:
            yield _to_numpy(step.x)[slots]

    def resolved(self, options: SamplingOptions) -> SamplingOptions:
        """The options with a value for each one that depends on the sampler or on this model."""
        config = self.config
        from_model = {
            "precision": options.precision or config.train.precision,
            "size": options.height_width or config.data.height_width,
        }
        return resolve(options, self._process.schedule).model_copy(update=from_model)

    def advice(self, options: SamplingOptions) -> str | None:
        """Why these options are a poor choice, in one line; None for a good choice."""
        return advice(self.resolved(options), self._process.schedule)

    def variance(self, options: SamplingOptions) -> Variance:
        """The variance of a ddpm step."""
        return self.config.model.reverse_variance(options.variance)

    @torch.inference_mode()
    def _trajectory(self, seeds: range, options: SamplingOptions, check_stop: Callable[[], None]) -> Iterator[Step]:
        """Sampler steps for a batch of seeds; all noise is keyed by seed and timestep."""
        options = self.resolved(options)
        ids = torch.arange(seeds.start, seeds.stop, device=self.device)
        shape = (self.config.data.channels, *(options.height_width or ()))
        by_seed = self.labels(seeds, options)
        labels = torch.tensor([by_seed[seed] for seed in seeds], device=self.device) if by_seed else None

        def step_noise(t: int) -> Tensor:
            return keyed_random.normals(_SEED, ids, Use.SAMPLE_STEP, shape, step=t)

        yield from samplers.sample(
            self._denoise(labels, options, check_stop), keyed_random.normals(_SEED, ids, Use.SAMPLE_START, shape),
            replace(self._process, variance=self.variance(options)), options, step_noise,
        )  # fmt: skip

    def _denoise(self, labels: Tensor | None, options: SamplingOptions, check_stop: Callable[[], None]) -> Denoise:
        classes, precision = self.config.model.num_classes, options.precision or self.config.train.precision
        network, *guides = (
            Denoiser(network, precision, classes) for network in self.networks(precision, compiled=options.compile)
        )

        def call(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            check_stop()
            return network(x, t, labels)

        for guide in guides:
            return guidance.autoguided(call, guide, labels, options.guidance, options.guidance_interval)
        if labels is None:
            return lambda x, t: call(x, t, None)
        return guidance.label_guided(call, labels, classes, options.guidance, options.guidance_interval)


def _to_numpy(x: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1], (B, C, H, W), as uint8 (B, H, W, C)."""
    return samplers.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()


def load(source: str, device: torch.device, *, ema: bool = True, guide: str | None = None) -> Generator:
    """A generator from a run, a checkpoint or a diffusers directory.

    Args:
        source: the model.
        device: where to draw.
        ema: use the averaged weights.
        guide: a worse model of the same kind, for autoguidance.

    Raises:
        ConfigError: the source does not exist, its network is not supported, or the guide does not fit.
        DataError: files are damaged, or weights are not finite.
        NoCheckpoint: the run holds no valid checkpoint.
    """
    set_torch_flags()
    model = read(source, ema=ema)
    process = DiffusionProcess.of(model.config.diffusion, clip=model.config.sample.clip).to(device)
    other = None
    if guide is not None:
        other = read(guide, ema=ema)
        if model.class_names and other.class_names and class_names.mapping(other.class_names, model.class_names):
            other = with_classes(other, model.class_names, f"--guide {guide}")
        _check_guide(guide, other, model)
    return Generator(
        model.config,
        _network(model, source, device),
        process,
        device,
        sha256=model.identity,
        ema=ema,
        class_names=model.class_names,
        guide=_network(other, guide, device) if guide and other else None,
        guide_sha256=other.identity if other else None,
    )


def _network(model: Pretrained, source: str, device: torch.device) -> UNet:
    config = model.config
    if line := config.model.blindness:
        messages.warning(f"{source}: {line}")
    check_weights(model, source)
    network = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
    network.load_state_dict(model.weights)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _check_guide(guide: str, other: Pretrained, model: Pretrained) -> None:
    """Refuse a guide with another network, diffusion, image size or other classes."""
    alike = [f"diffusion.{key}" for key in DiffusionSection.model_fields if key not in _LOSS_KEYS]
    sizes = other.config.data.height_width, model.config.data.height_width
    if other.identity == model.identity:
        raise ConfigError(f"--guide {guide} is the model itself and would change nothing: take an earlier checkpoint")
    changed = differences(other.config, model.config)
    different = different_networks(other.config, model.config) | {key: changed[key] for key in alike if key in changed}
    if sizes[0] != sizes[1]:
        different["data.size"] = sizes
    if different:
        raise ConfigError(
            f"--guide {guide} is another network or diffusion ({listed_differences(different)}): take an earlier "
            "checkpoint of the same run, or a run trained alike"
        )
    names, guide_names = model.class_names, other.class_names
    if names and guide_names and class_names.mapping(guide_names, names) is None:
        raise ConfigError(
            f"--guide {guide} has other classes ({class_names.compared(guide_names, names)}): take a model trained "
            "alike"
        )


def load_weights(source: str, config: Config, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """EMA weights of a run, a checkpoint or a diffusers directory, for the network that `config` describes.

    Args:
        source: the model.
        config: configuration of the new run.
        names: class names of the new run, by number; the classes of the model are matched with them.

    Raises:
        ConfigError: the source has another network; the message names the settings that differ.
    """
    model = read(source, ema=True)
    if names and config.model.num_classes and model.config.model.num_classes:
        model = with_classes(model, names, f"train.init_from {source}")
    if different := different_networks(model.config, config):
        raise ConfigError(
            f"train.init_from {source} is another network ({listed_differences(different)}): set these keys alike"
        )
    check_weights(model, source)
    return model.weights


def norm_groups(source: str) -> int:
    """Groups of each GroupNorm in the network of a run, a checkpoint or a diffusers directory; raises as `load`."""
    return read(source, ema=True).config.model.groups
