"""One step of training: batch → loss → gradients → update. Joins network, diffusion and noise for the job `train`.

Everything random in a step is keyed: timestep, noise and hidden labels by the sample's position in the order of the
data, dropout by the place of the micro-batch in the global batch. So a step does the same on any number of ranks.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import keyed_random
from pipeline.checkpoints import ema_snapshots
from pipeline.cluster.world import World
from pipeline.config import Config, SamplingOptions
from pipeline.data.images.contact_sheet import grid
from pipeline.data.loading.batches import Batch
from pipeline.data.loading.order import default_lanes
from pipeline.diffusion import objective
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.samplers import from_uint8, to_uint8
from pipeline.errors import ConfigError, Diverged
from pipeline.keyed_random import Use
from pipeline.model import ema as averaging
from pipeline.model.denoiser import Denoiser
from pipeline.model.torch_flags import set_torch_flags
from pipeline.model.unet import Checkpointing, UNet
from pipeline.monitoring.flops import flops_of
from pipeline.sampling.generator import Generator
from pipeline.training.learning_rate import learning_rate
from pipeline.training.micro_batch import choose_what_fits, reset_peak_bytes, sizes_to_try
from pipeline.training.optimizer import make_adam, named_state, step_unless
from pipeline.training.train_state import TrainState

REMEDY = "lower train.lr, or set train.precision=fp32"
"""Against steps that are not finite."""


@dataclass(frozen=True)
class Gradient:
    """What a forward and backward pass over this rank's share of a global batch gave."""

    losses: Tensor
    """Per sample, (n,)."""
    t: Tensor
    """Timesteps, (n,)."""
    norm: Tensor
    """Of the whole gradient, before clipping."""
    finite: Tensor
    """Whether losses and norm are; on this rank."""


class StepVote(NamedTuple):
    """What the ranks vote on at each step; of each value the highest of all ranks counts."""

    bad: int
    """1 if loss or gradient is not finite on some rank. The device itself then leaves the weights as they are."""
    stop: int
    """A reason to stop, as its index in `interrupt.REASONS`; 0 for none."""
    lost: int
    """1 if another job has taken over the run."""


def _network(config: Config) -> UNet:
    try:
        return UNet(config.model, channels=config.data.channels, size=config.data.height_width)
    except RuntimeError as error:
        if not re.search("allocate memory|calculation overflowed", str(error)):
            raise
        raise ConfigError(
            "the memory is too small for the weights of the network: lower model.base_channels or model.channel_mults"
        ) from error


class Trainer:
    """Network, moving average, optimizer and state of a run, equal on every rank.

    Attributes:
        state: where the run stands.
        flops: floating-point operations of a step on one rank, forward and backward, without what is computed twice to
            save memory; known after `choose_micro_batch`.

    Args:
        config: with all lengths in steps.
        world: the ranks.
        weights: of the network to start from; without them they follow from the seed.

    Raises:
        ConfigError: the settings do not go together.
    """

    def __init__(self, config: Config, world: World, weights: dict[str, Tensor] | None = None) -> None:
        section = config.train
        set_torch_flags(deterministic=section.deterministic, benchmark=not section.deterministic)
        torch.manual_seed(keyed_random.seed_from(section.seed))
        self.config, self.world = config, world
        self.model = _network(config)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        lengths = section.ema_lengths if config.run.ema_snapshot_every else ()
        self.ema = averaging.Average(
            self.model, section.ema_decay, on_host=section.ema_device == "cpu", lengths=lengths
        )
        if section.fused_norm:  # after the copy for the average, which may lie on the host
            self.model.fuse_norms()
        self.optimizer = make_adam(self.model, section.lr)
        self._network = world.data_parallel(self.model, section.gradient_compression) if world.size > 1 else self.model
        self._process = DiffusionProcess.of(
            config.diffusion,
            variance=config.model.reverse_variance(config.sample.variance),
            clip=config.sample.clip,
        ).to(world.device)
        self.state = TrainState(lanes=config.data.lanes or default_lanes(section.global_batch))
        self.flops = 0.0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The live tensors of a run: part of a checkpoint → name → tensor."""
        parts = {
            "model": {name: tensor.detach() for name, tensor in self.model.state_dict().items()},
            "ema": averaging.ema_state(self.ema)[0],
            "optimizer": named_state(self.optimizer, self.model),
        }
        powers = self.ema.powers.tensors()
        return parts | ({ema_snapshots.PART: powers} if powers else {})

    def choose_micro_batch(self) -> None:
        """Choose micro-batch and checkpointing policy: as configured, as in the checkpoint, or by trying what fits.

        Raises:
            ConfigError: the micro-batch does not divide the share of a rank, or nothing fits into memory.
        """
        section, world, state = self.config.train, self.world, self.state
        if section.global_batch % world.size:
            raise ConfigError(
                f"train.global_batch {section.global_batch} is not a multiple of {world.size} processes: change either"
            )
        share = section.global_batch // world.size
        if section.micro_batch != "auto" and share % section.micro_batch:
            raise ConfigError(
                f"train.micro_batch {section.micro_batch} does not divide the {share} images of a rank "
                f"(global batch {section.global_batch} on {world.size} processes): take a divisor of {share}, or auto"
            )
        sizes = sizes_to_try(share, world.device)
        fixed = section.micro_batch if section.micro_batch != "auto" else state.micro_batch
        if fixed and share % fixed == 0:
            sizes = [fixed]
        policies: list[Checkpointing] = ["none", "attention", "blocks", "full"]
        if section.checkpointing != "auto":
            policies = [section.checkpointing]
        elif world.device.type != "cuda":
            policies = ["none"]
        elif fixed and fixed == state.micro_batch:
            policies = [state.checkpointing]
        if len(sizes) * len(policies) > 1:
            policies[0], sizes[0] = choose_what_fits(self._fits, policies, sizes)
        state.checkpointing, state.micro_batch = policies[0], sizes[0]
        self.flops = share * self._flops_per_image()
        self.model.checkpointing = state.checkpointing
        if section.compile:  # not before, or each trial would be compiled too
            self.model.compile_blocks()
        reset_peak_bytes(world.device)

    def warm_up(self) -> None:
        """One backward pass without effect, after which every step reduces gradients in the same order.

        DistributedDataParallel rebuilds its buckets after its first backward pass. From three ranks on that changes
        the order of summation, and with it the bits of the first step after a resume.
        """
        if self.world.size > 1:
            self._probe(self._network, self.state.micro_batch)

    def gradient(self, batch: Batch) -> Gradient:
        """Clipped gradients of a step, summed over this rank's micro-batches and averaged over ranks."""
        share, micro = len(batch.positions), self.state.micro_batch
        losses, timesteps = [], []
        for start in range(0, share, micro):
            part = Batch(*(tensor[start : start + micro] for tensor in (batch.images, batch.labels, batch.positions)))
            place = (self.world.rank * share + start) // micro
            torch.manual_seed(keyed_random.seed_from(self.config.train.seed, self.state.step, place))
            with self._alone(last=start + micro == share):
                loss, t = self._losses(part)
                (loss.mean() * (micro / share)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            timesteps.append(t)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        all_losses = torch.cat(losses)
        return Gradient(all_losses, torch.cat(timesteps), norm, all_losses.isfinite().all() & norm.isfinite())

    def finish_step(self, gradient: Gradient, *, stop: int = 0, lost: bool = False) -> StepVote:
        """Let the ranks vote on a step, and take it if it is good: one small all-reduce, one wait for the device.

        The pass of the optimizer is queued before the host waits for the vote, so that a GPU has work meanwhile; the
        device itself leaves the weights as they are if the step is bad. No rank may skip a vote.

        Args:
            gradient: of this rank.
            stop: why this rank wants to stop, as an index of `interrupt.REASONS`; 0 for not at all.
            lost: whether this rank has seen that another job holds the run.

        Raises:
            Diverged: too many bad steps in a row.
        """
        section, state = self.config.train, self.state
        pending = self.world.all_reduce_max_async(~gradient.finite, stop, lost)
        with self.ema.track_step():
            step_unless(pending.values[0], self.optimizer, learning_rate(state.step, section))
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.samples += section.global_batch
        vote = StepVote(*pending.read())
        if not vote.bad:
            self.ema.update()
            state.ema_updates += 1
            state.bad_in_a_row = 0
            return vote
        state.bad_steps += 1
        state.bad_in_a_row += 1
        if state.bad_in_a_row >= section.max_bad_steps:
            raise Diverged(
                f"loss or gradient was not finite in {state.bad_in_a_row} steps in a row, up to step {state.step}: "
                f"{REMEDY}"
            )
        return vote

    def is_sound(self) -> bool:
        """Whether all weights are finite and give a finite loss and gradient for noise, on every rank. Changes nothing.

        It depends on the weights alone and not on data. Weights may be finite and so large that no step follows.
        One image is enough, as every weight takes part, and costs far less than a step.
        """
        torch.manual_seed(keyed_random.seed_from(self.config.train.seed))
        seed, data, tensors = self.config.train.seed, self.config.data, self.tensors()
        ids = torch.arange(1, device=self.world.device)
        shape = (data.channels, *data.height_width)
        images = to_uint8(keyed_random.normals(seed, ids, Use.SAMPLE_START, shape))
        t = keyed_random.integers(seed, ids, Use.VALIDATION_TIMESTEP, self.config.diffusion.timesteps)
        epsilon = keyed_random.normals(seed, ids, Use.VALIDATION_NOISE, shape)
        with torch.compiler.set_stance("force_eager"):  # or all blocks would be compiled again for one image
            loss = self._objective(self.model, images, t, epsilon, ids).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.optimizer.zero_grad(set_to_none=True)
        values = (loss, norm, *tensors["model"].values(), *tensors["ema"].values())
        finite = torch.stack([value.isfinite().all().to(self.world.device) for value in values]).all()
        return not self.world.all_reduce_max(~finite)[0]

    @torch.no_grad()
    def validation_loss(self, batch: Batch) -> float:
        """Mean loss of the averaged weights over all ranks' images, each at its own fixed timestep and noise."""
        seed, world, network = self.config.train.seed, self.world, self.ema.network()
        total, micro_batch = torch.zeros(2, dtype=torch.float64, device=world.device), self.state.micro_batch
        for start in range(0, len(batch.positions), micro_batch):
            images, labels, ids = (
                tensor[start : start + micro_batch].to(world.device)
                for tensor in (batch.images, batch.labels, batch.positions)
            )
            t = keyed_random.integers(seed, ids, Use.VALIDATION_TIMESTEP, self.config.diffusion.timesteps)
            epsilon = keyed_random.normals(seed, ids, Use.VALIDATION_NOISE, tuple(images.shape[1:]))
            losses = self._objective(network, images, t, epsilon, labels)
            total += torch.stack((losses.sum(), losses.new_tensor(len(ids)))).to(torch.float64)
        loss_sum, count = world.sum(total).tolist()
        return float(loss_sum / count)

    def preview(self) -> NDArray[np.uint8]:
        """A sheet of images from seeds 0, 1, …, drawn with the averaged weights, each rank drawing its share."""
        run, world = self.config.run, self.world
        each = -(-run.preview_samples // world.size)
        steps = min(run.preview_steps, self.config.diffusion.timesteps)
        own = SamplingOptions(sampler="ddim", steps=steps, batch=each)
        guiding = ("guidance", "guidance_interval", "dynamic_threshold", "label")
        options = own.model_copy(update={key: getattr(self.config.sample, key) for key in guiding})
        generator = self.generator()
        seeds = range(world.rank * each, (world.rank + 1) * each)
        mine = [image for _, image in generator.images(seeds, options)]
        images = world.gather(torch.from_numpy(np.stack(mine)).to(world.device))
        return grid(images[: run.preview_samples].cpu().numpy())

    def generator(self) -> Generator:
        """Draws with the averaged weights of this step; the next step changes them."""
        return Generator(self.config, self.ema.network(), self._process, self.world.device)

    def _alone(self, *, last: bool) -> AbstractContextManager[None]:
        """Ranks talk only in the last micro-batch of a step."""
        if last or self.world.size == 1:
            return nullcontext()
        return self._network.no_sync()  # type: ignore[no-any-return, operator]

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses (n,) of a micro-batch at its keyed timesteps (n,)."""
        seed, device = self.config.train.seed, self.world.device
        images, labels, ids = (
            tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.labels, batch.positions)
        )
        t, epsilon, dropout_draw = keyed_random.training_draws(
            seed, ids, self.config.diffusion.timesteps, tuple(images.shape[1:])
        )
        hidden = dropout_draw < self.config.model.label_dropout
        labels = torch.where(hidden, self.config.model.num_classes, labels)
        return self._objective(self._network, images, t, epsilon, labels), t

    def _objective(self, network: nn.Module, images: Tensor, t: Tensor, epsilon: Tensor, labels: Tensor) -> Tensor:
        x0 = from_uint8(images).contiguous(memory_format=torch.channels_last)
        return objective.loss(
            self._denoiser(network).with_labels(labels), x0, t, epsilon, self._process, self.config.diffusion
        )

    def _denoiser(self, network: nn.Module) -> Denoiser:
        return Denoiser(network, self.config.train.precision, self.config.model.num_classes)

    def _flops_per_image(self) -> int:
        self.model.checkpointing = "none"
        return flops_of(lambda: self._probe(self.model, 1))

    def _fits(self, checkpointing: Checkpointing, micro_batch: int) -> bool:
        """Try it on every rank at once, for a rank that has less memory than the others decides.

        A step of several micro-batches holds all gradients from its second pass on; with DDP their buckets are there.
        """
        self.model.checkpointing, short = checkpointing, False
        accumulates = self.world.size == 1 and micro_batch < self.config.train.global_batch
        try:
            self._probe(self.model, micro_batch, passes=1 + accumulates)
        except torch.OutOfMemoryError:
            short = True
        return not self.world.all_reduce_max(short)[0]

    def _probe(self, network: nn.Module, micro_batch: int, passes: int = 1) -> None:
        """Forward and backward passes over blank images that leave no trace in weights or gradients."""
        data, device = self.config.data, self.world.device
        x = torch.zeros(micro_batch, data.channels, *data.height_width, device=device)
        t = torch.zeros(micro_batch, dtype=torch.int64, device=device)
        for _ in range(passes):
            (self._denoiser(network)(x, t, t).sum() * 0).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)
