"""Detectors of every head: losses, gradients and what is found; the parts of an R-CNN that are our own."""

from __future__ import annotations

import pytest
import timm.optim
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from pipeline.detection.base import Detector
from pipeline.detection.heads import LEVELS_CUT, STRIDES, Anchors, Cut
from pipeline.detection.scenes import Scenes
from pipeline.models.hornet import HorNet
from tests.support.detection_nets import CLASSES, PX, detector, learn, nothing, precision, squares, total

pytestmark = pytest.mark.usefixtures("one_thread")

R_CNNS = ["mask-rcnn", "cascade-mask-rcnn"]
HEADS = [*R_CNNS, "rt-detr-v2", "d-fine"]


def step(net: Detector, scenes: Scenes, seed: int = 1) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    net.zero_grad()
    losses = net(scenes)
    total(losses).backward()
    return {name: float(loss.detach()) for name, loss in losses.items()}, {
        name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("head", HEADS)
def test_each_parameter_learns_and_the_same_from_the_same_seed(head: str) -> None:
    net = detector(head)
    losses, gradients = step(net, squares())
    assert all(0 <= loss < 50 for loss in losses.values()), losses
    assert set(gradients) == {name for name, _ in net.named_parameters()}
    again, same = step(net, squares())
    assert again == losses
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())
    other, _ = step(net, squares(), seed=2)
    assert other != losses
    idle = set(gradients)
    for seed in range(3):  # what begins as zeros hides what is before it
        _, gradients = step(net, squares(), seed)
        idle -= {name for name, gradient in gradients.items() if gradient.any()}
        with torch.no_grad():
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter -= 1e-3 * parameter.grad
    assert not idle, idle


@pytest.mark.parametrize("head", HEADS)
def test_without_objects_there_are_finite_losses_and_a_gradient_for_each_parameter(head: str) -> None:
    """In the same order as with objects: by it DeepSpeed adds those of all ranks, of which one may have none."""
    net, order = detector(head), []
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    step(net, squares())
    with_objects = order.copy()
    order.clear()
    losses, gradients = step(net, nothing())
    assert order == with_objects
    assert all(0 <= loss < 200 for loss in losses.values()), losses
    assert set(gradients) == {name for name, _ in net.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("head", HEADS)
def test_under_bf16_losses_are_float32_and_near(head: str) -> None:
    net = detector(head)
    expected, _ = step(net, squares())
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        losses = net(squares())
    assert all(each.dtype == torch.float32 for each in losses.values())
    assert float(total(losses).detach()) == pytest.approx(sum(expected.values()), rel=0.1)
    total(losses).backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in net.parameters())


@pytest.mark.parametrize("head", R_CNNS)
def test_r_cnns_take_weights_in_bf16(head: str) -> None:
    net = detector(head)
    expected, _ = step(net, squares())
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = step(net.bfloat16(), squares())
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.1)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("head", HEADS)
def test_trains_after_an_evaluation_in_inference_mode(head: str) -> None:
    net, scenes = detector(head), squares()
    with torch.inference_mode():
        net.eval()(scenes.images)
    step(net.train(), scenes)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_what_is_found_lies_in_the_image_best_first(head: str) -> None:
    height, width = 50, 77
    found = detector(head).eval()(torch.randn(2, 3, height, width))
    assert len(found) == 2
    for each in found:
        assert 0 < len(each.boxes) <= 20
        assert each.boxes.min() >= 0
        assert each.boxes[:, 2].max() <= width
        assert each.boxes[:, 3].max() <= height
        assert (each.boxes[:, 2:] > each.boxes[:, :2]).all()
        assert (each.scores[:-1] >= each.scores[1:]).all()
        assert 0 < each.scores.min() <= each.scores.max() < 1
        assert set(each.labels.tolist()) <= set(range(len(CLASSES)))
        if head.endswith("rcnn"):
            assert each.masks is not None
            assert each.masks.shape == (len(each.boxes), 28, 28)
            assert 0 <= each.masks.min() <= each.masks.max() <= 1
        else:
            assert each.masks is None
            assert len(each.boxes) > 10


@pytest.mark.parametrize("head", HEADS)
def test_layers_and_flops(head: str) -> None:
    net = detector(head)
    assert isinstance(net.backbone, HorNet)
    groups = timm.optim.param_groups_layer_decay(net, layer_decay=0.5)
    assert min(group["lr_scale"] for group in groups) == 0.5**6  # timm counts the layers that are there
    of_heads = {id(p) for name, p in net.named_parameters() if not name.startswith("backbone.")}
    full = {id(p) for group in groups if group["lr_scale"] == 1 for p in group["params"]}
    assert of_heads <= full
    image = torch.empty(1, 3, PX, PX, device="meta")
    with torch.device("meta"):
        of_none = detector(head)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        of_none.dry_run(image)
    with FlopCounterMode(display=False) as backbone, torch.no_grad():
        of_none.maps(image)
    assert of_none.training
    assert whole.get_total_flops() > 1.2 * backbone.get_total_flops() > 0


def test_masks_that_are_wanted_and_not_there() -> None:
    scenes = squares()
    without = Scenes(scenes.images, tuple(each._replace(masks=None) for each in scenes.objects))
    with pytest.raises(ValueError, match=r"model.masks is true, and an image came without masks"):
        detector("mask-rcnn")(without)
    assert "loss_mask" not in detector("mask-rcnn", masks=False)(without)


def test_mask_rcnn_learns_to_find_squares() -> None:
    net, scenes = detector("mask-rcnn", pyramid="horfpn"), squares()
    learn(net, scenes, steps=80)
    found = precision(net, scenes)
    assert found["box_ap50"] > 80
    assert found["mask_ap50"] > 80


def test_anchors_are_torchvisions_at_the_levels_strides() -> None:
    def maps(px: int) -> list[torch.Tensor]:
        return [torch.zeros(1, 1, -(-px // stride), -(-px // stride)) for stride in STRIDES]

    theirs = AnchorGenerator(tuple((8.0 * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
    images = ImageList(torch.zeros(2, 3, 128, 128), [(128, 128)] * 2)
    for ours, expected in zip(Anchors(8)(images, maps(128)), theirs(images, maps(128)), strict=True):
        torch.testing.assert_close(ours, expected)
    images = ImageList(torch.zeros(1, 3, 160, 160), [(160, 160)])
    last = Anchors(8)(images, [each.bfloat16() for each in maps(160)])[0][-3:]  # torchvision's stride there is 53
    assert last.dtype == torch.float32
    torch.testing.assert_close((last[:, :2] + last[:, 2:]) / 2, torch.full((3, 2), 128.0))


def test_cuts_are_of_the_place_and_level_of_their_box() -> None:
    """Maps that hold the x of each position, plus a thousand for each level."""
    cut = Cut(7, 8)
    maps = {
        str(level): ((torch.arange(64 / stride) + 0.5) * stride + 1000 * level).expand(1, 1, 64 // stride, -1)
        for level, stride in enumerate(STRIDES[:LEVELS_CUT])
    }
    boxes = torch.tensor([[10.0, 20.0, 22.0, 30.0], [12.0, 12.0, 44.0, 44.0], [4.0, 4.0, 60.0, 60.0]])
    cuts = cut(maps, [boxes], [(64, 64)])
    assert cuts.shape == (3, 1, 7, 7)
    means = cuts.mean((1, 2, 3)).tolist()
    assert means == pytest.approx([16 + 0, 28 + 1000, 32 + 2000], abs=0.5)
