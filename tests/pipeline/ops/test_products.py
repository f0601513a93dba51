"""oneDNN's products in place of MKL's: the same values and gradients, whatever CPU the tests run on."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.ops import layers, products
from pipeline.ops.gnconv import GnConv


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(products, "ONEDNN", True)


def error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm())


@pytest.mark.parametrize(
    ("shape", "out"),
    [
        ((2, 3, 5, 16), 24),  # little work: a plain product
        ((8, 14, 14, 64), 128),  # a convolution's gradient
        ((8, 7, 7, 256), 512),  # few positions
        ((300, 256), 192),  # no map
        ((3000, 96), 64),
        ((0, 7, 7, 16), 8),
    ],
)
@pytest.mark.parametrize("gaps", [False, True])
def test_linear_layers(shape: tuple[int, ...], out: int, gaps: bool) -> None:
    torch.manual_seed(0)
    width = shape[-1]
    x = torch.randn(*shape[:-1], width + 8 * gaps)[..., :width].requires_grad_()
    weight, bias = torch.randn(out, width, requires_grad=True), torch.randn(out, requires_grad=True)
    y = layers.linear(x, weight, bias)
    dout = torch.randn(*shape[:-1], out + 8 * gaps)[..., :out]
    found = [y, *torch.autograd.grad(y, (x, weight, bias), dout)]
    wide = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    truth = torch.nn.functional.linear(*wide)
    truths = [truth, *torch.autograd.grad(truth, wide, dout.double())]
    assert y.is_contiguous()
    if x.numel():
        assert [error(*pair) < 1e-6 for pair in zip(found, truths, strict=True)] == [True] * 4


def test_each_way_of_a_weight_gradient_is_taken() -> None:
    """Or the test above would be one of fewer ways than it lists."""
    taken: list[str] = []
    counted = torch.profiler.ProfilerActivity.CPU
    for shape, out in (((2, 3, 5, 16), 24), ((8, 14, 14, 64), 128), ((8, 7, 7, 256), 512)):
        with torch.profiler.profile(activities=[counted]) as profile:
            products.weight_gradients(torch.randn(*shape[:-1], out), torch.randn(shape), (True, True))
        names = {event.key for event in profile.key_averages()}
        taken.append(
            next(n for n in ("aten::mm", "aten::convolution_backward", "mkldnn::_linear_pointwise") if n in names)
        )
    assert taken == ["aten::mm", "aten::convolution_backward", "mkldnn::_linear_pointwise"]


def test_frozen_layers_and_missing_biases() -> None:
    x, weight = torch.randn(8, 14, 14, 64, requires_grad=True), torch.randn(128, 64, requires_grad=True)
    layers.linear(x, weight.detach(), None).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    layers.linear(x.detach(), weight, None).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().flatten(0, -2).sum(0).expand(128, -1), rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(layers.linear(x, weight, None), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_counted_exported_and_other_tensors_stay_pytorch_s() -> None:
    """A counter of FLOPs knows nothing of the operator, and who runs an exported model may not have it."""
    x = torch.randn(2, 4, 4, 8)
    assert products.by_onednn(x)
    assert not products.by_onednn(x.double())
    assert not products.by_onednn(x.bfloat16())
    assert not products.by_onednn(x.to("meta"))
    with FlopCounterMode(display=False) as counter:
        assert not products.by_onednn(x)
        layers.linear(x.requires_grad_(), torch.randn(6, 8, requires_grad=True), None).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 8 * 6
    graph = torch.export.export(GnConv(16, 2), (torch.randn(1, 8, 8, 16),)).graph
    assert not any("onednn" in str(node.target) or "hornet" in str(node.target) for node in graph.nodes)


def test_compiled_it_is_the_same_operator_without_a_break() -> None:
    torch.manual_seed(0)
    layer = GnConv(64, 3)
    x = torch.randn(4, 14, 14, 64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().mean(), [x, *layer.parameters()])
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(graph.print_readable(print_output=False))
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().mean(), [x, *layer.parameters()])
    assert "hornet_pretraining.linear" in seen[0]
    assert "hornet_pretraining.weight_gradient" in seen[0]
    for pair in zip(found, wanted, strict=True):
        assert error(pair[0], pair[1].double()) < 1e-5


def test_onednn_gets_matrices_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few positions, gating has slices of wider maps: of these its loop is a hundred times as slow."""
    seen: list[tuple[tuple[int, ...], ...]] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((x.stride(), weight.stride()))
        return x @ weight.t()

    monkeypatch.setattr(products, "_linear", linear)
    dout, wide = torch.randn(1, 16, 16, 256), torch.randn(1, 16, 16, 480)
    (weight, _) = products.weight_gradients(dout, wide[..., 224:], (True, False))
    assert seen == [((1, 256), (1, 256))]
    torch.testing.assert_close(weight, dout.flatten(0, 2).t() @ wide[..., 224:].flatten(0, 2))
