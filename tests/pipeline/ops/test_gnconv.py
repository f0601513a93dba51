"""The operators against independent spellings: a dense circular convolution, and the recursion of the paper."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import pipeline.models  # noqa: F401 - registers the family
from pipeline.ops.fourier import (
    LARGEST_SIDE,
    SpectrumFilter,
    filter_forward,
    fourier_basis,
    spectrum_filters,
    transform,
)
from pipeline.ops.global_filter import GlobalLocalFilter, global_filter, global_filter_size, resize_filter
from pipeline.ops.gnconv import GnConv, gnconv_dims


def as_channels_first(module: GnConv, x: Tensor) -> Tensor:
    """gnConv spelled with NCHW convolutions, step by step as in equations 3.3 and 3.4 of the paper."""
    gate, context = torch.split(module.proj_in(x), [module.dims[0], sum(module.dims)], dim=1)
    context = F.conv2d(context, module.dwconv.weight, module.dwconv.bias, padding=3, groups=sum(module.dims))
    slices = torch.split(context * module.scale, module.dims, dim=1)
    y = gate * slices[0]
    for pw, q in zip(module.pws, slices[1:], strict=True):
        y = pw(y) * q
    return module.proj_out(y)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_gnconv_equals_the_paper_spelling(order: int):
    torch.manual_seed(order)
    module = GnConv(32, order).double()
    x = torch.randn(2, 9, 5, 32, dtype=torch.float64)
    expected = as_channels_first(module, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])  # an odd width has no Nyquist column
def test_global_filter_is_a_circular_convolution(size: tuple[int, int]):
    height, width = size
    torch.manual_seed(0)
    kernel = torch.randn(3, height, width, dtype=torch.float64)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for dy in range(height):
        for dx in range(width):
            expected += kernel[:, dy, dx, None, None] * torch.roll(x, (dy, dx), dims=(2, 3))
    # 'ortho' divides by sqrt(HW) once each way, so the stored filter is the plain spectrum of the kernel.
    weight = torch.view_as_real(torch.fft.rfft2(kernel))
    torch.testing.assert_close(global_filter(x, weight), expected, rtol=1e-10, atol=1e-10)


def test_filter_is_resized_when_the_map_differs():
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 4, 2)
    x = torch.randn(1, 4, 10, 12)
    stored_for_it = resize_filter(weight, (10, 7))
    assert stored_for_it.shape == (4, 10, 7, 2)
    torch.testing.assert_close(global_filter(x, weight), global_filter(x, stored_for_it))
    # Aligned corners: the four corners are kept as they are.
    torch.testing.assert_close(
        stored_for_it[:, [0, 0, -1, -1], [0, -1, 0, -1]], weight[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    )
    assert resize_filter(weight, (6, 4)) is weight
    assert global_filter_size((224, 224), 16) == (14, 8)
    assert global_filter_size((384, 384), 32) == (12, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transform_is_float32_whatever_comes_in(dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    weight = torch.randn(4, 6, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = global_filter(x, weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, global_filter(x.float(), weight), rtol=0, atol=0)


def test_local_and_global_channels_alternate():
    """Silencing one half makes exactly every other channel the same constant, at each position."""
    module = GlobalLocalFilter(6, (4, 3))
    torch.nn.init.zeros_(module.complex_weight)
    out = module(torch.randn(1, 4, 4, 6))
    assert (out[..., 1::2] - out[..., 1:2]).abs().max() == 0
    assert (out[..., 0::2].std(-1) > 0).all()


@pytest.mark.parametrize("size", [(24, 24), (12, 12), (14, 14), (7, 7), (5, 8), (1, 1)])
def test_products_of_matrices_are_the_fft(size: tuple[int, int]):
    height, width = size
    torch.manual_seed(0)
    x = torch.randn(2, height, width, 3, dtype=torch.float64)
    weight = torch.randn(3, height, width // 2 + 1, 2, dtype=torch.float64)
    basis = fourier_basis(height, width, x.dtype, x.device)
    planes, (filt,) = x.permute(0, 3, 1, 2), spectrum_filters(weight.permute(3, 1, 2, 0)[None])
    spectrum = torch.view_as_real(torch.fft.rfft2(planes, norm="ortho")).permute(0, 4, 2, 3, 1)
    torch.testing.assert_close(transform(x, basis), spectrum, rtol=1e-12, atol=1e-12)
    expected = global_filter(planes, weight).permute(0, 2, 3, 1)
    out, _ = filter_forward(x, filt, basis)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        rounded = SpectrumFilter(*(part.to(dtype) for part in filt))
        narrow, _ = filter_forward(x.to(dtype), rounded, fourier_basis(height, width, dtype, x.device))
        errors[dtype] = float((narrow.double() - expected).norm() / expected.norm())
    assert errors[torch.float32] < 1e-6
    assert errors[torch.bfloat16] < 1.5e-2


def test_large_maps_are_left_to_the_fft():
    device = torch.device("cpu")
    assert fourier_basis(LARGEST_SIDE, LARGEST_SIDE, torch.float32, device) is not None
    assert fourier_basis(LARGEST_SIDE, LARGEST_SIDE + 1, torch.float32, device) is None
    model = timm.create_model("hornet_nano_gf", dims=(8, 8, 16, 32), depths=(1, 1, 1, 1), img_size=544, num_classes=2)
    for policy in ("none", "selective"):  # a map of 34 pixels in stage 3, of 17 in stage 4
        model.set_checkpointing(policy)
        model(torch.randn(1, 3, 544, 544)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_of_the_global_filter():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(global_filter, (x, weight))


def test_widths_that_do_not_divide_are_refused():
    assert gnconv_dims(64, 3) == [16, 32, 64]
    with pytest.raises(ValueError, match=r"multiple of 2\*\*\(order - 1\), got 40 channels"):
        GnConv(40, 5)
    with pytest.raises(ValueError, match="got 15: use an even width"):
        GlobalLocalFilter(15, (4, 3))
