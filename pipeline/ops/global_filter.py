"""The global-local filter of HorNet-GF, and its filters in frequency space.

Source: HorNet, Rao et al. 2022, section 3.3; the filter is that of GFNet (Rao et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.depthwise import depthwise
from pipeline.ops.folding import stack
from pipeline.ops.fourier import FourierBasis, SpectrumFilter, filter_forward, spectrum_filters
from pipeline.ops.layers import NORM_EPS, interleave, layer_norm, no_autocast, norm_of


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

    def forward(self, x: Tensor, basis: FourierBasis | None = None, scale: float = 1.0) -> Tensor:
        """`basis`: of the map's size in the dtype of `x`, for a filter by matrix products; None: an FFT."""
        near, far = layer_norm(x, norm_of(self.pre_norm)).chunk(2, -1)  # (B, H, W, dim / 2) each
        near = depthwise(near, self.dw.weight, None)
        if basis is None:
            far = global_filter(far.permute(0, 3, 1, 2), self.complex_weight).permute(0, 2, 3, 1).to(x.dtype)
        else:
            far, _ = filter_forward(far, self.spectrum_filter(x), basis)
        return layer_norm(interleave(near, far), norm_of(self.post_norm, scale))

    def spectrum_filter(self, x: Tensor) -> SpectrumFilter:
        """The filter for a map like `x`, (B, H, W, C), in its dtype."""
        (filt,) = filters_of([self], (x.shape[1], x.shape[2]))
        return SpectrumFilter(*(part.to(x.dtype) for part in filt))


def filters_of(modules: Sequence[GlobalLocalFilter], size: tuple[int, int]) -> list[SpectrumFilter]:
    """The filters of modules of one width for maps of `size` (H, W), in the dtype of the parameters."""
    stored = stack([module.complex_weight for module in modules])  # (n, C, h, w, 2)
    parts = stored.permute(0, 4, 1, 2, 3)  # (n, 2, C, h, w)
    target = (size[0], size[1] // 2 + 1)
    if parts.shape[3:] != target:
        parts = F.interpolate(parts.flatten(0, 1), size=target, mode="bilinear", align_corners=True)
        parts = parts.unflatten(0, (-1, 2))
    return spectrum_filters(parts.permute(0, 1, 3, 4, 2).contiguous())


def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Circular convolution over the whole map, as a product in frequency space.

    Args:
        x: (B, C, H, W), any floating type.
        weight: (C, h, w, 2), real and imaginary part; resized when (h, w) is not (H, W // 2 + 1).

    Returns:
        (B, C, H, W), in float64 if `x` is float64 and in float32 otherwise: the transform has no bf16. Autocast is
        off inside.
    """
    height, width = x.shape[-2:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with no_autocast(x.device.type):
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
