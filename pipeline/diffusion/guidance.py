"""Guidance: a network steered towards its label, or away from a worse network. Pure; shapes as in `process`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.process import Denoise, split

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`Denoise` with labels, (B,) int64, as third argument; None for a network without classes."""
Interval = tuple[int, int] | None
"""First and last timestep with guidance; None: all timesteps."""


def label_guided(network: Network, labels: Tensor, null_label: int, scale: float, interval: Interval = None) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), in one pass of twice the batch.

    The prediction is null + scale · (labelled - null): 1 is the plain conditional network (and costs no second half),
    0 the unconditional one. The learned variance comes from the labelled half.

    Args:
        network: images, timesteps, labels → output.
        labels: int64, (B,).
        null_label: the label that hides the class.
        scale: strength of guidance.
        interval: timesteps with guidance; others get the plain network (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    """
    both = torch.cat((labels, torch.full_like(labels, null_label)))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        labelled, null = network(torch.cat((x, x)), torch.cat((t, t)), both).to(x.dtype).chunk(2)
        return _extrapolated(null, labelled, scale, x.shape[1])

    return _within(interval, guided, _bound(network, labels)) if scale != 1 else _bound(network, labels)


def autoguided(
    network: Network, guide: Network, labels: Tensor | None, scale: float, interval: Interval = None
) -> Denoise:
    """Autoguidance by a worse network (Karras et al. 2024, arXiv:2406.02507): guide + scale · (network - guide).

    Arguments as for `label_guided`; without classes, `labels` is None.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        good, bad = network(x, t, labels).to(x.dtype), guide(x, t, labels).to(x.dtype)
        return _extrapolated(bad, good, scale, x.shape[1])

    return _within(interval, guided, _bound(network, labels)) if scale != 1 else _bound(network, labels)


def _bound(network: Network, labels: Tensor | None) -> Denoise:
    """The network with its labels fixed."""
    return lambda x, t: network(x, t, labels)


def _within(interval: Interval, guided: Denoise, plain: Denoise) -> Denoise:
    """`guided` at the timesteps of the interval, `plain` at others; all images of a batch are at one timestep."""
    if interval is None:
        return guided
    first, last = interval
    return lambda x, t: (guided if first <= int(t[0]) <= last else plain)(x, t)


def _extrapolated(worse: Tensor, better: Tensor, scale: float, channels: int) -> Tensor:
    """The prediction worse + scale · (better - worse); the learned variance is that of `better`."""
    (prediction, mixture), (from_prediction, _) = split(better, channels), split(worse, channels)
    steered = from_prediction + scale * (prediction - from_prediction)
    return steered if mixture is None else torch.cat((steered, mixture), dim=1)
