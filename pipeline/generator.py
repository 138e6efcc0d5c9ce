"""A trained network and what turns seeds into pictures with it; what the jobs `train` and `sample` share.

A seed fixes a picture: its start and the noise of every step are keyed by it, whatever else is drawn in the same batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import configfile, noise, storage
from pipeline.config import Config, DataSection, SampleSection, TrainSection, differences
from pipeline.diffusion import samplers
from pipeline.diffusion.schedule import Denoise, Schedule, make_schedule
from pipeline.errors import ConfigError, DataError
from pipeline.model import interchange
from pipeline.model.unet import UNet
from pipeline.noise import Use
from pipeline.run import checkpoint as checkpoints

_SEED = 0  # samples are keyed by their own seed alone


@dataclass(frozen=True)
class Manner:
    """How to draw: with the seed and the weights, all that decides a picture."""

    settings: SampleSection
    precision: str = "bf16"
    """bf16 or fp32, of the network."""
    label: int | None = None
    """One class for all; by default the seeds take all classes in turn."""
    size: tuple[int, int] | None = None
    """Height and width; by default those of training."""


class Generator:
    """Draws pictures from seeds.

    Args:
        config: of the run the network comes from.
        network: on `device`; its weights must not change afterwards.
        schedule: of the diffusion, on `device`.
        device: where to draw.
        ema: whether the weights are the averaged ones; only written down.
        clip: whether the network's estimates of the clean picture are clipped to [-1, 1].
        class_names: by number, where they are known; only written down.
    """

    def __init__(
        self,
        config: Config,
        network: UNet,
        schedule: Schedule,
        device: torch.device,
        *,
        ema: bool = True,
        clip: bool = True,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.config, self.ema, self._clip = config, ema, clip
        names = class_names or [str(number) for number in range(config.model.num_classes)]
        self.class_names = tuple(names) if config.model.num_classes else None
        self._networks = {("fp32", False): network.eval()}
        self._schedule, self.device = schedule, device

    def network(self, precision: str, *, compiled: bool = False) -> UNet:
        """What is called, under `autocast`, for pictures in this precision: the network given, or a copy of it."""
        kind = precision, compiled
        if kind not in self._networks:
            network = copy.deepcopy(self._networks["fp32", False])
            if precision == "bf16":
                network.round_ahead()
            if compiled:
                network.compile_blocks()
            self._networks[kind] = network
        return self._networks[kind]

    def labels(self, seeds: Iterable[int], manner: Manner) -> dict[int, int]:
        """Seed → class; empty for a model without classes."""
        classes = self.config.model.num_classes
        return {seed: seed % classes if manner.label is None else manner.label for seed in seeds} if classes else {}

    def pictures(
        self, seeds: Sequence[int], manner: Manner, go_on: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(seed, picture uint8 (H, W, C)) for ascending seeds.

        `go_on` is called before each pass through the network, and may raise.

        Batches are aligned to multiples of `settings.batch` and always whole: a seed keeps its slot and its neighbours
        whichever seeds are asked for, since kernels may round differently in another shape.
        """
        batch = manner.settings.batch
        for start, asked in groupby(seeds, key=lambda seed: seed // batch * batch):
            steps = self._trajectory(range(start, start + batch), manner, go_on)
            (last,) = deque(steps, maxlen=1)  # holds one step at a time
            drawn = _to_pictures(last.x)
            yield from ((seed, drawn[seed - start]) for seed in asked)

    def denoising(
        self, seeds: Sequence[int], manner: Manner, frames: int, go_on: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.uint8]]:
        """The seeds of the first batch on their way from noise to pictures: up to `frames` times uint8 (n, H, W, C)."""
        batch = manner.settings.batch
        start = seeds[0] // batch * batch
        slots = [seed - start for seed in seeds if seed < start + batch]
        every = -(-self.sampler(manner.settings).steps // frames)
        step = None
        for i, step in enumerate(self._trajectory(range(start, start + batch), manner, go_on)):
            if i % every == 0:
                yield _to_pictures(step.x)[slots]
        if step is not None:
            yield _to_pictures(step.x)[slots]

    def sampler(self, settings: SampleSection) -> samplers.Sampler:
        """The sampler that the settings name, for this network's diffusion."""
        total = self.config.diffusion.timesteps
        return samplers.Sampler(
            name=settings.sampler,
            steps=settings.steps or (total if settings.sampler == "ddpm" else min(50, total)),
            eta=settings.eta,
            spacing=settings.spacing,
            variance="learned" if self.config.model.learned_variance else settings.variance,
            clip=self._clip,
        )

    @torch.inference_mode()
    def _trajectory(self, seeds: range, manner: Manner, go_on: Callable[[], None]) -> Iterator[samplers.Step]:
        """The noisy pictures after each step, keyed by seed and timestep."""
        ids = torch.arange(seeds.start, seeds.stop, device=self.device)
        shape = (self.config.data.channels, *(manner.size or self.config.data.height_width))
        by_seed = self.labels(seeds, manner)
        labels = torch.tensor([by_seed[seed] for seed in seeds], device=self.device) if by_seed else None

        def step_noise(t: int) -> Tensor:
            return noise.normals(_SEED, ids, Use.SAMPLE_STEP, shape, step=t)

        yield from samplers.sample(
            self._denoiser(labels, manner, go_on), noise.normals(_SEED, ids, Use.SAMPLE_START, shape), self._schedule,
            self.sampler(manner.settings), step_noise, self.config.diffusion.prediction_type,
        )  # fmt: skip

    def _denoiser(self, labels: Tensor | None, manner: Manner, go_on: Callable[[], None]) -> Denoise:
        network = self.network(manner.precision, compiled=manner.settings.compile)

        def call(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            go_on()
            with autocast(self.device, manner.precision):
                return cast(Tensor, network(x.contiguous(memory_format=torch.channels_last), t, labels))

        if labels is None:
            return lambda x, t: call(x, t, None)
        return samplers.guided(call, labels, self.config.model.num_classes, manner.settings.guidance)


def _to_pictures(x: Tensor) -> NDArray[np.uint8]:
    """Pictures in [-1, 1], (B, C, H, W), as uint8 (B, H, W, C)."""
    return samplers.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context the network is called in: bf16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def load(source: str, device: torch.device, *, ema: bool = True) -> tuple[Generator, str]:
    """A generator from a run, a checkpoint or a diffusers directory, and the sha256 that identifies what it draws.

    Raises:
        ConfigError: there is nothing of that name, or it cannot be expressed here.
        DataError: its files are damaged.
        NoCheckpoint: the run holds no valid checkpoint.
    """
    model = _read(source, ema=ema)
    config = model.config
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    network = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
    _load_into(network, model.weights, source)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps).to(device)
    generator = Generator(config, network, schedule, device, ema=ema, clip=model.clip, class_names=model.class_names)
    return generator, model.identity


def load_weights(source: str, config: Config) -> dict[str, Tensor]:
    """EMA weights of a run, a checkpoint or a diffusers directory, for the network that `config` describes.

    Raises:
        ConfigError: they belong to another network; the message names the settings that differ.
    """
    model = _read(source, ema=True)
    unshaping = ("model.dropout", "model.label_dropout", "model.attention_sizes")
    different = {key: values for key, values in differences(model.config, config).items()
                 if (key.startswith("model.") and key not in unshaping) or key == "data.channels"}  # fmt: skip
    there, here = _attending_levels(model.config), _attending_levels(config)
    if there != here:  # the sizes in pixels may differ with those of the pictures
        different["the levels with attention, by model.attention_sizes"] = there, here
    if different:
        diff = "; ".join(f"{key}: {there} there, {here} here" for key, (there, here) in different.items())
        raise ConfigError(f"train.init_from {source} is another network ({diff}): set these keys alike")
    with torch.device("meta"):
        network = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
    _load_into(network, model.weights, source, assign=True)
    return model.weights


def _attending_levels(config: Config) -> list[int]:
    side, sizes = min(config.data.height_width), config.model.attention_sizes
    return [level for level in range(len(config.model.channel_mults)) if side >> level in sizes]


def _load_into(network: nn.Module, weights: dict[str, Tensor], source: str, *, assign: bool = False) -> None:
    try:
        network.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        reasons = " ".join(str(error).split())
        raise ConfigError(
            f"{source}: its weights are not those of the network that its configuration describes "
            f"({reasons.partition(': ')[2][:300]}): take both from the same place"
        ) from None


class _Model(NamedTuple):
    config: Config
    weights: dict[str, Tensor]
    identity: str
    clip: bool = True
    class_names: Sequence[str] | None = None


def _read(source: str, *, ema: bool) -> _Model:
    folder = next(
        (f for f in (source, storage.join(source, "unet")) if storage.exists(storage.join(f, "config.json"))), None
    )
    if folder:
        return _read_diffusers(source, folder)
    if storage.exists(source) and not storage.is_dir(source):
        raise ConfigError(f"{source} is a file: give a run, a checkpoint or a diffusers directory")
    checkpoint, rejected = checkpoints.find(source)
    for line in rejected:
        sys.stderr.write(f"warning: {source}: {line}\n")
    state = checkpoint.state()
    config = configfile.parse(state["config"], f"{checkpoint.path}/state.json")
    weights = checkpoint.tensors("ema" if ema else "model")
    return _Model(config, weights, checkpoint.manifest_sha256, class_names=state.get("classes"))


def _read_diffusers(source: str, folder: str) -> _Model:
    """The layout that diffusers saves: a UNet2DModel folder, alone or in a DDPMPipeline with its scheduler."""
    weights_file = storage.join(folder, "diffusion_pytorch_model.safetensors")
    if not storage.exists(weights_file):
        raise DataError(f"{folder} has no diffusion_pytorch_model.safetensors: save it with safe_serialization=True")
    scheduler_file = storage.join(source, "scheduler", "scheduler_config.json")
    unet, scheduler = storage.read_json(storage.join(folder, "config.json")), {}
    if storage.exists(scheduler_file):
        scheduler = storage.read_json(scheduler_file)
    data = storage.read_bytes(weights_file)
    try:
        model, channels, size = interchange.section_from_diffusers(unet)
        diffusion, variance, clip = interchange.diffusion_from_diffusers(scheduler, model.learned_variance)
        config = Config(
            data=DataSection(size=size, channels=cast(Any, channels)),
            model=model,
            diffusion=diffusion,
            train=TrainSection(precision="fp32"),
            sample=SampleSection(variance=variance),
        )
    except (ValueError, TypeError, AttributeError, IndexError) as error:  # pydantic's errors are ValueErrors
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{source}: not the configuration of a diffusers model ({reason}): save it again") from None
    try:
        weights = interchange.from_diffusers(safetensors.torch.load(data))
    except safetensors.SafetensorError as error:
        raise DataError(f"{weights_file} is damaged or cut short ({error}): copy it again") from None
    settings = json.dumps([unet, scheduler], sort_keys=True)
    return _Model(config, weights, hashlib.sha256(data + settings.encode()).hexdigest(), clip)
