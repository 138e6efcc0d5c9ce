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
from pipeline.diffusion.likelihood import Bound, bits_per_dimension
from pipeline.diffusion.process import Denoise, DiffusionProcess, Variance
from pipeline.diffusion.spacing import advice, resolve
from pipeline.errors import ConfigError
from pipeline.keyed_random import Use
from pipeline.model.denoiser import Denoiser
from pipeline.model.torch_flags import set_torch_flags
from pipeline.model.unet import UNet
from pipeline.sampling.image_start import ImageStart
from pipeline.sampling.pretrained import (
    Pretrained,
    check_weights,
    different_networks,
    listed_differences,
    read,
    with_classes,
)

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
        ema_length: of another average than the run's own, which the weights are; recorded in sample sets.
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
        ema_length: float | None = None,
        class_names: Sequence[str] | None = None,
        guide: UNet | None = None,
        guide_sha256: str | None = None,
    ) -> None:
        self.config, self.device, self.ema, self.ema_length = config, device, ema, ema_length
        self.sha256, self.guide_sha256 = sha256, guide_sha256
        self.start: ImageStart | None = None
        names = class_names or [str(number) for number in range(config.model.num_classes)]
        self.class_names = tuple(names) if config.model.num_classes else None
        self._networks = {("fp32", False): [part.eval() for part in (network, guide) if part is not None]}
        self._process = process

    def starting_at(self, start: ImageStart) -> Generator:
        """The same generator, but its images start from this image with noise instead of from noise alone."""
        other = copy.copy(self)
        other.start = start
        return other

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
            drawn = _last(self._trajectory(range(start, start + batch), options, check_stop))
            yield from ((seed, drawn[seed - start]) for seed in asked)

    def denoising(
        self, seeds: Sequence[int], options: SamplingOptions, frames: int, check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.uint8]]:
        """The images of the first batch's seeds between noise and result: up to `frames` times uint8 (n, H, W, C)."""
        first_batch, slots = _first_batch(seeds, options.batch)
        every = -(-self.steps(options) // frames)
        for i, x in enumerate(self._trajectory(first_batch, options, check_stop)):
            if i % every == 1 % every and i > 0:
                yield _to_numpy(x)[slots]
        yield _to_numpy(x)[slots]

    def trajectories(
        self, seeds: Sequence[int], options: SamplingOptions, count: int, check_stop: Callable[[], None] = lambda: None
    ) -> NDArray[np.uint8]:
        """The first batch's seeds from noise to image at evenly spaced steps.

        Args:
            seeds: ascending.
            options: sampler, steps and so on.
            count: images of each seed, at least 2; fewer if there are fewer steps.
            check_stop: called before each pass through the network; may raise.

        Returns:
            (seeds, images, H, W, C); the first image of each seed is its noise, the last one the result.
        """
        first_batch, slots = _first_batch(seeds, options.batch)
        steps = self.steps(options)
        shown = {round(i * steps / (count - 1)) for i in range(count)}
        states = enumerate(self._trajectory(first_batch, options, check_stop))
        return np.stack([_to_numpy(x)[slots] for i, x in states if i in shown], axis=1)

    def between(
        self,
        first: int,
        last: int,
        options: SamplingOptions,
        count: int,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Images, uint8 (H, W, C), whose noise goes from that of one seed to that of another along a great circle.

        All have the class of the first seed. The first image and, but for its class, the last one are those of the
        seeds themselves.

        Args:
            first: seed.
            last: seed.
            options: a sampler without noise.
            count: number of images, at least 2.
            check_stop: called before each pass through the network; may raise.
        """
        ends = self._noise(torch.tensor([first, last], device=self.device), options)
        labels = list(self.labels([first], options).values()) * options.batch
        shares = [i / (count - 1) for i in range(count)]
        for start in range(0, count, options.batch):
            part = shares[start : start + options.batch]
            filled = part + part[-1:] * (options.batch - len(part))  # batches are always full, as in `images`
            noise = torch.stack([slerp(ends[0], ends[1], share) for share in filled])
            ids = torch.full((options.batch,), first, device=self.device)
            yield from _last(self._denoised(noise, ids, labels, options, check_stop))[: len(part)]

    def steps(self, options: SamplingOptions) -> int:
        """Number of steps that the sampler takes: with an image to start from, fewer than `options` say."""
        return len(self._visited(self.resolved(options)))

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
    def bits_per_dimension(
        self, images: Tensor, labels: Tensor, numbers: Tensor, check_stop: Callable[[], None] = lambda: None
    ) -> Bound:
        """The variational bound of images, in as many network passes as the model has timesteps.

        Args:
            images: uint8, (B, C, H, W).
            labels: int64, (B,); -1 for none.
            numbers: int64, (B,): the noise of an image is keyed by its number.
            check_stop: called before each pass through the network; may raise.
        """
        x0 = images.to(self.device).float() / 127.5 - 1
        ids = numbers.to(self.device)
        options = self.resolved(SamplingOptions(variance=self.config.sample.variance, guidance=1.0))
        shape = tuple(x0.shape[1:])

        def noise(t: int) -> Tensor:
            return keyed_random.normals(_SEED, ids, Use.LIKELIHOOD, shape, step=t)

        denoise = self._denoise(labels.to(self.device), options, check_stop)
        return bits_per_dimension(denoise, x0, replace(self._process, variance=self.variance(options)), noise)

    def _visited(self, options: SamplingOptions) -> tuple[int, ...]:
        """The timesteps that the sampler visits with resolved options, descending."""
        timesteps = options.timesteps or ()
        return self.start.timesteps(timesteps, len(self._process.schedule)) if self.start else timesteps

    def _noise(self, ids: Tensor, options: SamplingOptions, t: int | None = None) -> Tensor:
        """The noise of each seed at its start, or of its step at a timestep, (B, C, H, W)."""
        shape = (self.config.data.channels, *(self.resolved(options).height_width or ()))
        if t is None:
            return keyed_random.normals(_SEED, ids, Use.SAMPLE_START, shape)
        return keyed_random.normals(_SEED, ids, Use.SAMPLE_STEP, shape, step=t)

    def _trajectory(self, seeds: range, options: SamplingOptions, check_stop: Callable[[], None]) -> Iterator[Tensor]:
        """A batch of seeds at the start and after each step, (B, C, H, W); noise is keyed by seed and timestep."""
        ids = torch.arange(seeds.start, seeds.stop, device=self.device)
        by_seed = self.labels(seeds, options)
        labels = [by_seed[seed] for seed in seeds] if by_seed else []
        return self._denoised(self._noise(ids, options), ids, labels, options, check_stop)

    @torch.inference_mode()
    def _denoised(
        self,
        noise: Tensor,
        ids: Tensor,
        labels: Sequence[int],
        options: SamplingOptions,
        check_stop: Callable[[], None],
    ) -> Iterator[Tensor]:
        """A batch at its start and after each step of the sampler, (B, C, H, W).

        Args:
            noise: to start from, (B, C, H, W).
            ids: the seeds that the noise of the steps is keyed by, (B,).
            labels: classes; none for a model without them.
            options: sampler, steps and so on.
            check_stop: called before each pass through the network; may raise.
        """
        options = self.resolved(options)
        options = options.model_copy(update={"timesteps": self._visited(options)})
        process = replace(self._process, variance=self.variance(options))
        x = noise if self.start is None else self.start.noised(noise, (options.timesteps or ())[0], process)
        yield x
        denoise = self._denoise(torch.tensor(labels, device=self.device) if labels else None, options, check_stop)
        for step in samplers.sample(denoise, x, process, options, lambda t: self._noise(ids, options, t)):
            yield step.x

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


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation: on the great circle from a (share 0) to b (share 1), so that noise keeps its norm.

    Args:
        a: any shape.
        b: like a.
        share: of the angle between them, 0 to 1.
    """
    x, y = a.flatten().double(), b.flatten().double()
    angle = torch.acos((x @ y / (x.norm() * y.norm())).clamp(-1, 1))
    weights = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    return (weights[0] * x + weights[1] * y).to(a.dtype).view_as(a)


def _first_batch(seeds: Sequence[int], batch: int) -> tuple[range, list[int]]:
    """The batch with the first seed, and the slots of the requested seeds in it."""
    start = seeds[0] // batch * batch
    return range(start, start + batch), [seed - start for seed in seeds if seed < start + batch]


def _last(states: Iterable[Tensor]) -> NDArray[np.uint8]:
    """The images after the last step, uint8 (B, H, W, C)."""
    (x,) = deque(states, maxlen=1)  # holds one step at a time
    return _to_numpy(x)


def _to_numpy(x: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1], (B, C, H, W), as uint8 (B, H, W, C)."""
    return samplers.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()


def load(
    source: str,
    device: torch.device,
    *,
    ema: bool = True,
    ema_length: float | None = None,
    guide: str | None = None,
) -> Generator:
    """A generator from a run, a checkpoint or a diffusers directory.

    Args:
        source: the model.
        device: where to draw.
        ema: use the averaged weights.
        ema_length: of the average to use instead of the run's own; the guide keeps its own.
        guide: a worse model of the same kind, for autoguidance.

    Raises:
        ConfigError: the source does not exist, its network is not supported, or the guide does not fit.
        DataError: files are damaged, or weights are not finite.
        NoCheckpoint: the run holds no valid checkpoint.
    """
    set_torch_flags()
    model = read(source, ema=ema, ema_length=ema_length)
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
        ema_length=ema_length,
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
        raise ConfigError(f"--guide {guide} is the model itself and would change nothing: give an earlier checkpoint")
    changed = differences(other.config, model.config)
    different = different_networks(other.config, model.config) | {key: changed[key] for key in alike if key in changed}
    if sizes[0] != sizes[1]:
        different["data.size"] = sizes
    if different:
        raise ConfigError(
            f"--guide {guide} is another network or diffusion ({listed_differences(different)}): give an earlier "
            "checkpoint of the same run, or a run with the same network and diffusion"
        )
    names, guide_names = model.class_names, other.class_names
    if names and guide_names and class_names.mapping(guide_names, names) is None:
        raise ConfigError(
            f"--guide {guide} has other classes ({class_names.compared(guide_names, names)}): give a model with "
            "the same classes"
        )
