"""The structure of the published HorNet, as the baseline that benchmarks divide by.

Source: HorNet, Rao et al. 2022, and the description of the released models; written anew. What costs time there is
kept: eager, activations in NCHW, LayerNorm over channels by hand (mean, squared deviation, square root, affine), 1x1
convolutions, layer scale, scale and drop path as operations of their own, permutes around the MLP. The state-dict keys
are the published ones, so weights of our `HorNet` load strictly. tests/pipeline/models/test_published.py
holds it to tests/golden. Not for training: no initialisation recipe, no checkpointing.
"""

import contextlib
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

DEPTHS, ORDERS = (2, 3, 18, 2), (2, 3, 4, 5)
STRIDES = (4, 8, 16, 32)
GF_STAGES = (2, 3)  # stages with the global-local filter in the GF models
EPS = 1e-6
DEPTHWISE_SCALE = 1 / 3


def widths(first: int) -> tuple[int, ...]:
    """Channels of the four stages: 64, 96, 128 or 192 first for T, S, B or L."""
    return first, 2 * first, 4 * first, 8 * first


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):  # the meta device has none to switch off
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class ChannelsFirstNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), operation by operation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + EPS)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Filter(nn.Module):
    """The global-local filter on (B, dim, H, W): half 3x3 depthwise, half a product in frequency space."""

    def __init__(self, dim: int, height: int, width: int) -> None:
        super().__init__()
        half = dim // 2
        self.dw = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.complex_weight = nn.Parameter(torch.randn(half, height, width, 2) * 0.02)
        self.pre_norm = ChannelsFirstNorm(dim)
        self.post_norm = ChannelsFirstNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.pre_norm(x).chunk(2, dim=1)
        near = self.dw(near)
        height, width = far.shape[-2:]
        with no_autocast(x.device.type):
            spectrum = torch.fft.rfft2(far.float(), norm="ortho")
            filt = self.complex_weight.float()
            if filt.shape[1:3] != spectrum.shape[2:]:
                planes = filt.permute(3, 0, 1, 2)
                planes = F.interpolate(planes, size=spectrum.shape[2:], mode="bilinear", align_corners=True)
                filt = planes.permute(1, 2, 3, 0)
            spectrum = spectrum * torch.view_as_complex(filt.contiguous())
            far = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")
        both = torch.cat((near.unsqueeze(2), far.unsqueeze(2)), dim=2)  # channel by channel
        return self.post_norm(both.flatten(1, 2))


class PublishedGnConv(nn.Module):
    """gnConv of `order` on (B, dim, H, W)."""

    def __init__(self, dim: int, order: int, filter_size: tuple[int, int] | None) -> None:
        super().__init__()
        self.dims = [dim // 2**k for k in reversed(range(order))]
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        self.dwconv = Filter(total, *filter_size) if filter_size else nn.Conv2d(total, total, 7, 1, 3, groups=total)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList(nn.Conv2d(self.dims[k], self.dims[k + 1], 1) for k in range(order - 1))

    def forward(self, x: Tensor) -> Tensor:
        gate, context = self.proj_in(x).split((self.dims[0], sum(self.dims)), dim=1)
        first, *rest = (self.dwconv(context) * DEPTHWISE_SCALE).split(self.dims, dim=1)
        x = gate * first
        for pointwise, context_k in zip(self.pws, rest, strict=True):
            x = pointwise(x) * context_k
        return self.proj_out(x)


class PublishedBlock(nn.Module):
    """(B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(
        self, dim: int, order: int, filter_size: tuple[int, int] | None, drop_path: float, layer_scale_init: float
    ) -> None:
        super().__init__()
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.norm1 = ChannelsFirstNorm(dim)
        self.gnconv = PublishedGnConv(dim, order, filter_size)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma1.view(-1, 1, 1) * self.gnconv(self.norm1(x)))
        branch = self.norm2(x.permute(0, 2, 3, 1))
        branch = self.gamma2 * self.pwconv2(self.act(self.pwconv1(branch)))
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


class PublishedHorNet(nn.Module):
    """(B, 3, H, W), H and W at least 32 -> (B, num_classes).

    Args:
        dims: width per stage; `widths` gives them.
        gf: the global-local filter in the last two stages.
        drop_path_rate: of the last block; grows linearly from 0.
        img_size: image size that the stored filters fit.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int] = DEPTHS,
        orders: Sequence[int] = ORDERS,
        gf: bool = False,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        img_size: int = 224,
        layer_scale_init: float = 1e-6,
    ) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), ChannelsFirstNorm(dims[0]))]
        )
        for narrow, wide in itertools.pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(ChannelsFirstNorm(narrow), nn.Conv2d(narrow, wide, 2, stride=2))
            )
        last = max(sum(depths) - 1, 1)
        number = 0
        self.stages = nn.ModuleList()
        for i, (depth, dim, order) in enumerate(zip(depths, dims, orders, strict=True)):
            side = img_size // STRIDES[i]
            filter_size = (side, side // 2 + 1) if gf and i in GF_STAGES else None
            blocks = []
            for _ in range(depth):
                blocks.append(PublishedBlock(dim, order, filter_size, drop_path_rate * number / last, layer_scale_init))
                number += 1
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((2, 3))))
