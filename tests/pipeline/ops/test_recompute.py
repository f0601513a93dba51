"""Policies of saving against plain autograd: the same values and gradients, and the bytes that each keeps."""

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.block import draw_keeps
from pipeline.models.hornet import HorNet
from pipeline.models.stage import POLICIES
from tests.support.models import furthest, gradients, model_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_every_policy_has_the_gradients_of_plain_autograd(gf: bool, dtype: torch.dtype, bound: float):
    model, x = model_of(gf, dtype), torch.randn(5, 3, 64, 96, dtype=dtype)
    plain = gradients(model, x, "none")
    for policy in (*POLICIES[1:], ("stage", "selective_mlp", "block", "none")):
        assert furthest(gradients(model, x, policy), plain) <= bound, policy


def test_recomputing_a_block_repeats_it_to_the_bit():
    model, x = model_of(True), torch.randn(4, 3, 64, 64)
    selective = gradients(model, x, "selective")
    for policy in ("block", "stage"):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x, policy), selective, strict=True)), policy


@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
def test_bf16_is_no_further_from_the_truth_than_plain_autograd(gf: bool):
    """Against float64. Rounding differs between the two spellings, hence the quarter."""
    model, x = model_of(gf, drop_path_rate=0.1), torch.randn(4, 3, 64, 64)
    plain, lean = (gradients(model, x, policy, autocast=True) for policy in ("none", "selective"))
    truth = gradients(model.double(), x.double(), "none")
    errors = [
        torch.tensor([float((a.double() - e).norm() / e.norm()) for a, e in zip(each, truth, strict=True)])
        for each in (plain, lean)
    ]
    print(f"bf16 error, mean over tensors: plain {errors[0].mean():.2e}, selective {errors[1].mean():.2e}")
    assert errors[1].mean() <= 1.25 * errors[0].mean()
    assert errors[1].max() <= 0.1


def test_compiled_blocks_are_one_graph_each():
    """Every policy without a graph break, and the gradients of eager. Inductor is left out: it needs a C++ compiler.

    The GF model has both kinds of block.
    """
    eager, model = model_of(True), model_of(True)
    model.compile_blocks(backend="aot_eager")
    x = torch.randn(4, 3, 64, 64)
    torch._dynamo.reset()
    for policy in POLICIES:
        torch._dynamo.utils.counters.clear()
        assert furthest(gradients(model, x, policy), gradients(eager, x, policy)) <= 1e-5, policy
        assert not torch._dynamo.utils.counters["graph_break"], policy
        # Blocks of a stage share a graph, and block and stage those of selective.
        graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        assert graphs == (0 if policy in ("block", "stage") else len(model.stages)), policy


def test_compiled_blocks_keep_what_the_policy_says():
    """By the partitioner that inductor uses too."""
    eager, model = (model_of(True, depths=(1, 1, 1, 1), drop_path_rate=0.0) for _ in range(2))
    model.compile_blocks(backend="aot_eager_decomp_partition")
    torch._dynamo.reset()
    for policy in ("selective", "selective_mlp"):
        each = [saved_bytes(m, policy, 64, 2) - saved_bytes(m, policy, 64, 1) for m in (model, eager)]
        assert each[0] <= 1.01 * each[1], policy


def saved_bytes(model: HorNet, policy: str, px: int, count: int) -> int:
    """Bytes of the storages that a forward pass of `count` images saves for backward."""
    model.set_checkpointing(policy)
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(count, 3, px, px)).sum()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
def test_policies_keep_what_they_say(gf: bool):
    """Shares of `none` in bf16 at the depths, widths and orders of HorNet-L over eight; products repeated.

    Bounds are those of the full model (tests/bench/bench_activations.py) with a little room.
    """
    name = "hornet_large_gf" if gf else "hornet_large_7x7"
    model = timm.create_model(name, dims=(24, 48, 96, 192), num_classes=7)
    images = {policy: [saved_bytes(model, policy, 64, count) for count in (1, 2)] for policy in POLICIES}
    each = {policy: two - one for policy, (one, two) in images.items()}
    flops = {}
    for policy in POLICIES:
        model.set_checkpointing(policy)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 64, 64)).sum().backward()
        flops[policy] = counter.get_total_flops() / 1e6
    shares = {policy: round(each[policy] / each["none"], 3) for policy in POLICIES}
    more = {policy: round(flops[policy] / flops["none"] - 1, 3) for policy in POLICIES}
    print(shares, more)
    assert shares["selective"] <= 0.65
    assert shares["selective_mlp"] <= 0.45
    assert shares["block"] <= 0.10
    assert shares["stage"] <= 0.05
    assert more["selective"] == 0
    assert more["selective_mlp"] <= 0.11
    assert max(more["block"], more["stage"]) <= 0.34


def test_drop_path_leaves_out_samples_and_not_ranks():
    """The same draws as timm's mask; a branch that no sample takes still gives its parameters a gradient, of zero."""
    rates = [0.0, 0.5, 0.999]
    torch.manual_seed(3)
    all_kept, some, none = draw_keeps(rates, 6, torch.empty(0), masks=False)
    torch.manual_seed(3)
    masks = draw_keeps(rates, 6, torch.empty(0), masks=True)
    torch.manual_seed(3)
    expected = torch.empty(6, 1, 1, 1).bernoulli_(0.5) / 0.5
    assert (all_kept.rows, all_kept.factor, masks[0].mask) == (None, 1.0, None)
    assert torch.equal(masks[1].mask, expected)
    assert some.rows.tolist() == expected.flatten().nonzero().flatten().tolist()
    assert some.factor == 2.0
    assert (none.rows.tolist(), none.factor) == ([0], 0.0)

    model = model_of(True, drop_path_rate=0.999)
    for policy in POLICIES:
        _, _, *grads = gradients(model, torch.randn(2, 3, 64, 64), policy)
        assert all(grad.isfinite().all() for grad in grads)
        assert not dict(zip([n for n, _ in model.named_parameters()], grads, strict=True))["stages.3.0.gamma1"].any()


@pytest.mark.parametrize("policy", ["none", "selective", "selective_mlp"])
def test_frozen_parameters(policy: str):
    """Those that are left get the gradients that they had, and frozen ones none; the images want none either."""
    model, x = model_of(True, drop_path_rate=0.0), torch.randn(2, 3, 32, 32)
    names = [name for name, _ in model.named_parameters()]
    whole = dict(zip(names, gradients(model, x, policy)[2:], strict=True))
    kinds = {name.split(".", 3)[-1] for name in names if name.startswith("stages")}  # one block's
    assert "gnconv.dwconv.complex_weight" in kinds
    alone = [[name for name in names if name.endswith(kind)] for kind in sorted(kinds)]
    left_out = [
        [name for name in names if part not in name] for part in ("norm", "weight", "bias", "gnconv", "stages.2")
    ]
    for trained in (*alone, *left_out):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        model.zero_grad()
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in trained:
                torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5)
            else:
                assert parameter.grad is None, name


def test_mistakes_in_policies():
    model = model_of(False)
    with pytest.raises(ValueError, match=r"'all': one of none, selective, .*or 4 of them"):
        model.set_checkpointing("all")
    with pytest.raises(ValueError, match="or 4 of them"):
        model.set_checkpointing(["block", "none"])
    model.set_grad_checkpointing()
    assert model.checkpointing == ("block",) * 4
