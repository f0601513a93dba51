"""UPerNet's head: the published parameters and FLOPs, its arithmetic, and what a gnConv in it keeps and gives."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.dense.uper_head import POOLS, FcnHead, UperHead
from pipeline.models.plug_in import GnConvOnMaps
from pipeline.ops import kernels
from tests.support.kernels import INTERPRETED, import_kernels
from tests.support.models import furthest

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (8, 16, 24, 32)


def maps_of(height: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Four maps of an image of that size, as the backbone floors and lays them out."""
    torch.manual_seed(1)
    sizes = [(height // s, width // s) for s in (4, 8, 16, 32)]
    drawn = [torch.randn(2, c, *size, dtype=dtype) for c, size in zip(WIDTHS, sizes, strict=True)]
    return [each.contiguous(memory_format=torch.channels_last) for each in drawn]


@pytest.mark.parametrize(
    ("name", "size", "params_m", "gmacs"),
    [
        ("hornet_tiny_7x7", (512, 2048), 52, 926),
        ("hornet_small_7x7", (512, 2048), 81, 1030),
        ("hornet_base_7x7", (512, 2048), 121, 1174),
        ("hornet_large_7x7", (640, 2560), 232, 2473),
    ],
)
def test_published_upernet(name: str, size: tuple[int, int], params_m: int, gmacs: int) -> None:
    """Parameters with the auxiliary head, FLOPs without it: as the published numbers were counted."""
    with torch.device("meta"):
        backbone = timm.create_model(name, features_only=True).eval()
        channels = backbone.feature_info.channels()
        head, auxiliary = UperHead(channels, 512, 150).eval(), FcnHead(channels[2], 256, 150)
        x = torch.empty(1, 3, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert head(backbone(x)).shape == (1, 150, size[0] // 4, size[1] // 4)
    counted_m = sum(p.numel() for net in (backbone, head, auxiliary) for p in net.parameters()) / 1e6
    counted = counter.get_total_flops() / 2e9
    print(f"{name}: {counted_m:.2f} M ({params_m}), {counted:.1f} GMACs ({gmacs})")
    assert counted_m == pytest.approx(params_m, rel=0.01)
    assert counted == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("gnconv", [False, True])
def test_plain_arithmetic(gnconv: bool) -> None:
    """The head written down once more, level by level, at a size that is no multiple of 32."""
    torch.manual_seed(0)
    head = UperHead(WIDTHS, 16, 5, gnconv=gnconv).double().eval()
    for norm in (module for module in head.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    maps = maps_of(100, 140)

    def layer(module, x: Tensor) -> Tensor:
        mean, var = (y := module.conv(x)).mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
        y = (y - mean) / (var + 1e-6).sqrt()
        return F.relu(y * module.norm.weight[:, None, None] + module.norm.bias[:, None, None])

    def up(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear")

    m0, m1, m2, m3 = maps
    pools = [up(layer(p, F.adaptive_avg_pool2d(m3, n)), m3) for p, n in zip(head.pools, POOLS, strict=True)]
    t3 = layer(head.pooled, torch.cat([m3, *pools], 1))
    t2 = layer(head.laterals[2], m2) + up(t3, m2)
    t1 = layer(head.laterals[1], m1) + up(t2, m1)
    t0 = layer(head.laterals[0], m0) + up(t1, m0)
    levels = [layer(level, t) for level, t in zip(head.levels, (t0, t1, t2), strict=True)]
    joined = torch.cat([up(each, t0) for each in (*levels, t3)], 1)
    expected = head.classifier.conv(layer(head.fusion, joined))
    torch.testing.assert_close(head(maps), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("filter_size", [None, (4, 3)])
def test_gnconv_on_maps_keeps_less_and_gives_the_same(filter_size: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    module = GnConvOnMaps(24, 16, filter_size).double()
    x = torch.randn(2, 24, 9, 7, dtype=torch.float64)
    kept: list[int] = []

    def step(forward) -> list[Tensor]:
        module.zero_grad()
        inputs = x.permute(0, 2, 3, 1).contiguous().requires_grad_()
        found: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (found.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1],
            lambda t: t,
        ):
            y = forward(inputs)
        kept.append(sum(found.values()))
        y.square().sum().backward()
        assert inputs.grad is not None
        return [y.detach(), inputs.grad, *(p.grad for p in module.parameters() if p.grad is not None)]

    plain = step(module.gnconv)
    lean = step(module.gnconv.lean)
    assert len(plain) == len(lean) == 2 + len(list(module.parameters()))
    assert furthest(lean, plain) < 1e-12
    assert kept[1] < kept[0]
    torch.testing.assert_close(module(x), plain[0].permute(0, 3, 1, 2))


@pytest.mark.skipif(not INTERPRETED, reason="tests/gpu runs kernels on a GPU")
@pytest.mark.parametrize("filter_size", [None, (4, 3)])
def test_gnconv_on_maps_by_kernels(filter_size: tuple[int, int] | None) -> None:
    import_kernels()
    torch.manual_seed(0)
    module = GnConvOnMaps(24, 16, filter_size)
    found: list[list[Tensor]] = []
    for forced in (False, True):
        module.zero_grad()
        x = torch.randn(2, 24, 9, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with kernels.forced(forced):
            y = module(x)
            y.square().sum().backward()
        assert x.grad is not None
        found.append([y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert furthest(found[1], found[0]) < 1e-5
    assert not torch.equal(found[1][1], found[0][1])


def test_trains_in_bf16_without_buffers() -> None:
    """Every parameter gets a gradient in float32; scoring reads logits in the weights' dtype."""
    torch.manual_seed(0)
    head, auxiliary = UperHead(WIDTHS, 16, 5, gnconv=True, filter_size=(4, 3)), FcnHead(WIDTHS[2], 8, 5)
    assert not [*head.buffers(), *auxiliary.buffers()]
    maps = maps_of(100, 140, torch.float32)
    exact = head.eval()(maps)
    with torch.autocast("cpu", torch.bfloat16):
        scored = head(maps)
        torch.manual_seed(2)
        logits = head.train()(maps)
        (logits.float().square().mean() + auxiliary.train()(maps[2]).float().square().mean()).backward()
        torch.manual_seed(2)
        assert torch.equal(head(maps), logits)  # the CPU's generator alone decides what is dropped
        assert not torch.equal(head(maps), logits)
    assert (scored.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    assert (scored - exact).norm() < 0.03 * exact.norm()
    grads = [p.grad for net in (head, auxiliary) for p in net.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)
    with pytest.raises(ValueError, match="set gnconv=True"):
        UperHead(WIDTHS, 16, 5, filter_size=(4, 3))
