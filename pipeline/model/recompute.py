"""A convolution that saves fewer activations for the backward pass than autograd, with the same results.

The layers before a convolution (concatenation, norm, activation, dropout, padding) are cheap, and each result is as
large as the input, but autograd saves all of them. Here only the input is saved; the backward pass recomputes the cheap
layers, but not the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge


class RecomputeConv2d(nn.Conv2d):
    """A convolution together with the cheap layers before it.

    Attributes:
        recompute: save only the inputs of the cheap layers, and recompute these layers; may be set at any time.
    """

    recompute = False

    def forward(self, input: Tensor, *more: Tensor, prepare: Callable[..., Tensor] | None = None) -> Tensor:
        """Convolve `prepare(input, *more)`; without `prepare`, the input itself.

        Args:
            input: (B, C, H, W). With `recompute` its dtype, not autocast, is the dtype of the convolution.
            more: further floating-point arguments of `prepare` that need a gradient.
            prepare: the cheap layers; a function that returns a new tensor. Its random numbers must come from the
                default generator of the input's device; recomputation draws the same numbers again.

        Returns:
            (B, C', H', W')
        """
        if prepare is None:
            return super().forward(input)
        if not self.recompute or torch.compiler.is_compiling():  # the compiler decides itself what to recompute
            return super().forward(prepare(input, *more))
        assert self.bias is not None
        with torch.autocast(input.device.type, enabled=False):
            saved = _SaveInputs.apply(self.weight.to(input.dtype), input, *more)  # type: ignore[no-untyped-call]
            bias = self.bias.to(input.dtype)
            convolved: Tensor = _Convolve.apply(self, prepare, saved[0].grad_fn, bias, *saved)  # type: ignore[no-untyped-call]
        return convolved


class _SaveInputs(torch.autograd.Function):
    """Saves its inputs for the backward pass and returns them.

    The inputs are saved before the convolution runs. So a checkpoint around both can stop its recomputation here, and
    does not repeat the convolution.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        # `view_as` would change the strides of channels-last tensors of one image, and with them what kernels do.
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
        saved: Any,
        bias: Tensor,
        weight: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.conv, ctx.prepare, ctx.saved = conv, prepare, saved
        ctx.random_state = _generator(bias.device).get_state()
        return F.conv2d(prepare(*inputs), weight, bias, conv.stride, conv.padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        prepared = _rerun(ctx.prepare, inputs, ctx.random_state)
        # All these tensors are large: each is freed as soon as possible, and has the layout that its kernels need.
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
        if in_order:  # the layout of GroupNorm on CUDA
            to_values = to_values.contiguous()
        return None, None, None, to_bias, to_weight, *torch.autograd.grad((end,), inputs, (to_values,))


def _rerun(prepare: Callable[..., Tensor], inputs: list[Tensor], random_state: Tensor) -> Tensor:
    """Call `prepare` again with the same random numbers; the generator's state is restored afterwards."""
    generator = _generator(inputs[0].device)
    now = generator.get_state()
    generator.set_state(random_state)
    with torch.enable_grad():
        # Aliases, because the hooks of `torch.utils.flop_counter` fail for leaf tensors here.
        prepared = prepare(*(torch.ops.aten.alias(tensor) for tensor in inputs))
    generator.set_state(now)
    return prepared


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator
