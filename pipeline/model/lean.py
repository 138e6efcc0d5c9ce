"""A convolution that keeps less for the backward pass than autograd would, for the same numbers.

What stands before a convolution (a joint of two tensors, a norm, an activation, dropout, padding) is cheap, and each of
its results is as large as its input, yet autograd keeps them all. Here the input alone is kept, and the rest is
computed again when the backward pass needs it; the convolution itself is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge


class LeanConv2d(nn.Conv2d):
    """A convolution together with what is done to its input.

    Attributes:
        lean: whether only the inputs are kept; may be set at any time.
    """

    lean = False

    def forward(self, input: Tensor, *more: Tensor, prepare: Callable[..., Tensor] | None = None) -> Tensor:
        """Convolves `prepare(input, *more)`, or the input itself.

        Args:
            input: (B, C, H, W); lean, it sets the dtype of the convolution, and autocast does not.
            more: whatever else `prepare` takes that needs a gradient, all floating-point.
            prepare: a cheap function that returns a new tensor. What it draws at random comes from the default
                generator of the input's device, and is drawn again alike.

        Returns:
            (B, C', H', W')
        """
        if prepare is None:
            return super().forward(input)
        if not self.lean or torch.compiler.is_compiling():  # a compiler finds by itself what to compute twice
            return super().forward(prepare(input, *more))
        assert self.bias is not None
        with torch.autocast(input.device.type, enabled=False):
            kept = _Keep.apply(self.weight.to(input.dtype), input, *more)  # type: ignore[no-untyped-call]
            bias = self.bias.to(input.dtype)
            convolved: Tensor = _Convolve.apply(self, prepare, kept[0].grad_fn, bias, *kept)  # type: ignore[no-untyped-call]
        return convolved


class _Keep(torch.autograd.Function):
    """Keeps its inputs and hands them on.

    What a function saves counts as saved when it has run. Saved ahead of the convolution, it lets a checkpoint around
    both stop there: the convolution is not computed again just to reach what it saves.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        # `view_as` would change the strides of channels-last tensors of one picture, and with them what kernels do.
        return tuple(torch.ops.aten.alias(tensor) for tensor in inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        conv: nn.Conv2d,
        prepare: Callable[..., Tensor],
        kept: Any,
        bias: Tensor,
        weight: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.conv, ctx.prepare, ctx.kept = conv, prepare, kept
        ctx.random_state = _generator(bias.device).get_state()
        return F.conv2d(prepare(*inputs), weight, bias, conv.stride, conv.padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.kept.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        prepared = _again(ctx.prepare, inputs, ctx.random_state)
        # All of these are large: each goes as soon as it can, and each comes in the layout that its kernels take.
        end, in_order = get_gradient_edge(prepared), prepared.is_contiguous()
        values = prepared.detach()
        del prepared
        if weight.is_contiguous(memory_format=torch.channels_last):
            values = values.contiguous(memory_format=torch.channels_last)
        shape = ([weight.shape[0]], ctx.conv.stride, ctx.conv.padding, (1, 1), False, [0, 0], 1)
        to_values, to_weight, to_bias = torch.ops.aten.convolution_backward(
            gradient, values, weight, *shape, [True, True, True]
        )
        del values
        if in_order:  # as GroupNorm of CUDA leaves it
            to_values = to_values.contiguous()
        return None, None, None, to_bias, to_weight, *torch.autograd.grad((end,), inputs, (to_values,))


def _again(prepare: Callable[..., Tensor], inputs: list[Tensor], random_state: Tensor) -> Tensor:
    """The same call with the same random numbers, which are taken from nobody else."""
    generator = _generator(inputs[0].device)
    now = generator.get_state()
    generator.set_state(random_state)
    with torch.enable_grad():
        # Not themselves, as the hooks of `torch.utils.flop_counter` do not stand leaves in here.
        prepared = prepare(*(torch.ops.aten.alias(tensor) for tensor in inputs))
    generator.set_state(now)
    return prepared


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator
