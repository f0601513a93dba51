"""The benchmarks' baseline computes what the published HorNet computes, and loads our weights."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from tests.bench.published import PublishedHorNet, widths
from tests.support.models import GOLDEN, drawn_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*_224x224.npz")), ids=lambda p: p.stem)
def test_agrees_with_the_published_model(path: Path) -> None:
    golden = np.load(path)
    gf = "_gf_" in path.stem
    model = PublishedHorNet(widths(64), gf=gf).double().eval()
    assert sorted(model.state_dict()) == list(golden["state_keys"])
    model.load_state_dict(drawn_state(model), strict=True)
    maps: list[torch.Tensor] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: maps.append(output.detach()))

    images = np.random.default_rng(20220729).standard_normal((2, 3, 224, 224)).astype(np.float32)
    x = torch.from_numpy(images).double().requires_grad_()
    logits = model(x)
    probe = np.random.default_rng(20220730).standard_normal(logits.shape)
    (logits * torch.from_numpy(probe)).sum().backward()

    # Both compute the FFT in float32, but the order of its operations may differ.
    rtol = 1e-6 if gf else 1e-9
    np.testing.assert_allclose(logits.detach(), golden["logits"], rtol=rtol, atol=rtol * np.abs(golden["logits"]).max())
    for i, stage_map in enumerate(maps):
        np.testing.assert_allclose(stage_map.square().mean().sqrt(), golden[f"stage{i}_rms"], rtol=rtol)
    np.testing.assert_allclose(x.grad.norm(), golden["input_grad_norm"], rtol=rtol)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert sorted(norms) == sorted(golden["param_names"])
    np.testing.assert_allclose([norms[n] for n in golden["param_names"]], golden["param_grad_norms"], rtol=10 * rtol)


@pytest.mark.parametrize("name", ["hornet_large_7x7", "hornet_large_gf_img384"])
def test_same_keys_and_shapes_as_ours(name: str) -> None:
    gf = "gf" in name
    with torch.device("meta"):
        ours = timm.create_model(name)
        published = PublishedHorNet(widths(192), gf=gf, img_size=384 if gf else 224)
    assert {k: v.shape for k, v in published.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_our_weights_give_our_numbers_at_another_size() -> None:
    """Filters stored for 64 px at 96 x 64: resized as ours are."""
    torch.manual_seed(0)
    ours = timm.create_model("hornet_nano_gf", layer_scale_init=0.5).eval()
    published = PublishedHorNet((16, 32, 96, 192), depths=(1, 1, 4, 1), gf=True, img_size=64).eval()
    published.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(published(x), ours(x), rtol=1e-4, atol=1e-5)
