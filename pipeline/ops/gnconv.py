"""Recursive gated convolution (gnConv) and its global-local filter.

Source: HorNet, Rao et al. 2022, sections 3.1 (gnConv) and 3.3 (global filter variant). This is the readable
path that faster spellings are held equal to. Activations are NHWC throughout, so that every 1x1 convolution is
one matrix product and LayerNorm runs over the last dimension; parameters keep their published names and shapes.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def gnconv_dims(dim: int, order: int) -> list[int]:
    """Channels of each gating step, `dim / 2**(order - 1)` up to `dim`, e.g. (64, 3) -> [16, 32, 64].

    Raises:
        ValueError: `order` is below 1 or the narrowest step would not be a whole number of channels.
    """
    if order < 1 or dim % 2 ** (order - 1):
        raise ValueError(
            f"gnConv of order {order} needs a width that is a multiple of 2**(order - 1), got {dim} channels: "
            "change the width or the order of this stage"
        )
    return [dim // 2**k for k in reversed(range(order))]


def recursive_gating(gate: Tensor, context: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The recursion of gnConv: `x_0 = gate * c_0`, then `x_k = (W_k x_{k-1} + b_k) * c_k`.

    Args:
        gate: (B, H, W, dims[0]).
        context: (B, H, W, sum(dims)), what the depthwise layer saw; `c_0, c_1, ...` are its consecutive slices.
        weights: one per further order, (dims[k], dims[k-1]) or the same as a 1x1 convolution with two
            trailing ones.
        biases: one per further order, (dims[k],).

    Returns:
        (B, H, W, dims[-1]). Source: HorNet, section 3.1, equations 3.3 and 3.4.
    """
    dims = [gate.shape[-1], *(w.shape[0] for w in weights)]
    first, *rest = context.split(dims, dim=-1)
    x = gate * first  # (B, H, W, dims[0])
    for weight, bias, context_k in zip(weights, biases, rest, strict=True):
        x = F.linear(x, weight.flatten(1), bias) * context_k  # (B, H, W, dims[k])
    return x


class GnConv(nn.Module):
    """Gated convolution of order `order` on (B, H, W, dim) -> (B, H, W, dim).

    Args:
        dim: channels, a multiple of `2**(order - 1)`.
        order: how many gating steps; 1 is an ordinary gated convolution.
        filter_size: None for a 7x7 depthwise convolution, or (h, w) of the stored global filter (see
            `GlobalLocalFilter`).
        scale: factor on the depthwise output, 1/3 in every published model.

    Raises:
        ValueError: `dim` does not divide (see `gnconv_dims`, `GlobalLocalFilter`).

    Source: HorNet, section 3.1.
    """

    def __init__(
        self, dim: int, order: int = 5, filter_size: tuple[int, int] | None = None, scale: float = 1 / 3
    ) -> None:
        super().__init__()
        self.dims = gnconv_dims(dim, order)
        self.scale = scale
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, self.dims[0] + total, 1)
        self.dwconv: nn.Module
        if filter_size is None:
            self.dwconv = nn.Conv2d(total, total, 7, padding=3, groups=total)
        else:
            self.dwconv = GlobalLocalFilter(total, filter_size)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for narrow, wide in itertools.pairwise(self.dims))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.proj_in.weight.flatten(1), self.proj_in.bias)  # (B, H, W, dims[0] + total)
        gate, context = x.split([self.dims[0], sum(self.dims)], dim=-1)
        if isinstance(self.dwconv, GlobalLocalFilter):
            context = self.dwconv(context)
        else:
            context = _to_nhwc(self.dwconv(_to_nchw(context)))
        pws = cast(list[nn.Conv2d], list(self.pws))
        weights = [pw.weight for pw in pws]
        biases = [cast(Tensor, pw.bias) for pw in pws]
        x = recursive_gating(gate, context * self.scale, weights, biases)  # (B, H, W, dim)
        return F.linear(x, self.proj_out.weight.flatten(1), self.proj_out.bias)


class GlobalLocalFilter(nn.Module):
    """Half the channels through a 3x3 depthwise convolution, half through a learned filter over the whole map.

    (B, H, W, dim) -> (B, H, W, dim), the two halves interleaved channel by channel. The global half is a circular
    convolution spelled as a product in frequency space; its filter is stored for one map size and resized
    bilinearly to the map at hand.

    Args:
        dim: channels, even.
        filter_size: (h, w) of the stored filter; `global_filter_size` gives it for an image size.

    Raises:
        ValueError: `dim` is odd.

    Source: HorNet, section 3.3; the filter is that of GFNet (Rao et al. 2021).
    """

    def __init__(self, dim: int, filter_size: tuple[int, int]) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"the global-local filter halves its channels, got {dim}: use an even width")
        half = dim // 2
        self.dw = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        # Real and imaginary part side by side: complex parameters do not survive bf16 and sharded training.
        self.complex_weight = nn.Parameter(torch.randn(half, *filter_size, 2) * 0.02)
        self.pre_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.post_norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = _to_nchw(self.pre_norm(x))
        near, far = x.chunk(2, dim=1)  # (B, dim / 2, H, W) each
        near = self.dw(near)
        far = global_filter(far, self.complex_weight).to(near.dtype)
        x = torch.stack((near, far), dim=2).flatten(1, 2)  # (B, dim, H, W): near 0, far 0, near 1, far 1, ...
        return self.post_norm(_to_nhwc(x))


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Circular convolution over the whole map, as a product in frequency space.

    Args:
        x: (B, C, H, W), any floating type.
        weight: (C, h, w, 2), real and imaginary part; resized when (h, w) is not (H, W // 2 + 1).

    Returns:
        (B, C, H, W), in float64 if `x` is float64 and in float32 otherwise: the transform has no bf16, and
        half-precision frequencies cost 1e-3 in accuracy. Autocast is off inside.
    """
    height, width = x.shape[-2:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with _no_autocast(x.device.type):
        filt = resize_filter(weight.to(dtype), (height, width // 2 + 1))
        spectrum = torch.fft.rfft2(x.to(dtype), norm="ortho")  # (B, C, H, W // 2 + 1)
        spectrum = spectrum * torch.view_as_complex(filt.contiguous())
        return torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")


def resize_filter(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a stored filter (C, h, w, 2) to (C, *size, 2), bilinear with aligned corners; same size: as is."""
    if tuple(weight.shape[1:3]) == tuple(size):
        return weight
    planes = weight.permute(3, 0, 1, 2)  # (2, C, h, w)
    planes = F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=True)
    return planes.permute(1, 2, 3, 0)


def resize_global_filters(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit the global filters of a checkpoint to a model built for another resolution.

    Args:
        state_dict: a HorNet checkpoint; not modified.
        model: the HorNet to load it into; its `complex_weight` shapes (C, h, w, 2) are the target.

    Returns:
        A new dict in which each `complex_weight` has the model's (h, w), resized bilinearly with aligned corners
        in float32 and cast back. Every other entry, and every filter that fits already, is the same tensor.

    Raises:
        ValueError: a filter's channels differ, so the checkpoint is of another width.
    """
    target = {name: p.shape for name, p in model.named_parameters() if name.endswith("complex_weight")}
    resized = dict(state_dict)
    for name, shape in target.items():
        if name not in state_dict or state_dict[name].shape == shape:
            continue
        old = state_dict[name]
        if old.ndim != 4 or (old.shape[0], old.shape[3]) != (shape[0], 2):
            raise ValueError(
                f"{name}: the checkpoint has {tuple(old.shape)}, the model {tuple(shape)}; only height and width "
                "can be resized: load it into the variant it was trained as"
            )
        dtype = torch.promote_types(old.dtype, torch.float32)
        resized[name] = resize_filter(old.to(dtype), (shape[1], shape[2])).to(old.dtype).contiguous()
    return resized


def global_filter_size(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Filter (h, w) that fits an image of `image_size` at `stride` exactly, e.g. 224 at stride 16 -> (14, 8)."""
    height, width = (size // stride for size in image_size)
    return height, width // 2 + 1


def _to_nchw(x: Tensor) -> Tensor:
    # A view on channels_last memory, not a copy to planes: on a CPU the depthwise 7x7 in fp32 is faster on it
    # forward (up to 3 times) and in its weight gradient (1.2 to 4 times; maps of 7 to 56 pixels).
    return x.permute(0, 3, 1, 2)


def _to_nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):  # the meta device has no autocast to switch off
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
