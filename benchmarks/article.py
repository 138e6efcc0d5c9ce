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

    def __init__(self, in_channels: int, out_channels: int, attends: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, in_channels), nn.GroupNorm(32, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(TIME, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels) if attends else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Features (B, C, H, W) and the time's (B, T) → (B, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.attention(self.conv2(F.silu(self.norm2(h))) + self.shortcut(x))


class Attention(nn.Module):
    """Every pixel looks at all others, in plain matrix products."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=2)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(dim=2)
        return x + self.out(weights @ v).transpose(1, 2).reshape(x.shape)


class ArticleNet(nn.Module):
    """Noisy image and timestep → noise."""

    def __init__(self) -> None:
        super().__init__()
        width = CHANNELS[0]
        self.time = nn.Sequential(nn.Linear(width, TIME), nn.SiLU(), nn.Linear(TIME, TIME))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up, kept = nn.ModuleList(), nn.ModuleList(), [width]
        for level, out in enumerate(CHANNELS):
            for _ in range(BLOCKS):
                self.down.append(Block(width, out, ATTENDS[level]))
                width = out
                kept.append(width)
            if level < len(CHANNELS) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                kept.append(width)
        self.middle = nn.ModuleList([Block(width, width, True), Block(width, width, False)])
        for level, out in reversed(list(enumerate(CHANNELS))):
            for _ in range(BLOCKS + 1):
                self.up.append(Block(width + kept.pop(), out, ATTENDS[level]))
                width = out
            if level:
                self.up.append(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1))
        self.last = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 3, H, W) and (B,) → (B, 3, H, W)."""
        half = CHANNELS[0] // 2
        angles = t[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(1e4) / (half - 1)))
        time = self.time(torch.cat((angles.sin(), angles.cos()), dim=1))
        kept = [x := self.first(x)]
        for layer in self.down:
            x = layer(x, time) if isinstance(layer, Block) else layer(x)
            kept.append(x)
        for block in self.middle:
            x = block(x, time)
        for layer in self.up:
            x = layer(torch.cat((x, kept.pop()), dim=1), time) if isinstance(layer, Block) else layer(x)
        return self.last(x)
