"""Maps of any size, and finer ones by dilation: against the published structure, and against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.graphs import capture
from pipeline.models.hornet import HorNet
from pipeline.models.stage import POLICIES
from pipeline.ops import kernels
from tests.bench.published import PublishedGnConv, PublishedHorNet
from tests.support.kernels import INTERPRETED, import_kernels
from tests.support.models import furthest, gradients, model_of

pytestmark = pytest.mark.usefixtures("one_thread")

DIMS, DEPTHS = (12, 24, 48, 96), (1, 2, 2, 1)


def published_of(model: HorNet, gf: bool) -> PublishedHorNet:
    published = PublishedHorNet(DIMS, DEPTHS, gf=gf, num_classes=7, img_size=64 if gf else 224)
    published.to(next(model.parameters()).dtype).load_state_dict(model.state_dict(), strict=True)
    return published


def with_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    logits.square().sum().backward()
    assert x.grad is not None
    return [logits.detach(), x.grad, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)]


@pytest.mark.parametrize("gf", [False, True])
@pytest.mark.parametrize("size", [(100, 140), (33, 47), (1100, 40)])
def test_floors_as_the_published_convolutions_do(gf: bool, size: tuple[int, int]) -> None:
    """(1100, 40): a map on which filters are taken by FFT. That is in float32 in the published model."""
    model = model_of(gf, torch.float64, drop_path_rate=0.0)
    published = published_of(model, gf)
    maps: list[Tensor] = []
    for stage in published.stages:
        stage.register_forward_hook(lambda module, inputs, output: maps.append(output.detach()))
    x = torch.randn(1 if max(size) > 1000 else 2, 3, *size, dtype=torch.float64)
    expected = with_gradients(published, x)
    with torch.no_grad():
        ours = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in ours] == [m.shape for m in maps]
    assert furthest([m.contiguous() for m in ours], maps) < (1e-5 if gf else 1e-12)
    assert furthest(with_gradients(model, x), expected) < (1e-5 if gf else 1e-12)


def test_refused_below_32_pixels() -> None:
    with pytest.raises(ValueError, match=r"image of 31x64: .*at least 32: resize or pad it$"):
        model_of(True)(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r"image of 24x24: .*at least 32"):
        model_of(True, img_size=24)


@pytest.mark.parametrize(("options", "size"), [({}, (68, 68)), ({"output_stride": 8}, (64, 64))])
def test_policies_and_graphs_agree(options: dict[str, int], size: tuple[int, int]) -> None:
    """Of maps that are floored, and of dilated ones; with samples that drop path leaves out."""
    model = model_of(True, torch.float64, **options)
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    expected = gradients(model, x, "none")
    for policy in POLICIES[1:]:
        assert furthest(gradients(model, x, policy), expected) < 1e-12, policy
    capture(model, 4, size[0], None)  # on a CPU the same step without a graph; drop path by masks
    assert furthest(gradients(model, x, "selective")[:1], expected[:1]) < 1e-12


@pytest.mark.parametrize("options", [{}, {"output_stride": 8}], ids=["stride 32", "stride 8"])
def test_kernels_and_compiled_blocks_agree(options: dict[str, int]) -> None:
    model = model_of(True, depths=(0, 1, 0, 1), **options)
    x = torch.randn(3, 3, 32, 32 if options else 47)
    expected = gradients(model, x, "selective")
    import_kernels()
    with kernels.forced(INTERPRETED):
        assert furthest(gradients(model, x, "selective"), expected) < 1e-4
    model.compile_blocks(backend="aot_eager")
    assert furthest(gradients(model, x, "selective"), expected) < 1e-4


@pytest.mark.parametrize("gf", [False, True])
def test_dilation_keeps_what_the_coarse_maps_hold(gf: bool) -> None:
    """Every second (fourth) row and column of a finer map is the plain net's map; weights are the same."""
    plain = model_of(gf, torch.float64).eval()
    x = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    expected = plain.forward_intermediates(x, intermediates_only=True)
    for stride in (16, 8):
        dilated = model_of(gf, torch.float64, output_stride=stride).eval()
        dilated.load_state_dict(plain.state_dict(), strict=True)
        maps = dilated.forward_intermediates(x, intermediates_only=True)
        assert [info["reduction"] for info in dilated.feature_info] == [4, 8, 16, 32][: 2 if stride == 8 else 3] + (
            [8, 8] if stride == 8 else [16]
        )
        for info, map_, coarse in zip(dilated.feature_info, maps, expected, strict=True):
            assert map_.shape[2:] == (96 // info["reduction"], 128 // info["reduction"])
            step = map_.shape[2] // coarse.shape[2]
            torch.testing.assert_close(map_[:, :, ::step, ::step], coarse, rtol=1e-10, atol=1e-10)
    odd = dilated.forward_intermediates(x[..., :110], intermediates_only=True)
    assert [tuple(map_.shape[2:]) for map_ in odd] == [(24, 27), (12, 13), (12, 13), (12, 13)]
    with pytest.raises(ValueError, match="output_stride=4"):
        model_of(gf, output_stride=4)


@pytest.mark.parametrize("size", [(96, 64), (112, 90)])
def test_dilation_is_that_of_the_convolutions(size: tuple[int, int]) -> None:
    """The last stage at stride 16: dilated 7x7 convolutions, on a 2x2 of stride 1 whose map is repeated at its edge, up
    to an even size.
    """
    model = model_of(False, torch.float64, output_stride=16).eval()
    published = published_of(model, False).eval()
    norm, halving = published.downsample_layers[3]
    conv = nn.Conv2d(48, 96, 2).double()
    conv.load_state_dict(halving.state_dict())
    height, width = (side // 16 for side in size)
    repeated = nn.ReplicationPad2d((0, 1 + width % 2, 0, 1 + height % 2))
    published.downsample_layers[3] = nn.Sequential(repeated, norm, conv)
    for block in published.stages[3]:
        gnconv = block.gnconv
        assert isinstance(gnconv, PublishedGnConv)
        gnconv.dwconv.dilation, gnconv.dwconv.padding = (2, 2), (6, 6)
    maps: list[Tensor] = []
    published.stages[3].register_forward_hook(lambda module, inputs, output: maps.append(output))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    published(x)
    found = model.forward_features(x)
    torch.testing.assert_close(found, maps[0][:, :, :height, :width], rtol=1e-10, atol=1e-10)
    assert found.shape[2:] == (height, width)


def test_dilation_drops_whole_samples() -> None:
    """A sample that drop path leaves out is left out at all offsets: the others' logits are as without it."""
    model = model_of(True, torch.float64, output_stride=8)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    masks = torch.ones(sum(rate > 0 for rate in model.drop_path_rates()), 3, 1, 1, 1, dtype=torch.float64)
    masks[:, 1] = 0
    found = model(x, masks)
    torch.testing.assert_close(found[::2], model(x[::2], masks[:, ::2]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1:2], model(x[1:2], masks[:, 1:2]), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found[1:2], model(x[1:2], masks[:, :1]))


def test_gradients_of_any_layout_become_maps() -> None:
    """A decoder's gradients come as (B, C, H, W) in memory, or as one number for all; no stage gets them so."""
    model = model_of(False, torch.float64, drop_path_rate=0.0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    seen: list[bool] = []
    for stage in model.stages:
        stage.register_full_backward_pre_hook(lambda module, grads: seen.append(grads[0].is_contiguous()))
    found: list[list[Tensor]] = []
    for spell in (lambda m: m.sum(), lambda m: m.contiguous().sum(), lambda m: (m * torch.ones_like(m)).sum()):
        model.zero_grad()
        maps = model.forward_intermediates(x, intermediates_only=True)
        torch.stack([spell(map_) for map_ in maps]).sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert seen == [True] * 12
    assert furthest(found[1], found[0]) < 1e-12
    assert furthest(found[2], found[0]) < 1e-12
