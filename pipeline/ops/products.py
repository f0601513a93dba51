"""The matrix products of linear layers, by the library that is fast where they run.

PyTorch's products in float32 are MKL's on x86, and MKL has its AVX-512 kernels for Intel's CPUs alone: on AMD's, oneDNN
is about twice as fast (figures: tests/bench/RESULTS.md). PyTorch takes it for convolutions, and for products in bf16.

A CPU without AVX-512 has no oneDNN for 16 bits, and what PyTorch 2.15 does instead runs at a fifth to a hundredth of
float32's speed: there, products and convolutions of 16-bit maps go through float32, and their results are rounded once.

No function here is differentiable where oneDNN runs: `layers.linear` is, and the operators of `recompute.py`
and its neighbours.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import kernels

_LEAST_WORK = 2**23  # multiply-adds of a weight gradient, below which oneDNN's preparations cost more than they gain


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums over a map of `dtype` are kept: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) -> (..., out); weight (out, in), all of one dtype."""
    if widens(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if not by_onednn(x):
        return F.linear(x, weight, bias)
    return (_operators.linear if torch.compiler.is_compiling() else _linear)(x, weight, bias)


def input_gradient(dout: Tensor, weight: Tensor) -> Tensor:
    """Of `linear`: (..., out) -> (..., in)."""
    return linear(dout, weight.t(), None) if by_onednn(dout) or widens(dout) else dout @ weight


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm."""
    return torch.bmm(a.float(), b.float()).to(a.dtype) if widens(a) else torch.bmm(a, b)


def weight_gradients(dout: Tensor, inputs: Tensor | None, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """[gradient of the weight (out, in), of the bias (out,)] of `linear`, None where not `wanted`: of frozen layers.

    inputs: (..., in), or None where the weight's gradient is not wanted.
    """
    weight = None
    if wanted[0] and inputs is not None:
        if widens(dout):
            weight = (dout.flatten(0, -2).t().float() @ inputs.flatten(0, -2).float()).to(dout.dtype)
        elif not by_onednn(dout):
            weight = dout.flatten(0, -2).t() @ inputs.flatten(0, -2)
        else:
            weight = (_operators.weight_gradient if torch.compiler.is_compiling() else _weight_gradient)(dout, inputs)
    return [weight, dout.flatten(0, -2).sum(0) if wanted[1] else None]


def by_onednn(x: Tensor) -> bool:
    """Whether products of `x` are oneDNN's by our choice. Those that are exported, counted or fake stay PyTorch's."""
    if not ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu" or kernels.exported():
        return False
    return torch.compiler.is_compiling() or not kernels.under_a_mode()


def widens(x: Tensor) -> bool:
    """Whether 16-bit products of `x` go through float32: on a CPU that has none."""
    if x.dtype not in SLOW or x.device.type != "cpu" or kernels.exported():
        return False
    return torch.compiler.is_compiling() or not kernels.under_a_mode()


def _slow_dtypes() -> tuple[torch.dtype, ...]:
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    known = {dtype: getattr(torch.ops.mkldnn, name, None) for dtype, name in asked.items()}
    return tuple(dtype for dtype, supported in known.items() if supported is None or not supported())


def _onednn_is_faster() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


ONEDNN, SLOW = _onednn_is_faster(), _slow_dtypes()  # asked once: torch.compile could not look


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _weight_gradient(dout: Tensor, inputs: Tensor) -> Tensor:
    flat, flat_inputs = dout.flatten(0, -2), inputs.flatten(0, -2)
    rows, (out, width) = len(flat), (dout.shape[-1], inputs.shape[-1])
    few = rows < 2 * min(out, width)
    if rows * out * width < _LEAST_WORK or not (few or dout.ndim == 4):
        return flat.t() @ flat_inputs
    if few:
        # Of a slice of a wider map oneDNN (of torch 2.15) makes a loop without vectors, a hundred times as slow.
        return _linear(flat.t(), flat_inputs.contiguous().t(), None)
    # As a 1x1 convolution's, whose kernels sum over many positions faster than a product. Of maps: in one row of
    # positions it is slow.
    planes, planes_in = dout.permute(0, 3, 1, 2), inputs.permute(0, 3, 1, 2)
    _, dweight, _ = torch.ops.aten.convolution_backward(
        *(planes, planes_in, dout.new_empty(out, width, 1, 1), None),
        *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]),
    )
    return dweight.flatten(1)


# What torch.compile sees: operators without an inside, for its own products are MKL's.
_library = torch.library.Library("hornet_pretraining", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("weight_gradient(Tensor dout, Tensor inputs) -> Tensor")
_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("weight_gradient", _weight_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("hornet_pretraining::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("hornet_pretraining::weight_gradient")
def _(dout: Tensor, inputs: Tensor) -> Tensor:
    return dout.new_empty(dout.shape[-1], inputs.shape[-1])


_operators = torch.ops.hornet_pretraining
