"""Training by CUDA graphs against the same net without: on a CPU by the eager twin, which hands in, copies and writes
over as the graph does; on a GPU by the graph itself.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pipeline.models import graphs, hornet
from pipeline.models.block import Keep, draw_keeps
from pipeline.models.graphs import capture
from pipeline.models.hornet import HorNet
from pipeline.models.stage import POLICIES
from pipeline.ops import kernels, products
from tests.support.models import furthest, model_of
from tests.support.recorded_graphs import record_graphs

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SIDE = 4, 64
MIXED = ("stage", "selective_mlp", "block", "none")
BF16 = torch.bfloat16


def built(gf: bool = True, policy: str | Sequence[str] = "selective", device: str = "cpu", **options) -> HorNet:
    model = model_of(gf, **options).to(device)
    model.set_checkpointing(policy)
    return model


def graphed(model: HorNet, autocast: torch.dtype | None = None) -> HorNet:
    capture(model, BATCH, SIDE, autocast)
    return model


def images(model: HorNet, seed: int, batch: int = BATCH, side: int = SIDE) -> Tensor:
    drawn = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return drawn.to(next(model.parameters()))


def passed(model: HorNet, seed: int, autocast: torch.dtype | None = None) -> Tensor:
    """Logits of a micro-batch, whose gradients are added to those that are there; drop path is drawn by the seed."""
    x = images(model, seed)
    torch.manual_seed(seed)
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        logits = model(x)
    logits.to(x.dtype).square().sum().backward()
    return logits.detach().to(x.dtype, copy=True)  # the graph's next pass writes over its own


def gradients(model: HorNet) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    assert None not in found
    return [gradient.clone() for gradient in found if gradient is not None]


def steps(model: HorNet, autocast: torch.dtype | None = None, count: int = 3) -> list[Tensor]:
    """Logits, gradients and weights of `count` updates, each of two micro-batches that drop path meets anew."""
    found = []
    for step in range(count):
        model.zero_grad()
        found += [passed(model, 10 * step + micro, autocast) for micro in range(2)]
        found += gradients(model)
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(1e-3 * parameter.grad / (1 + parameter.grad.norm()))
        found += [parameter.detach().clone() for parameter in model.parameters()]
    return found


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def with_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop path as compiled blocks have it, which compute what is dropped too."""

    def masked(rates: Sequence[float], batch: int, like: Tensor, masks: bool) -> list[Keep]:
        return draw_keeps(rates, batch, like, masks=True)

    monkeypatch.setattr(hornet, "draw_keeps", masked)


@pytest.mark.usefixtures("with_masks")
@pytest.mark.parametrize("autocast", [None, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
def test_steps_are_those_with_masks_to_the_bit(gf: bool, autocast: torch.dtype | None) -> None:
    for policy in (*POLICIES, MIXED) if gf and autocast is None else ("selective",):
        plain = steps(built(gf, policy), autocast, count=2)
        assert equal(steps(graphed(built(gf, policy), autocast), autocast, count=2), plain), policy


@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_masks_say_what_is_dropped_today(gf: bool, dtype: torch.dtype, bound: float) -> None:
    """The same draws, and up to rounding what comes of leaving samples out. (A mask is float32 at most.)"""
    ours, rows = (steps(make(built(gf, dtype=dtype)), count=1) for make in (graphed, lambda model: model))
    assert furthest(ours, rows) <= bound


def test_masks_are_drawn_as_ever() -> None:
    model = built()
    torch.manual_seed(3)
    keeps = draw_keeps(model.drop_path_rates(), BATCH, torch.empty(0), masks=True)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    masks = model.draw_masks(BATCH)
    assert torch.equal(torch.get_rng_state(), after)
    assert equal(list(masks), [keep.mask for keep in keeps if keep.mask is not None])
    assert masks.shape == (10, BATCH, 1, 1, 1)  # two branches of six blocks, of which the first is never dropped
    assert built(drop_path_rate=0.0).draw_masks(BATCH).shape == (0, BATCH, 1, 1, 1)
    assert equal(steps(graphed(built(drop_path_rate=0.0)), count=1), steps(built(drop_path_rate=0.0), count=1))


def test_a_capture_leaves_nothing_behind() -> None:
    model, plain = built(), built()
    calls: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    names = list(model.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    graphed(model.eval())
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert not calls
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(model.state_dict()) == names
    assert equal(list(model.state_dict().values()), list(plain.state_dict().values()))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    passed(model.train(), 0)
    assert sorted(calls) == sorted(names)  # once each


def test_other_passes_are_those_of_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = graphed(built()), built()
    monkeypatch.setattr(model.forward, "_replay", None)  # would fail
    x, larger, fewer = images(plain, 0), images(plain, 0, side=96), images(plain, 0, batch=3)
    with torch.no_grad():
        for each in (x, larger, fewer):
            torch.manual_seed(0)
            drawn = model(each)
            torch.manual_seed(0)
            assert torch.equal(drawn, plain(each))
    for each in (larger, fewer, x.clone().requires_grad_()):
        torch.manual_seed(0)
        drawn = model(each)
        torch.manual_seed(0)
        assert torch.equal(drawn, plain(each))
    model.eval()
    plain.eval()
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x, masks=torch.zeros(10, BATCH, 1, 1, 1)), plain(x))
    assert torch.equal(model.forward_intermediates(x)[0], plain.forward_features(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_net_without_graphs(copied) -> None:
    model = graphed(built())
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(images(other, 0)).any()
    assert "forward" not in vars(copied(other)) or copied(other).forward.__self__ is not other
    logits = passed(model, 0)
    assert logits.any()
    assert equal([passed(graphed(built()), 0)], [logits])


def test_weights_that_have_moved_are_followed() -> None:
    model, plain = graphed(built()), built()
    for net in (model, plain):
        for parameter in net.parameters():
            parameter.data = parameter.data * 1.25
    torch.manual_seed(1)
    masks = plain.draw_masks(BATCH)
    torch.manual_seed(1)
    x = images(plain, 1)
    assert torch.equal(model(x), plain(x, masks))


def test_frozen_weights_stay_without_gradients() -> None:
    model, plain = built(), built()
    for net in (model, plain):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("stages.3" in name or "head" in name)
    logits = passed(graphed(model), 2)
    torch.manual_seed(2)
    masks = plain.draw_masks(BATCH)
    expected = plain(images(plain, 2), masks)
    expected.square().sum().backward()
    assert torch.equal(logits, expected)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not theirs.requires_grad)
        assert theirs.grad is None or (ours.grad is not None and torch.equal(ours.grad, theirs.grad))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.requires_grad_(True),
        lambda net: net.reset_classifier(1),  # would fit the place of the former
        lambda net: setattr(net.stages[2][0], "drop_path_rate", 0.0),
        lambda net: net.prune_intermediate_layers(2) and None,
    ],
    ids=["thawed", "head", "drop path", "pruned"],
)
def test_a_net_that_has_changed_is_the_net_as_it_is(change: Callable[[HorNet], None]) -> None:
    found = []
    for make in (graphed, lambda net: net):
        net = built()
        net.stages[0].requires_grad_(False)
        make(net)
        torch.manual_seed(0)
        change(net)
        found.append([passed(net, 0), *(parameter.grad for parameter in net.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("captured", [None, BF16], ids=["f32", "bf16"])
def test_another_autocast_is_that_of_the_pass(captured: torch.dtype | None) -> None:
    other = None if captured else BF16
    assert equal([passed(graphed(built(), captured), 0, other)], [passed(built(), 0, other)])


def test_a_backward_pass_once_more() -> None:
    model = graphed(built())
    loss = model(images(model, 0)).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert equal(gradients(model), [2 * gradient for gradient in once])


def test_two_passes_before_one_backward_are_refused() -> None:
    """The second writes over what the first has kept. A graph would not notice; the twin does."""
    model = graphed(built())
    first = model(images(model, 0))
    model(images(model, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


def test_what_cannot_be_captured_is_told() -> None:
    with pytest.raises(ValueError, match=r"drop_rate=0\.1: set it to 0"):
        graphed(built(drop_rate=0.1))
    compiled = built()
    compiled.compile_blocks(backend="eager")
    with pytest.raises(ValueError, match="compiled blocks"):
        graphed(compiled)


@pytest.mark.usefixtures("with_masks")
@pytest.mark.parametrize("autocast", [None, BF16], ids=["f32", "bf16"])
def test_a_recorded_capture(autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own capture, of graphs that record operators: replayed, these depend on nothing but what is handed in,
    and wait for nothing.
    """
    for name, value in (("SLOW", ()), ("ONEDNN", False)):  # products as they are under the recording mode
        monkeypatch.setattr(products, name, value)
    plain = steps(built(policy=MIXED), autocast)
    monkeypatch.setattr(graphs, "_static", graphs._graphed)
    made = record_graphs(monkeypatch)
    assert equal(steps(graphed(built(policy=MIXED), autocast), autocast), plain)
    assert [graph.replays for graph in made] == [6, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("with_masks")
@pytest.mark.parametrize("autocast", [None, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("policy", [*POLICIES, MIXED], ids=str)
@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
@pytest.mark.parametrize("on", [False, True], ids=["plain", "kernels"])
def test_a_real_capture(on: bool, gf: bool, policy: str | Sequence[str], autocast: torch.dtype | None) -> None:
    """The graph against the same kernels one by one: their order of sums may differ, in atomics and workspaces."""
    with kernels.enabled(on):
        plain = steps(built(gf, policy, "cuda"), autocast)
        model = graphed(built(gf, policy, "cuda"), autocast)
        assert furthest(steps(model, autocast), plain) <= (1e-4 if autocast is None else 2e-2)
        x = images(model, 0)
        torch.manual_seed(0)
        with torch.no_grad():
            eager = model.eval()(x)
        assert torch.isfinite(eager).all()
        assert equal([model(x)], [eager])
