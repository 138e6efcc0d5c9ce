"""One step of training: batch → loss → gradients → update. Joins network, diffusion and noise for the job `train`.

Everything random in a step is keyed: timestep, noise and hidden labels by the sample's position in the order of the
data, dropout by the place of the micro-batch in the global batch. So a step does the same on any number of ranks.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import noise
from pipeline.config import Config
from pipeline.data.batches import Batch
from pipeline.data.grid import grid
from pipeline.diffusion import objective
from pipeline.diffusion.samplers import from_uint8
from pipeline.diffusion.schedule import make_schedule
from pipeline.errors import ConfigError
from pipeline.generator import Generator, Manner, autocast
from pipeline.model import ema as averaging
from pipeline.model.unet import Checkpointing, UNet
from pipeline.noise import Use
from pipeline.run import memory
from pipeline.run.flops import flops_of
from pipeline.run.learning_rate import learning_rate
from pipeline.run.optimizer import make_adam, named_state, step_unless
from pipeline.run.world import Agreement, World


@dataclass
class Position:
    """Where a run stands: with the tensors, all that a resume needs."""

    step: int = 0
    """Finished steps."""
    samples: int = 0
    """Samples consumed; the data goes on there."""
    ema_updates: int = 0
    bad_steps: int = 0
    """Steps left out because loss or gradient was not finite."""
    bad_in_a_row: int = 0
    lanes: int = 0
    """Streams of the order of the data; fixed when the run starts."""
    micro_batch: int = 0
    checkpointing: Checkpointing = "none"


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


class Verdict(NamedTuple):
    """What the ranks agree on at each step: the highest value of all. The device acts on `bad`, the host on all."""

    bad: int
    """Whether loss or gradient is not finite on some rank."""
    stop: int
    """A reason to stop, or 0."""
    lost: int
    """Whether another job holds the run."""


class Trainer:
    """Network, its average, optimizer and schedule, equal on every rank.

    Attributes:
        flops: of a step on one rank, forward and backward, in the form that its device computes, without what is
            computed twice; once settled.

    Args:
        config: with all lengths in steps.
        world: the ranks.
        weights: to start from; otherwise keyed by the seed.

    Raises:
        ConfigError: the settings do not go together.
    """

    def __init__(self, config: Config, world: World, weights: dict[str, Tensor] | None = None) -> None:
        section = config.train
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        torch.backends.cudnn.benchmark = not section.deterministic
        if section.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
        torch.use_deterministic_algorithms(section.deterministic)
        torch.manual_seed(noise.mix(section.seed))
        self.config, self.world = config, world
        self.model = UNet(config.model, channels=config.data.channels, size=config.data.height_width)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = averaging.Average(self.model, section.ema_decay, on_host=section.ema_device == "cpu")
        self.optimizer = make_adam(self.model, section.lr)
        self._network = world.data_parallel(self.model, section.gradient_compression) if world.size > 1 else self.model
        self._schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps).to(world.device)
        self._undecided: Agreement | None = None
        self.flops = 0.0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The live tensors of a run, by part of a checkpoint and by name.

        Raises:
            RuntimeError: a verdict is open, so that the average is a step behind.
        """
        if self._undecided:
            raise RuntimeError("the verdict on the last step is open: call `conclude` first")
        return {
            "model": {name: tensor.detach() for name, tensor in self.model.state_dict().items()},
            "ema": averaging.ema_state(self.ema)[0],
            "optimizer": named_state(self.optimizer, self.model),
        }

    def settle(self, position: Position) -> None:
        """Settle micro-batch and checkpointing: as configured, as stored with the run, or by trying what fits.

        Raises:
            ConfigError: the global batch cannot be divided like that, or nothing fits.
        """
        section, world = self.config.train, self.world
        if section.global_batch % world.size:
            raise ConfigError(
                f"train.global_batch {section.global_batch} is not a multiple of {world.size} processes: change either"
            )
        share = section.global_batch // world.size
        if section.micro_batch != "auto" and share % section.micro_batch:
            raise ConfigError(
                f"train.micro_batch {section.micro_batch} does not divide the {share} pictures of a rank "
                f"(global batch {section.global_batch} on {world.size} processes): take a divisor of {share}, or auto"
            )
        sizes = memory.micro_batches(share, world.device)
        fixed = section.micro_batch if section.micro_batch != "auto" else position.micro_batch
        if fixed and share % fixed == 0:
            sizes = [fixed]
        policies: list[Checkpointing] = ["none", "attention", "blocks", "full"]
        if section.checkpointing != "auto":
            policies = [section.checkpointing]
        elif world.device.type != "cuda":
            policies = ["none"]
        elif fixed and fixed == position.micro_batch:
            policies = [position.checkpointing]
        if len(sizes) * len(policies) > 1:
            policies[0], sizes[0] = memory.what_fits(self._fits, policies, sizes)
        position.checkpointing, position.micro_batch = policies[0], sizes[0]
        self.flops = share * self._flops_per_picture()
        self.model.checkpointing = position.checkpointing
        if section.compile:  # not before, or each trial would be compiled too
            self.model.compile_blocks()
        memory.forget_peak(world.device)

    def warm_up(self, micro_batch: int) -> None:
        """One backward pass without effect, after which every step reduces gradients in the same order.

        DistributedDataParallel rebuilds its buckets after its first backward pass. From three ranks on that changes
        the order of summation, and with it the bits of the first step after a resume.
        """
        if self.world.size > 1:
            self._probe(self._network, micro_batch)

    def gradient(self, batch: Batch, position: Position) -> Gradient:
        """Clipped gradients of a step, summed over this rank's micro-batches and averaged over ranks."""
        share, micro = len(batch.positions), position.micro_batch
        losses, timesteps = [], []
        for start in range(0, share, micro):
            part = Batch(*(tensor[start : start + micro] for tensor in (batch.images, batch.labels, batch.positions)))
            place = (self.world.rank * share + start) // micro
            torch.manual_seed(noise.mix(self.config.train.seed, position.step, place))
            with self._alone(last=start + micro == share):
                loss, t = self._losses(part)
                (loss.mean() * (micro / share)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            timesteps.append(t)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        all_losses = torch.cat(losses)
        return Gradient(all_losses, torch.cat(timesteps), norm, all_losses.isfinite().all() & norm.isfinite())

    def update(self, position: Position, verdict: Agreement) -> None:
        """Queue the step, which the device leaves out if it is bad; `conclude` before the next one.

        Args:
            position: where the run stands.
            verdict: a `Verdict`, agreed on, which this does not wait for.
        """
        with self.ema.following():
            step_unless(verdict.values[0], self.optimizer, learning_rate(position.step, self.config.train))
        self.optimizer.zero_grad(set_to_none=True)
        self._undecided = verdict
        position.step += 1
        position.samples += self.config.train.global_batch

    def conclude(self, position: Position) -> Verdict:
        """Read the verdict on the last step, if that is not done yet, and do what follows from it.

        A good step moves the average, which must come before the next update; a bad one changes nothing but counters.
        On a GPU this is best called when the next gradient is queued: then the device never waits for the host.

        Raises:
            ConfigError: too many bad steps in a row.
        """
        if not self._undecided:
            return Verdict(0, 0, 0)
        verdict, self._undecided = Verdict(*self._undecided.read()), None
        if not verdict.bad:
            self.ema.update()
            position.ema_updates += 1
            position.bad_in_a_row = 0
            return verdict
        position.bad_steps += 1
        position.bad_in_a_row += 1
        if position.bad_in_a_row >= self.config.train.max_bad_steps:
            raise ConfigError(
                f"loss or gradient was not finite in {position.bad_in_a_row} steps in a row, up to step "
                f"{position.step}: lower train.lr, or take train.precision=fp32; the newest checkpoint is unharmed"
            )
        return verdict

    @torch.no_grad()
    def validation_loss(self, pictures: Batch, micro_batch: int) -> float:
        """Mean loss of the averaged weights over all ranks' pictures, each at its own fixed timestep and noise."""
        seed, world, network = self.config.train.seed, self.world, self.ema.network()
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        for start in range(0, len(pictures.positions), micro_batch):
            images, labels, ids = (
                tensor[start : start + micro_batch].to(world.device)
                for tensor in (pictures.images, pictures.labels, pictures.positions)
            )
            t = noise.integers(seed, ids, Use.VALIDATION_TIMESTEP, self.config.diffusion.timesteps)
            epsilon = noise.normals(seed, ids, Use.VALIDATION_NOISE, tuple(images.shape[1:]))
            losses = self._objective(network, images, t, epsilon, labels)
            total += torch.stack((losses.sum(), losses.new_tensor(len(ids)))).to(torch.float64)
        loss_sum, count = world.sum(total).tolist()
        return float(loss_sum / count)

    def preview(self) -> NDArray[np.uint8]:
        """A sheet of pictures from seeds 0, 1, …, drawn with the averaged weights, each rank drawing its share."""
        run, world = self.config.run, self.world
        each = -(-run.preview_samples // world.size)
        steps = min(run.preview_steps, self.config.diffusion.timesteps)
        settings = self.config.sample.model_copy(
            update={"sampler": "ddim", "eta": 0.0, "steps": steps, "batch": each, "compile": False}
        )
        generator = Generator(self.config, self.ema.network(), self._schedule, world.device)
        seeds = range(world.rank * each, (world.rank + 1) * each)
        mine = [picture for _, picture in generator.pictures(seeds, Manner(settings, self.config.train.precision))]
        pictures = world.gather(torch.from_numpy(np.stack(mine)).to(world.device))
        return grid(pictures[: run.preview_samples].cpu().numpy())

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
        t, epsilon, lot = noise.of_training(seed, ids, self.config.diffusion.timesteps, tuple(images.shape[1:]))
        hidden = lot < self.config.model.label_dropout
        labels = torch.where(hidden, self.config.model.num_classes, labels)
        return self._objective(self._network, images, t, epsilon, labels), t

    def _objective(self, network: nn.Module, images: Tensor, t: Tensor, epsilon: Tensor, labels: Tensor) -> Tensor:
        labels = torch.where(labels < 0, self.config.model.num_classes, labels)  # a picture without a class
        config, x0 = self.config, from_uint8(images).contiguous(memory_format=torch.channels_last)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            with autocast(self.world.device, config.train.precision):
                output: Tensor = network(x, t, labels if config.model.num_classes else None)
            return output

        return objective.loss(
            denoise, x0, t, epsilon, self._schedule,
            prediction_type=config.diffusion.prediction_type, loss_weighting=config.diffusion.loss_weighting,
            min_snr_gamma=config.diffusion.min_snr_gamma, learned_variance=config.model.learned_variance,
        )  # fmt: skip

    def _flops_per_picture(self) -> int:
        self.model.checkpointing = "none"
        return flops_of(lambda: self._probe(self.model, 1))

    def _fits(self, checkpointing: Checkpointing, micro_batch: int) -> bool:
        """Try it on every rank at once, for a rank that has less memory than the others decides."""
        self.model.checkpointing, short = checkpointing, False
        try:
            self._probe(self.model, micro_batch)
        except torch.OutOfMemoryError:
            short = True
        return not self.world.agree(short)[0]

    def _probe(self, network: nn.Module, micro_batch: int) -> None:
        """A forward and backward pass over blank pictures that leaves no trace in weights or gradients."""
        data, device = self.config.data, self.world.device
        x = torch.zeros(micro_batch, data.channels, *data.height_width, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        t = torch.zeros(micro_batch, dtype=torch.int64, device=device)
        with autocast(device, self.config.train.precision):
            output = network(x, t, t if self.config.model.num_classes else None)
        (output.sum() * 0).backward()
        self.optimizer.zero_grad(set_to_none=True)
