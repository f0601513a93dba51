"""The Triton kernels against plain float64 PyTorch: in the interpreter without a GPU, compiled on one.

The interpreter is slow, so shapes are small; they are odd on purpose (widths that are no power of two, maps of one
pixel, slices of wider tensors). Every function in float32, bfloat16 and float16. That the kernels compile,
and into what, is `support/programs/compile_kernels.py`'s to say.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.kernels import DEVICE, INTERPRETED, import_kernels
from tests.support.runs import ROOT

triton = pytest.importorskip("triton", reason="triton is not installed")

import_kernels()
from pipeline.ops.triton import block as block_triton  # noqa: E402
from pipeline.ops.triton import depthwise as depthwise_triton  # noqa: E402
from pipeline.ops.triton import gnconv as gnconv_triton  # noqa: E402

pytestmark = pytest.mark.gpu

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Largest relative error of one rounding: half the distance of neighbours. The interpreter cuts bf16 off instead.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}


def close(actual: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """`actual` is `expected` (float64) computed in float32, within 1e-5 of the largest value, and then rounded."""
    assert actual.shape == expected.shape
    largest = expected.abs().max().item() if expected.numel() else 0.0
    relative = 1e-5 + 1.01 * roundings * ROUNDING[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.detach(), rtol=relative, atol=1e-5 * max(1.0, largest))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def strided(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 3) -> Tensor:
    """Values in a slice of the last dimension of something wider."""
    return normal(*shape[:-1], shape[-1] + offset + 2, dtype=dtype)[..., offset : offset + shape[-1]]


class Frame:
    """A slice to write into, and a check that nothing around it was written."""

    def __init__(self, *shape: int, dtype: torch.dtype, offset: int = 3) -> None:
        self.whole = torch.full((*shape[:-1], shape[-1] + offset + 2), 7.0, dtype=dtype, device=DEVICE)
        self.view = self.whole[..., offset : offset + shape[-1]]
        self.view.fill_(float("nan"))

    def intact(self) -> bool:
        rest = self.whole.clone()
        rest[..., self.view.storage_offset() :][..., : self.view.shape[-1]] = 7.0
        return bool((rest == 7.0).all())


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    planes = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return scale * planes.permute(0, 2, 3, 1)


MAPS = {
    (2, 1, 1, 12, 7): torch.float32,
    (1, 5, 7, 70, 7): torch.bfloat16,
    (2, 12, 12, 6, 7): torch.float32,
    (1, 2, 9, 30, 7): torch.float16,
    (3, 5, 7, 12, 3): torch.float32,
}


@pytest.mark.parametrize(("size", "dtype"), MAPS.items())
def test_depthwise(size: tuple[int, ...], dtype: torch.dtype) -> None:
    *shape, kernel = size
    channels = shape[-1]
    torch.manual_seed(0)
    x, dy = strided(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    weight, bias = normal(channels, 1, kernel, kernel), normal(channels)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = convolution(*inputs, 1 / 3)
    dx, dweight, dbias = torch.autograd.grad(expected, inputs, dy.double())

    y = depthwise_triton.depthwise(x, weight, bias, 1 / 3)
    assert y.is_contiguous()
    assert y.dtype == dtype
    close(y, expected)
    frame = Frame(*shape, dtype=dtype)
    depthwise_triton.depthwise_backward_input(dy, weight, 1 / 3, frame.view)
    close(frame.view, dx)
    assert frame.intact()
    sums = depthwise_triton.depthwise_backward_weight(dy, x, kernel, 1 / 3)
    assert all(s.dtype == torch.float32 and s.is_contiguous() for s in sums)
    for actual, gradient in zip(sums, (dweight, dbias), strict=True):
        close(actual, gradient)


def test_depthwise_in_many_programs() -> None:
    """Tiles as a sweep might choose them; shares of the samples that do not come out even; no bias."""
    torch.manual_seed(0)
    x, dy, weight = normal(3, 4, 5, 8), normal(3, 4, 5, 8), normal(8, 1, 3, 3, dtype=torch.bfloat16)
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    expected = convolution(*inputs, None, 1.0)
    dx, dweight = torch.autograd.grad(expected, inputs, dy.double())
    close(depthwise_triton.depthwise(x, weight, None, 1.0, tile=2, block=4), expected)
    close(depthwise_triton.depthwise_backward_input(dy, weight, 1.0, None, tile=4), dx)
    sums = [
        depthwise_triton.depthwise_backward_weight(dy, x, 3, 1.0, tile=3, unroll=3, programs=programs)[0]
        for programs in (4, 4, 100)  # two samples each, and one each
    ]
    for actual in sums:
        close(actual, dweight)
    assert torch.equal(sums[0], sums[1])


def test_depthwise_of_any_strides() -> None:
    torch.manual_seed(0)
    planes, weight = normal(2, 8, 3, 4), normal(8, 1, 3, 3)
    x = planes.permute(0, 2, 3, 1)
    close(depthwise_triton.depthwise(x, weight, None, 1.0), convolution(x.double(), weight.double(), None, 1.0))
    with pytest.raises(ValueError, match="slice of channels"):
        depthwise_triton.depthwise_backward_input(normal(2, 3, 4, 8), weight, 1.0, x)
    overlapping = normal(100).as_strided((2, 3, 4, 8), (48, 16, 4, 1))
    with pytest.raises(ValueError, match="slice of channels"):
        depthwise_triton.depthwise_backward_input(normal(2, 3, 4, 8), weight, 1.0, overlapping)
    with pytest.raises(ValueError, match="got 5"):
        depthwise_triton.depthwise(x, normal(8, 1, 5, 5), None, 1.0)


@pytest.mark.parametrize(("n", "c"), [(5, 12), (37, 48), (3, 120), (2, 720)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm(n: int, c: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = strided(n, c, dtype=dtype) + 3, normal(c), normal(c)
    x64, weight64, bias64 = (t.double().requires_grad_() for t in (x, weight, bias))
    expected = F.layer_norm(x64, (c,), weight64, bias64, 1e-6)
    y, mean, rstd = block_triton.layer_norm(x, weight, bias, 1e-6)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert mean.dtype == rstd.dtype == torch.float32
    close(y, expected)
    close(mean, x64.mean(1))
    close(rstd, (x64.var(1, correction=0) + 1e-6).rsqrt())
    assert torch.equal(block_triton.layer_norm_apply(x, mean, rstd, weight, bias), y)

    dy, add = normal(n, c, dtype=dtype), normal(n, c, dtype=dtype)
    gradients = torch.autograd.grad(expected, (x64, weight64, bias64), dy.double())
    dx, dweight, dbias = block_triton.layer_norm_backward(dy, x, mean, rstd, weight, add)
    assert dx.dtype == dtype
    assert dweight.dtype == dbias.dtype == torch.float32
    close(dx, gradients[0] + add.double())
    close(dweight, gradients[1])
    close(dbias, gradients[2])


def test_layer_norm_without_affine() -> None:
    torch.manual_seed(0)
    x, dy = strided(7, 30), strided(7, 30)
    x64 = x.double().requires_grad_()
    expected = F.layer_norm(x64, (30,), eps=1e-6)
    y, mean, rstd = block_triton.layer_norm(x, None, None, 1e-6)
    close(y, expected)
    assert torch.equal(block_triton.layer_norm_apply(x, mean, rstd, None, None), y)
    dx, dweight, dbias = block_triton.layer_norm_backward(dy, x, mean, rstd, None, None)
    close(dx, torch.autograd.grad(expected, x64, dy.double())[0])
    assert dweight is dbias is None


def test_layer_norm_of_a_large_mean() -> None:
    """Mean 1000, deviation 1: the difference of two large numbers would leave no digit."""
    torch.manual_seed(0)
    x = normal(3, 96) + 1000
    y, _, rstd = block_triton.layer_norm(x, None, None, 1e-6)
    close(y / 1000, F.layer_norm(x.double(), (96,), eps=1e-6) / 1000)
    close(rstd, x.double().var(1, correction=0).add(1e-6).rsqrt())


@pytest.mark.parametrize(("n", "d"), [(3, 12), (45, 48), (2, 1536)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_multiply(n: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b, dx = strided(n, d, dtype=dtype), strided(n, d, dtype=dtype, offset=0), normal(n, d, dtype=dtype)
    a64, b64 = a.double(), b.double()
    product = gnconv_triton.multiply(a, b)
    assert product.is_contiguous()
    close(product, a64 * b64)
    da, db = Frame(n, d, dtype=dtype), Frame(n, d, dtype=dtype, offset=0)
    assert torch.equal(gnconv_triton.multiply_backward(dx, a, b, da.view, db.view), product)
    close(da.view, dx.double() * b64)
    close(db.view, dx.double() * a64)
    assert da.intact()
    assert db.intact()


# A transposed matrix, every other channel, one row for all, rows that overlap.
@pytest.mark.parametrize("strides", [(1, 5), (24, 2), (0, 1), (11, 1)])
def test_multiply_backward_refuses_to_write_where_rows_are_not(strides: tuple[int, int]) -> None:
    a, good = normal(5, 12), torch.empty(5, 12, device=DEVICE)
    bad = normal(200).as_strided((5, 12), strides)
    before = bad.clone()
    with pytest.raises(ValueError, match="da is written in place"):
        gnconv_triton.multiply_backward(a, a, a, bad, good)
    with pytest.raises(ValueError, match="db is written in place"):
        gnconv_triton.multiply_backward(a, a, a, good, bad)
    assert torch.equal(bad, before)


@pytest.mark.parametrize(("n", "k", "d"), [(5, 12, 24), (130, 48, 96), (33, 96, 192), (1, 30, 15)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gated_linear(n: int, k: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias, c = strided(n, k, dtype=dtype), normal(d, k), normal(d), strided(n, d, dtype=dtype)
    p, product = gnconv_triton.gated_linear(x, weight, bias, c)
    assert p.is_contiguous()
    assert product.is_contiguous()
    rounded = weight.to(dtype).double()
    expected = F.linear(x.double(), rounded, bias.double())
    close(p, expected)
    close(product, expected * c.double(), roundings=2)
    assert torch.equal(product, gnconv_triton.multiply(p, c))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gelu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h = torch.cat([normal(2100) * 2, torch.linspace(-12, 12, 97, device=DEVICE)]).to(dtype)
    da = normal(len(h), dtype=dtype)
    h64 = h.double().requires_grad_()
    expected = F.gelu(h64)
    a = block_triton.gelu(h)
    close(a, expected)
    dh, again = block_triton.gelu_backward(da, h)
    close(dh, torch.autograd.grad(expected, h64, da.double())[0])
    assert torch.equal(again, a)
    if dtype == torch.float32:  # not worse than float32's own `1 + erf`, which cancels where h is negative
        assert (a.double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("integers", "dtype"), [(torch.int64, torch.bfloat16), (torch.int32, torch.float16)])
@pytest.mark.parametrize("kept", [None, [1, -1, 0], [-1, -1, -1]])
def test_residual(kept: list[int] | None, integers: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gamma = normal(3, 35, 96, dtype=dtype), normal(96)
    f = normal(3 if kept is None else max(1, max(kept) + 1), 35, 96)
    position = None if kept is None else torch.tensor(kept, dtype=integers, device=DEVICE)
    rows = range(3) if kept is None else kept
    y = block_triton.residual(x, f, position, gamma, 1.25)
    assert y.dtype == dtype
    for b, row in enumerate(rows):
        if row < 0:
            assert torch.equal(y[b], x[b])
        else:
            close(y[b], x[b].double() + 1.25 * gamma.double() * f[row].double())
    plain = block_triton.residual(x.float(), f, position, None, 1.0)
    close(plain, torch.stack([x[b].double() + (f[row].double() if row >= 0 else 0) for b, row in enumerate(rows)]))


def test_a_launch_is_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own choice is the current GPU, which would take a model on cuda:1 for its own."""
    current = ["cuda:0"]

    @contextmanager
    def device_of(like: SimpleNamespace) -> Iterator[None]:
        before, current[0] = current[0], like.device
        yield
        current[0] = before

    def kernel(*args: int, **options: int) -> None:
        seen.append((current[0], args, options))

    seen: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for like in (SimpleNamespace(is_cuda=True, device="cuda:1"), torch.ones(1)):
        gnconv_triton.launch({(3,): kernel}, (3,), like, 1, 2, num_warps=4)
    options = {"num_warps": 4, **gnconv_triton.OPTIONS}
    assert seen == [("cuda:1", (1, 2), options), ("cuda:0", (1, 2), options)]
    for module in (block_triton, depthwise_triton, gnconv_triton):  # no launch goes round it
        assert "_kernel[" not in Path(module.__file__).read_text()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu() -> None:
    x = torch.randn(5, 12, device="cuda:1")
    assert torch.equal(gnconv_triton.multiply(x, x), x * x)


@pytest.mark.skipif(INTERPRETED, reason="70000 programs are too many for the interpreter")
def test_more_samples_than_a_second_axis_takes() -> None:
    x, f = normal(70_000, 1, 12), normal(70_000, 1, 12)
    assert torch.equal(block_triton.residual(x, f, None, None, 1.0), x + f)


def test_nothing_at_all() -> None:
    """No rows, as when drop path leaves out every sample."""
    x, ones = normal(0, 12), torch.ones(12, device=DEVICE)
    y, mean, rstd = block_triton.layer_norm(x, ones, ones, 1e-6)
    _, dweight, dbias = block_triton.layer_norm_backward(x, x, mean, rstd, ones, None)
    assert torch.equal(dweight, torch.zeros(12, device=DEVICE))
    assert torch.equal(dbias, torch.zeros(12, device=DEVICE))
    assert y.shape == gnconv_triton.multiply(x, x).shape == block_triton.gelu(x).shape == (0, 12)
    assert gnconv_triton.gated_linear(x, normal(8, 12), normal(8), normal(0, 8))[1].shape == (0, 8)
    maps, weight = normal(0, 4, 4, 12), normal(12, 1, 7, 7)
    assert depthwise_triton.depthwise(maps, weight, ones, 1.0).shape == maps.shape
    dweight, dbias = depthwise_triton.depthwise_backward_weight(maps, maps, 7, 1.0)
    assert not dweight.any()
    assert not dbias.any()


def test_kernels_compile_without_spilling() -> None:
    ptxas = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.exists():
        pytest.skip("this triton brings no ptxas")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = [
        sys.executable,
        "tests/support/programs/compile_kernels.py",
        "--quick",
        "--arch",
        "90",
        "--dtype",
        "bfloat16",
    ]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90") == 12
