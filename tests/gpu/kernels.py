"""What is run of pipeline/ops/triton/: each kernel's inputs, its float64 truth and its bytes.

A kernel that is not there is passed over, so that any of them can be measured while others are
being written. Inputs are what the model gives: NHWC flattened to rows, slices of wider tensors where the model slices,
affine parameters in fp32.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.gnconv import gnconv_dims

EPS = 1e-6
SCALE = 1 / 3
WIDTHS, ORDERS = (192, 384, 768, 1536), (2, 3, 4, 5)  # HorNet-L
TOTALS = tuple(sum(gnconv_dims(c, n)) for c, n in zip(WIDTHS, ORDERS, strict=True))  # 288, 672, 1440, 2976

MODULES = {
    "layer_norm": "triton.block",
    "layer_norm_apply": "triton.block",
    "layer_norm_backward": "triton.block",
    "gelu": "triton.block",
    "gelu_backward": "triton.block",
    "residual": "triton.block",
    "multiply": "triton.gnconv",
    "multiply_backward": "triton.gnconv",
    "gated_linear": "triton.gnconv",
    "depthwise": "triton.depthwise",
    "depthwise_backward_input": "triton.depthwise",
    "depthwise_backward_weight": "triton.depthwise",
}


class Case(NamedTuple):
    name: str
    shape: str
    run: Callable[[], Any]  # the kernel: a tensor or a tuple of them
    truth: Callable[[], tuple[Tensor | None, ...]]  # the same in float64
    plain: Callable[[], Any] | None  # what runs in its place without kernels
    bytes: int  # read and written, each operand once
    flops: int = 0


def kernel(name: str) -> Callable[..., Any] | None:
    """The Triton function, or None where it, or Triton, is missing."""
    try:
        return getattr(importlib.import_module(f"pipeline.ops.{MODULES[name]}"), name, None)
    except ImportError:
        return None


def plain(name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module("pipeline.ops.primitives"), name, None)
    except ImportError:
        return None


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def strided(*shape: int, like: Tensor, extra: int = 8) -> Tensor:
    """Random, rows of `extra` more channels than are taken."""
    wide = torch.randn(*shape[:-1], shape[-1] + extra, device=like.device, dtype=torch.float32).to(like.dtype)
    return wide[..., extra:]


def dense(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(*shape, device=like.device, dtype=torch.float32).to(like.dtype)


def row_cases(rows: int, channels: int, like: Tensor, sliced: bool = False) -> Iterator[Case]:
    """LayerNorm, GELU, product: (rows, channels) of the dtype and device of `like`.

    sliced: the input of the norm is a slice of a wider map, as in the global-local filter.
    """
    label = f"{rows} x {channels}{', a slice' if sliced else ''}"
    x, dy, add = (dense(rows, channels, like=like) for _ in range(3))
    x = strided(rows, channels, like=like).mul_(1.5).add_(0.5) if sliced else x * 1.5 + 0.5
    weight, bias = (torch.randn(channels, device=like.device) for _ in range(2))
    xd, wd, bd = x.double(), weight.double(), bias.double()

    def statistics() -> tuple[Tensor, Tensor]:
        return xd.mean(1), (xd.var(1, unbiased=False) + EPS).rsqrt()

    def norm_truth() -> tuple[Tensor, ...]:
        return F.layer_norm(xd, (channels,), wd, bd, EPS), *statistics()

    def norm_backward_truth() -> tuple[Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (xd, wd, bd)]
        y = F.layer_norm(inputs[0], (channels,), inputs[1], inputs[2], EPS)
        dx, dweight, dbias = torch.autograd.grad(y, inputs, dy.double())
        return dx + add.double(), dweight, dbias

    mean, rstd = (t.float() for t in statistics())
    if (layer_norm := kernel("layer_norm")) is not None:
        p = plain("layer_norm")
        yield Case(
            *("layer_norm", label, lambda: layer_norm(x, weight, bias, EPS), norm_truth),
            *(p and (lambda: p(x, weight, bias, EPS)), size(x, x)),
        )
    if (apply := kernel("layer_norm_apply")) is not None:
        pa = plain("layer_norm_apply")
        yield Case(
            *("layer_norm_apply", label, lambda: apply(x, mean, rstd, weight, bias), lambda: norm_truth()[:1]),
            *(pa and (lambda: pa(x, mean, rstd, weight, bias, EPS)), size(x, x)),
        )
    if (backward := kernel("layer_norm_backward")) is not None:
        pb = plain("layer_norm_backward")
        stats = (mean[:, None], rstd[:, None]) if like.device.type == "cpu" else (mean, rstd)
        yield Case(
            *("layer_norm_backward", label, lambda: backward(dy, x, mean, rstd, weight, add), norm_backward_truth),
            *(pb and (lambda: pb(dy, x, *stats, weight, bias, add)), size(x, x, x, x)),
        )

    def gelu_backward_truth() -> tuple[Tensor, ...]:
        h = xd.clone().requires_grad_()
        a = F.gelu(h)
        return torch.autograd.grad(a, h, dy.double())[0], a.detach()

    if (gelu := kernel("gelu")) is not None:
        pg = plain("gelu")
        yield Case("gelu", label, lambda: gelu(x), lambda: (F.gelu(xd),), pg and (lambda: pg(x)), size(x, x))
    if (gelu_backward := kernel("gelu_backward")) is not None:
        pgb = plain("gelu_backward")
        yield Case(
            *("gelu_backward", label, lambda: gelu_backward(dy, x), gelu_backward_truth),
            *(pgb and (lambda: pgb(dy, x)), size(x, x, x, x)),
        )

    a, b, da, db = (strided(rows, channels, like=like) for _ in range(4))
    if (multiply := kernel("multiply")) is not None:
        pm = plain("multiply")
        yield Case(
            *("multiply", label, lambda: multiply(a, b), lambda: (a.double() * b.double(),)),
            *(pm and (lambda: pm(a, b)), size(a, b, a)),
        )

    def multiply_backward_truth() -> tuple[Tensor, ...]:
        return a.double() * b.double(), dy.double() * b.double(), dy.double() * a.double()

    if (multiply_backward := kernel("multiply_backward")) is not None:
        pmb = plain("multiply_backward")
        yield Case(
            *("multiply_backward", label, lambda: (multiply_backward(dy, a, b, da, db), da, db)),
            *(multiply_backward_truth, pmb and (lambda: pmb(dy, a, b, da, db)), size(dy, a, b, da, db, a)),
        )


def gated_linear_cases(rows: int, narrow: int, wide: int, like: Tensor) -> Iterator[Case]:
    """A step of the recursion: (rows, narrow) -> (rows, wide)."""
    x, weight, bias = dense(rows, narrow, like=like), dense(wide, narrow, like=like), dense(wide, like=like)
    weight = weight / narrow**0.5
    c = strided(rows, wide, like=like)

    def truth() -> tuple[Tensor, ...]:
        p = F.linear(x.double(), weight.double(), bias.double())
        return p, p * c.double()

    if (gated_linear := kernel("gated_linear")) is not None:
        p = plain("gated_linear")
        yield Case(
            *("gated_linear", f"{rows} x {narrow} -> {wide}", lambda: gated_linear(x, weight, bias, c), truth),
            *(p and (lambda: p(x, weight, bias, c)), size(x, c, c, c), 2 * rows * narrow * wide),
        )


def residual_cases(batch: int, positions: int, channels: int, like: Tensor) -> Iterator[Case]:
    """All samples kept, and some of them dropped."""
    if (residual := kernel("residual")) is None:
        return
    x = dense(batch, positions, channels, like=like)
    gamma = torch.randn(channels, device=like.device)
    p = plain("add_rows")
    rows = torch.arange(0, batch, 2, device=like.device)
    position = torch.full((batch,), -1, device=like.device)
    position[rows] = torch.arange(len(rows), device=like.device)
    for kept, index, scaled in ((batch, None, False), (len(rows), position, True)):
        f = dense(kept, positions, channels, like=like)
        g, factor = (gamma, 1.25) if scaled else (None, 1.0)

        def truth(f: Tensor = f, index: Tensor | None = index, g: Any = g, factor: float = factor) -> tuple[Tensor]:
            branch = factor * f.double() * (1 if g is None else g.double())
            return (x.double() + branch if index is None else x.double().index_add(0, rows, branch),)

        yield Case(
            *("residual", f"{kept} of {batch} x {positions} x {channels}"),
            lambda f=f, i=index, g=g, s=factor: residual(x, f, i, g, s),
            truth,
            p and (lambda f=f, i=index: p(x, f, None if i is None else rows)),
            size(x, f, x),
        )


def no_affine_cases(rows: int, channels: int, like: Tensor) -> Iterator[Case]:
    """LayerNorm without weight and bias, and without a gradient to add."""
    forward, backward = kernel("layer_norm"), kernel("layer_norm_backward")
    if forward is None or backward is None:
        return
    x, dy = strided(rows, channels, like=like), dense(rows, channels, like=like)
    xd = x.double()
    mean, rstd = xd.mean(1), (xd.var(1, unbiased=False) + EPS).rsqrt()

    def backward_truth() -> tuple[Tensor | None, ...]:
        inputs = xd.clone().requires_grad_()
        return *torch.autograd.grad(F.layer_norm(inputs, (channels,), eps=EPS), inputs, dy.double()), None, None

    label = f"{rows} x {channels}, no affine"
    truth = F.layer_norm(xd, (channels,), eps=EPS), mean, rstd
    yield Case("layer_norm", label, lambda: forward(x, None, None, EPS), lambda: truth, None, size(x, x))
    yield Case(
        *("layer_norm_backward", label, lambda: backward(dy, x, mean.float(), rstd.float(), None, None)),
        *(backward_truth, None, size(x, x, x)),
    )


def depthwise_cases(
    batch: int, side: int, channels: int, like: Tensor, kernel_size: int = 7, sliced: bool = False
) -> Iterator[Case]:
    """The convolution and both its gradients on (batch, side, side, channels), `x` a slice of a wider map.

    sliced: the gradient of `x` is written into such a slice as well.
    """
    x = strided(batch, side, side, channels, like=like, extra=channels // 2)
    dy = dense(batch, side, side, channels, like=like)
    weight = torch.randn(channels, 1, kernel_size, kernel_size, device=like.device) / kernel_size
    bias = torch.randn(channels, device=like.device)
    label = f"{batch} x {side} x {side} x {channels}, {kernel_size}x{kernel_size}"
    flops = 2 * kernel_size**2 * dy.numel()
    dx = strided(batch, side, side, channels, like=like, extra=channels // 2) if sliced else None

    def nchw(t: Tensor) -> Tensor:
        return t.permute(0, 3, 1, 2)

    def forward_truth() -> tuple[Tensor, ...]:
        y = F.conv2d(nchw(x.double()), weight.double(), bias.double(), padding=kernel_size // 2, groups=channels)
        return (SCALE * y.permute(0, 2, 3, 1),)

    def backward_truth() -> tuple[Tensor, Tensor, Tensor]:
        dx, dweight, dbias = convolution_backward(nchw(dy.double()), nchw(x.double()), weight.double(), [True] * 3)
        return SCALE * dx.permute(0, 2, 3, 1), SCALE * dweight, SCALE * dbias

    if (forward := kernel("depthwise")) is not None:
        yield Case(
            *("depthwise", label, lambda: forward(x, weight, bias, SCALE), forward_truth, None, size(x, dy), flops)
        )
    if (backward_input := kernel("depthwise_backward_input")) is not None:
        yield Case(
            *("depthwise_backward_input", label, lambda: backward_input(dy, weight, SCALE, dx)),
            *(lambda: backward_truth()[:1], None, size(x, dy), flops),
        )
    if (backward_weight := kernel("depthwise_backward_weight")) is not None:
        yield Case(
            *("depthwise_backward_weight", label, lambda: backward_weight(dy, x, kernel_size, SCALE)),
            *(lambda: backward_truth()[1:], None, size(x, dy), flops),
        )


def convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
    """aten's, of a depthwise convolution in NCHW shape."""
    channels, padding = x.shape[1], weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        *(dy, x, weight, [channels], [1, 1], [padding] * 2, [1, 1], False, [0, 0], channels, wanted)
    )


def small_cases(like: Tensor, tiny: bool) -> Iterator[Case]:
    """Shapes that are awkward: odd numbers of rows and positions, widths that are no powers of two.

    Few: each shape is compiled anew.
    """
    rows = 17 if tiny else 1003
    for channels in (12, 48) if tiny else (30, 112, 192, 1536, 2976):
        yield from row_cases(rows, channels, like, sliced=True)
        yield from residual_cases(5, 6 if tiny else 49, channels, like)
    yield from no_affine_cases(rows, 12 if tiny else 1440, like)
    for narrow, wide in ((12, 24),) if tiny else ((12, 24), (24, 48), (96, 192)):
        yield from gated_linear_cases(rows, narrow, wide, like)
    maps = ((5, 12, 7), (5, 12, 3)) if tiny else ((7, 496, 7), (24, 720, 7), (33, 30, 7), (12, 112, 3), (14, 30, 3))
    for side, channels, kernel_size in maps:
        yield from depthwise_cases(1 if tiny else 3, side, channels, like, kernel_size, sliced=True)
