"""The two-dimensional real Fourier transform of small maps as products of real matrices.

A map of some 24x24 positions is transformed faster by two matrix products than by an FFT, whose strength is in
large sizes: about 4 (H + W) multiply-accumulates an element there and back, in any dtype that has a matrix product,
without a complex number. So it works under bf16 autocast, sharded parameters, torch.compile and export. `torch.fft`
is what it is tested against.

A spectrum is (B, 2, H, W // 2 + 1, C): real part, imaginary part.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.ops import kernels, products

LARGEST_SIDE = 32  # of a map: holds those of 384 px images (24 and 12), with room; beyond, the cost grows with the side


class FourierBasis(NamedTuple):
    """Matrices of the 'ortho' transform of an (H, W) map with V = W // 2 + 1 columns of frequencies.

    rows: (2 V, W), along W: V real, then V imaginary parts. columns: (2 H, 2 H), along H, from (position, part) to
    (part, frequency); it is orthogonal, so its inverse is its transpose. rows_inverse: (W, 2 V); a frequency whose
    conjugate was left out counts twice.
    """

    rows: Tensor
    columns: Tensor
    rows_inverse: Tensor


def fourier_basis(height: int, width: int, dtype: torch.dtype, device: torch.device) -> FourierBasis | None:
    """The basis of maps of that size, or None for sizes that are left to the FFT. Made once a size and device."""
    if max(height, width) > LARGEST_SIDE or device.type == "meta":  # meta: FLOPs are counted as published
        return None
    if torch.compiler.is_compiling() or kernels.exported() or kernels.under_a_mode():  # a traced one must not stay
        return _basis(height, width, dtype, device)
    return _kept_basis(height, width, dtype, device)


def _basis(height: int, width: int, dtype: torch.dtype, device: torch.device) -> FourierBasis:
    with torch.inference_mode(False), torch.no_grad():
        cos, sin = _waves(width)  # (W, W), by frequency and position
        kept = width // 2 + 1
        rows = torch.cat((cos[:kept], -sin[:kept]))
        twice = torch.full((kept,), 2.0, dtype=torch.float64, device="cpu")
        twice[0] = 1.0
        if width % 2 == 0:
            twice[-1] = 1.0
        rows_inverse = torch.cat((cos[:kept] * twice[:, None], -sin[:kept] * twice[:, None])).t()
        cos, sin = _waves(height)
        real = torch.stack((cos, sin), -1).flatten(1)  # (H, 2 H): of position 0 its real, its imaginary part, ...
        imaginary = torch.stack((-sin, cos), -1).flatten(1)
        columns = torch.cat((real, imaginary))
        return FourierBasis(*(m.to(dtype=dtype, device=device).contiguous() for m in (rows, columns, rows_inverse)))


_kept_basis = cache(_basis)


def _waves(size: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(size, device="cpu")  # whatever the default device
    angle = 2 * math.pi / size * (n[:, None] * n % size).double()
    return angle.cos() / math.sqrt(size), angle.sin() / math.sqrt(size)


def transform(x: Tensor, basis: FourierBasis) -> Tensor:
    """(B, H, W, C) -> spectrum (B, 2, H, V, C)."""
    batch, height, width, channels = x.shape
    frequencies = basis.rows.shape[0] // 2
    half = _each(basis.rows, x.reshape(batch * height, width, channels))  # (B H, 2 V, C)
    spectrum = _each(basis.columns, half.view(batch, 2 * height, frequencies * channels))
    return spectrum.view(batch, 2, height, frequencies, channels)


def inverse(spectrum: Tensor, basis: FourierBasis) -> Tensor:
    """Spectrum (B, 2, H, V, C) -> (B, H, W, C), as `torch.fft.irfft2`."""
    batch, _, height, frequencies, channels = spectrum.shape
    half = _each(basis.columns.t(), spectrum.reshape(batch, 2 * height, frequencies * channels))
    x = _each(basis.rows_inverse, half.view(batch * height, 2 * frequencies, channels))
    return x.view(batch, height, basis.rows_inverse.shape[0], channels)


class SpectrumFilter(NamedTuple):
    """A filter of frequencies as a product takes it: real part (H, V, C), and (2, H, V, C): imaginary part, with the
    sign that it has for the real and for the imaginary part of the product.
    """

    real: Tensor
    imaginary: Tensor


def spectrum_filters(parts: Tensor) -> list[SpectrumFilter]:
    """Of several filters (n, 2, H, V, C), real and imaginary part."""
    real, imaginary = parts.unbind(1)
    signed = torch.stack((-imaginary, imaginary), 1)
    return [SpectrumFilter(*each) for each in zip(real.unbind(), signed.unbind(), strict=True)]


def filter_forward(x: Tensor, filt: SpectrumFilter, basis: FourierBasis) -> tuple[Tensor, Tensor]:
    """(circular convolution of x (B, H, W, C) with the filter, spectrum of x)."""
    spectrum = transform(x, basis)
    if kernels.exported():  # as four products: who runs the graph may have no fast way to turn a tensor round
        re, im = spectrum.unbind(1)
        real, imaginary = re * filt.real + im * filt.imaginary[0], re * filt.imaginary[1] + im * filt.real
        return inverse(torch.stack((real, imaginary), 1), basis), spectrum
    product = torch.addcmul(spectrum * filt.real, spectrum.flip(1), filt.imaginary)
    return inverse(product, basis), spectrum


def filter_backward(
    dy: Tensor, spectrum: Tensor, filt: SpectrumFilter, basis: FourierBasis
) -> tuple[Tensor, SpectrumFilter]:
    """(dx, gradient of the filter, in float32 or better) of `filter_forward`: the same four products, transposed."""
    adjoint = FourierBasis(basis.rows_inverse.t(), basis.columns, basis.rows.t())
    dproduct = transform(dy, adjoint)
    conjugate = torch.addcmul(dproduct * filt.real, dproduct.flip(1), filt.imaginary, value=-1)
    wide = products.sum_dtype(spectrum.dtype)
    real = (dproduct * spectrum).sum((0, 1), dtype=wide)
    imaginary = (dproduct * spectrum.flip(1)).sum(0, dtype=wide)
    return inverse(conjugate, adjoint), SpectrumFilter(real, imaginary)


def _each(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix` (M, K) times every one of (N, K, C). Not `matmul`, which may lay C and N out anew for one product."""
    return products.bmm(matrix.expand(x.shape[0], -1, -1), x)
