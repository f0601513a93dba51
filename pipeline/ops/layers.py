"""Linear layers and norms in the dtype of their input, whatever that of their parameters.

The model chooses one dtype for its activations (that of autocast, where it is on) and switches autocast off inside:
so a GPU and a CPU, whose autocast rules differ, compute alike, and nothing is promoted on the way. A residual stream
in bf16 keeps half the bytes of one in fp32, and costs a third more error (tests/bench/RESULTS.md).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipeline.ops import kernels, primitives, products

NORM_EPS = 1e-6


class Norm(NamedTuple):
    """Affine parameters (C,) and epsilon of a LayerNorm; None where they are folded into the layer behind it."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


def norm_of(module: nn.LayerNorm, scale: float = 1.0) -> Norm:
    """The parameters of `module`, its output times `scale`."""
    if scale == 1.0 or module.weight is None:
        return Norm(module.weight, module.bias, module.eps)
    return Norm(module.weight * scale, module.bias * scale, module.eps)


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm over the last dimension; statistics, and sums of gradients, in float32 or better."""
    if not torch.is_grad_enabled() or kernels.exported():
        if norm.weight is None and not kernels.usable(x):  # folded away: what is left is exact as it comes
            return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
        return primitives.layer_norm(x, *norm)[0]
    if x.element_size() == 2 or kernels.usable(x):  # see `primitives`: neither device's own is right in bf16
        return _LayerNorm.apply(x, *norm)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) -> (..., out). `weight` is (out, in), or a 1x1 convolution's (out, in, 1, 1)."""
    weight, bias = weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
    if torch.is_grad_enabled() and not kernels.exported():
        # Whatever the CPU, of which ranks may have several: the order of gradients must not depend on it.
        eager = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager or products.by_onednn(x) or products.widens(x):
            return _Linear.apply(x, weight, bias)
    return products.linear(x, weight, bias)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer's weight is a tensor like others, a fake one too. Of one that was quantized it is not: the
    module alone knows how to multiply by torchao's wrapper, or by what `quantize_dynamic` has for a weight, a method.
    """
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not is_traceable_wrapper_subclass(weight)


def linear_of(module: nn.Module, x: Tensor) -> Tensor:
    """`module`, a linear layer of plain weights or quantized ones, in the dtype of `x`: for inference."""
    if is_plain(module):
        return linear(x, cast(Tensor, module.weight), cast("Tensor | None", module.bias))
    return module(x).to(x.dtype)


def interleave(even: Tensor, odd: Tensor) -> Tensor:
    """(..., C / 2) each -> (..., C), channel by channel."""
    if even.is_cuda or kernels.usable(even) or torch.compiler.is_compiling() or kernels.exported():
        return torch.stack((even, odd), -1).flatten(-2)
    return _Interleave.apply(even, odd)


def patches(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) -> (B, H / side, W / side, side * side * C): what a convolution of that size and stride sees."""
    if side == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side * channels).transpose(2, 3)
    return x.reshape(batch, height // side, width // side, side * side * channels)


def unpatched(x: Tensor, side: int) -> Tensor:
    """The inverse of `patches`."""
    if side == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, side, channels // side).transpose(2, 3)
    return x.reshape(batch, height * side, width * side, channels // side**2)


def patch_weight(weight: Tensor) -> Tensor:
    """A convolution's weight (out, in, side, side) as that of a linear layer on `patches`: (out, side * side * in)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def as_planes(x: Tensor) -> Tensor:
    """A map (B, H, W, C) as others want it, (B, C, H, W), the same memory. Its gradient gets this layout too, once: one
    of another, or of one number for all (of a sum), would be laid out anew by every product behind.
    """
    return x.permute(0, 3, 1, 2) if kernels.exported() else _AsPlanes.apply(x)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast off inside the block, on any device."""
    if not torch.amp.is_autocast_available(device_type):  # the meta device has no autocast to switch off
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast where it is on for the device of `x`, else None: activations have that of the images."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


class _AsPlanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        return dout.permute(0, 2, 3, 1).contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        return products.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dout = dout.contiguous()
        dx = products.input_gradient(dout, weight) if ctx.needs_input_grad[0] else None
        return dx, *products.weight_gradients(dout, x, ctx.needs_input_grad[1:])


class _Interleave(torch.autograd.Function):
    """On a CPU, two copies with gaps take a fifth of the time of a stack."""

    @staticmethod
    def forward(ctx: Any, even: Tensor, odd: Tensor) -> Tensor:
        out = even.new_empty(*even.shape, 2)
        out[..., 0].copy_(even)
        out[..., 1].copy_(odd)
        return out.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        # Contiguous: of channels with gaps, a product in float32 copies matrix by matrix.
        return tuple(part.contiguous() for part in dout.unflatten(-1, (-1, 2)).unbind(-1))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        y, mean, rstd = primitives.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        return *primitives.layer_norm_backward(dy, x, mean, rstd, weight, bias, None), None
