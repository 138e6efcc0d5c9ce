"""The U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B), with the options the field has added since.

Shapes: B images, C channels, H and W pixels, N = H·W tokens, E = 4·base_channels embedding features. Under autocast
the convolutions run in 16 bits; the embedding of time and class, the statistics of GroupNorm and softmax, and the
output are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelSection
from pipeline.errors import ConfigError
from pipeline.model import kernels
from pipeline.model.blocks import (
    Attention,
    Downsample,
    Float32Linear,
    GroupNorm,
    Head,
    ResidualBlock,
    Upsample,
    glorot,
)
from pipeline.model.recompute import RecomputeConv2d

Checkpointing = Literal["none", "attention", "blocks", "full"]


class Level(nn.Module):
    """One resolution: residual blocks, attention (or identity) after each, and the down- or upsampling layer."""

    def __init__(
        self, blocks: list[ResidualBlock], attentions: list[Attention | nn.Identity], resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample


# Modules of these types are recomputed in the backward pass, one by one. The outputs of blocks are skip connections,
# which are stored anyway, so one checkpoint for a whole level would save little memory and recompute more at once.
_CHECKPOINTED: dict[str, tuple[type[nn.Module], ...]] = {
    "none": (),
    "attention": (Attention,),
    "blocks": (Attention, ResidualBlock),
    "full": (Attention, ResidualBlock),
}


class UNet(nn.Module):
    """Noisy image, timestep and label → prediction.

    Weights are initialized from torch's global generator; seed it before. A level has attention if the shorter side of
    its feature map, for the image size given here, is one of `attention_sizes`; images of other sizes do not change it.

    Attributes:
        null_label: the label that stands for "no class", `num_classes`.
    """

    def __init__(self, section: ModelSection, *, channels: int, size: tuple[int, int]) -> None:
        """Build the network.

        Args:
            section: its architecture.
            channels: channels of the images.
            size: (H, W) of the training images.

        Raises:
            ConfigError: the size cannot be halved at each level, or `base_channels` or `head_channels` do not fit.
        """
        super().__init__()
        base, widths = section.base_channels, [section.base_channels * mult for mult in section.channel_mults]
        attends = [min(size) >> index in section.attention_sizes for index in range(len(widths))]
        _check_section(section, [width for width, attention in zip(widths, attends) if attention] + widths[-1:])
        self.halvings = len(widths) - 1
        self._check_size(*size)
        self.null_label = section.num_classes
        # All widths are multiples of the base, so one number of groups fits every norm, as in diffusers.
        groups, eps, embedding, dropouts = section.groups, section.norm_eps, 4 * base, section.dropout_by_level

        def block(in_channels: int, level: int, resample: Literal["down", "up"] | None = None) -> ResidualBlock:
            return ResidualBlock(
                in_channels,
                widths[level],
                embedding=embedding,
                groups=groups,
                eps=eps,
                dropout=dropouts[level],
                scale_shift=section.scale_shift,
                resample=resample,
            )

        def attention(width: int) -> Attention:
            return Attention(width, section.attention_heads(width), groups, eps)

        def level(index: int, inputs: list[int], resample: nn.Module | None) -> Level:
            return Level(
                [block(width, index) for width in inputs],
                [attention(widths[index]) if attends[index] else nn.Identity() for _ in inputs],
                resample,
            )

        self._sinusoids = partial(
            sinusoids,
            features=base,
            freq_shift=section.freq_shift,
            flip_sin_to_cos=section.flip_sin_to_cos,
            scale=section.timestep_scale,
        )
        self.time_mlp = nn.Sequential(
            glorot(Float32Linear(base, embedding)), nn.SiLU(), glorot(Float32Linear(embedding, embedding))
        )
        self.class_embedding = nn.Embedding(section.num_classes + 1, embedding) if section.num_classes else None
        self.conv_in = glorot(nn.Conv2d(channels, base, 3, padding=1))

        def resampling(level: int, direction: Literal["down", "up"]) -> nn.Module:
            if section.resample_blocks:
                return block(widths[level], level, direction)
            return (
                Upsample(widths[level]) if direction == "up" else Downsample(widths[level], section.downsample_padding)
            )

        blocks, skips, width, down, up = section.blocks_per_level, [base], base, [], []
        for index, out in enumerate(widths):
            halves = index < self.halvings
            down.append(level(index, [width] + [out] * (blocks - 1), resampling(index, "down") if halves else None))
            skips += [out] * (blocks + halves)
            width = out
        middle = Level([block(width, self.halvings), block(width, self.halvings)], [attention(width)])
        for index, out in reversed(list(enumerate(widths))):
            inputs = [features + skips.pop() for features in [width] + [out] * blocks]
            up.append(level(index, inputs, resampling(index, "up") if index else None))
            width = out
        self.down, self.middle, self.up = nn.ModuleList(down), middle, nn.ModuleList(up)
        self.head = Head(width, 2 * channels if section.learned_variance else channels, groups, eps)
        self.checkpointing = "none"

    @property
    def checkpointing(self) -> Checkpointing:
        """What is recomputed in the backward pass to save memory; may be set at any time.

        `attention`: attention, and the cheap layers before convolutions (concatenation, norm, activation, padding).
        `blocks`: also the first convolution of each residual block. `full`: also the convolutions of upsampling.
        """
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, policy: Checkpointing) -> None:
        self._checkpointing = policy
        for module in self.modules():
            if isinstance(module, RecomputeConv2d):
                module.recompute = policy != "none"

    def compile_blocks(self) -> None:
        """Compile each kind of block once: that takes less time than compiling the whole network.

        Copies of the network are not compiled. Checkpoints wrap the blocks and work as before.
        """
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock | Attention)]
        # torch counts all of them as compilations of one function, the one that calls modules.
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 2 * len(blocks))
        for block in blocks:
            block.compile(dynamic=False)

    def fuse_norms(self) -> None:
        """Compute GroupNorm, scale, shift and SiLU of blocks and head in one operation each. Copies keep the setting.

        Raises:
            ConfigError: the network is not on a CUDA device, or the package triton is not installed.
        """
        device = next(self.parameters()).device.type
        if device != "cuda":
            raise ConfigError(
                f"train.fused_norm needs a CUDA device, but the device is {device}: set train.fused_norm=false"
            )
        try:
            from pipeline.model.fused_norm import group_norm_silu  # triton is optional
        except ImportError as error:
            raise ConfigError(
                "train.fused_norm needs the package triton, which torch's CUDA builds bring on Linux: "
                "install such a build, or set train.fused_norm=false"
            ) from error
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.fused = group_norm_silu

    def cast_weights_to_bf16_(self) -> None:
        """Cast to bf16 the weights that autocast would cast at each call; outputs keep their bits. Not for training."""
        wide: list[nn.Module] = [module for module in self.modules() if isinstance(module, Float32Linear)]
        if kernels.on_cpu(next(self.parameters())):  # the CPU kernels of norms and upsampling take float32
            wide += [module for module in self.modules() if isinstance(module, nn.GroupNorm)]
            wide += [module.conv for module in self.modules() if isinstance(module, Upsample)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.Linear) and module not in wide:
                module.to(torch.bfloat16)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's raw output.

        Args:
            x: noisy images, (B, C, H, W), float32; H and W may differ from training, but must be divisible alike.
            t: int64, (B,), timesteps.
            labels: int64, (B,), in [0, num_classes]; `null_label` means no class; None means no class for all images.

        Returns:
            float32, (B, C, H, W), or (B, 2C, H, W) with learned variance: prediction, then variance.

        Raises:
            ConfigError: H or W cannot be halved at each level.
            ValueError: labels are given, but the network has no classes.
        """
        self._check_size(*x.shape[-2:])
        embedding = self._embed(t, labels)
        x = self.conv_in(x)
        skips = [x]
        for level in cast("Iterable[Level]", self.down):
            for block, attention in zip(level.blocks, level.attentions):
                x = self._run(attention, self._run(block, embedding, x))
                skips.append(x)
            if level.resample is not None:
                is_block = isinstance(level.resample, ResidualBlock)
                x = self._run(level.resample, embedding, x) if is_block else level.resample(x)
                skips.append(x)
        before, after = self.middle.blocks
        (attention,) = self.middle.attentions
        x = self._run(after, embedding, self._run(attention, self._run(before, embedding, x)))
        upsample: nn.Module = nn.Identity()
        for level in cast("Iterable[Level]", self.up):
            for block, attention in zip(level.blocks, level.attentions):
                x = self._run(attention, self._run_upsampled(upsample, block, embedding, x, skips.pop()))
                upsample = nn.Identity()
            if isinstance(level.resample, ResidualBlock):
                x = self._run(level.resample, embedding, x)
            else:
                upsample = level.resample or upsample
        output: Tensor = self.head(x)
        return output.to(embedding.dtype)

    def _embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """The embedding of timestep and class, after SiLU: (B, E) float32, the input of every block."""
        embedding: Tensor = self.time_mlp(self._sinusoids(t))
        if self.class_embedding is not None:
            labels = torch.full_like(t, self.null_label) if labels is None else labels
            embedding = embedding + self.class_embedding(labels)
        elif labels is not None:
            raise ValueError("labels given to a network without classes")
        return F.silu(embedding)

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if isinstance(module, _CHECKPOINTED[self.checkpointing]):
            # Non-reentrant: it restores the random state for dropout, and DDP and torch.compile understand it.
            recomputed: Tensor = checkpoint(module, *inputs, use_reentrant=False)
            return recomputed
        output: Tensor = module(*inputs)
        return output

    def _run_upsampled(
        self, upsample: nn.Module, block: nn.Module, embedding: Tensor, x: Tensor, skip: Tensor
    ) -> Tensor:
        if self.checkpointing == "full":
            both = lambda embedding, x, skip: block(embedding, upsample(x), skip)  # noqa: E731
            recomputed: Tensor = checkpoint(both, embedding, x, skip, use_reentrant=False)
            return recomputed
        return self._run(block, embedding, upsample(x), skip)

    def _check_size(self, height: int, width: int) -> None:
        multiple = 1 << self.halvings
        if height % multiple or width % multiple:
            fits = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise ConfigError(
                f"data.size: {height}x{width} cannot be halved {self.halvings} times, as the"
                f" {self.halvings + 1} levels of model.channel_mults need: use multiples of {multiple},"
                f" such as {fits[0]}x{fits[1]}"
            )


def sinusoids(
    t: Tensor, features: int, *, freq_shift: int = 1, flip_sin_to_cos: bool = False, scale: float = 1.0
) -> Tensor:
    """Sinusoidal embedding: sines, then cosines, of t at n = `features / 2` frequencies from 1 down to 1e-4.

    Args:
        t: timesteps, (B,).
        features: width of the embedding, even, at least 4.
        freq_shift: frequency i is 1e-4^(i / (n - freq_shift)), so with 0 the last is not quite 1e-4.
        flip_sin_to_cos: cosines, then sines.
        scale: of the timesteps.

    Returns:
        float32, (B, features).
    """
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(
        -math.log(1e4) * steps / (half - freq_shift)
    )  # this order of operations gives the same rounding as diffusers
    angles = (t.to(torch.float32) * scale)[:, None] * frequencies
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


def _check_section(section: ModelSection, widths: list[int]) -> None:
    if section.base_channels % 2 or section.base_channels < 4:
        raise ConfigError(f"model.base_channels: {section.base_channels} must be an even number of at least 4")
    common = math.gcd(*widths)
    for key in ("head_channels", "num_heads"):
        value = getattr(section, key) or 1
        if width := next((width for width in widths if width % value), None):
            largest = max(divisor for divisor in range(1, value) if common % divisor == 0)
            raise ConfigError(
                f"model.{key}: {value} does not divide the {width} channels of a level: set model.{key}={largest} (or "
                f"another divisor of {common})"
            )
