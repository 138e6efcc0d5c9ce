"""The reference article's network, re-typed from what is known of it.

That is a U-Net of 34.7 M parameters with attention and a sinusoidal time embedding, which in float32 at batch 128 keeps
22 GiB for the backward pass at 64 px and 119.5 GiB at 128 px. Its code is not at hand. So this is the plain U-Net of
its time with widths fitted to these figures (34.8 M, 21.9 GiB, 119.3 GiB): GroupNorm, SiLU and convolution, twice in a
block, two blocks a level on the way down and three on the way up; attention in two levels and the middle, written out
in matrix products, so that its weights of every pixel for every other are kept (hence more than five times the memory
for four times the pixels). One defect is left out: its layers in a plain list, of which half are never trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from torch import Tensor, nn

CHANNELS = (128, 160, 256, 288)
ATTENDS = (False, True, True, False)
BLOCKS = 2
TIME = 512


class Block(nn.Module):
    """Two convolutions beside a shortcut; the time enters between them."""

    def __init__(self, in_channels: int, out_channels: int, time: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, in_channels), nn.GroupNorm(groups, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels, groups) if attends else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Features (B, C, H, W) and the time's (B, T) → (B, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.attention(self.conv2(F.silu(self.norm2(h))) + self.shortcut(x))


class Attention(nn.Module):
    """Every pixel looks at all others, in plain matrix products."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=2)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(dim=2)
        return x + self.out(weights @ v).transpose(1, 2).reshape(x.shape)


class ArticleNet(nn.Module):
    """Noisy image, timestep and, if there are classes, class → noise.

    Args:
        channels: of each level, multiples of a quarter of the first, which is the number of groups of each norm.
        time: features of the embedding of time and class.
        classes: the article has none; they are added to the time, as in the networks that have them.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, time: int = TIME, classes: int = 0) -> None:
        super().__init__()
        width = self._width = channels[0]
        groups = width // 4
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.classes = nn.Embedding(classes, time) if classes else None
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up, kept = nn.ModuleList(), nn.ModuleList(), [width]
        for level, out in enumerate(channels):
            for _ in range(BLOCKS):
                self.down.append(Block(width, out, time, groups, ATTENDS[level]))
                width = out
                kept.append(width)
            if level < len(channels) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                kept.append(width)
        self.middle = nn.ModuleList([Block(width, width, time, groups, True), Block(width, width, time, groups, False)])
        for level, out in reversed(list(enumerate(channels))):
            for _ in range(BLOCKS + 1):
                self.up.append(Block(width + kept.pop(), out, time, groups, ATTENDS[level]))
                width = out
            if level:
                self.up.append(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1))
        self.last = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, 3, H, W), (B,) and (B,) → (B, 3, H, W)."""
        half = self._width // 2
        angles = t[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(1e4) / (half - 1)))
        time = self.time(torch.cat((angles.sin(), angles.cos()), dim=1))
        if self.classes is not None:
            time = time + self.classes(labels)
        kept = [x := self.first(x)]
        for layer in self.down:
            x = layer(x, time) if isinstance(layer, Block) else layer(x)
            kept.append(x)
        for block in self.middle:
            x = block(x, time)
        for layer in self.up:
            x = layer(torch.cat((x, kept.pop()), dim=1), time) if isinstance(layer, Block) else layer(x)
        return self.last(x)
