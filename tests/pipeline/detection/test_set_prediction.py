"""RT-DETRv2 and D-FINE: our backbone in them, their losses and what is found; learning is in test_detector.py too."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from pipeline.config.sections import ConfigError
from pipeline.detection.scenes import Objects, Scenes
from pipeline.detection.set_prediction import SetDetector
from tests.support.detection_nets import PX, detector, learn, precision, squares, total

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ["rt-detr-v2", "d-fine"]


def set_detector(head: str, **more: object) -> SetDetector:
    net = detector(head, **more)
    assert isinstance(net, SetDetector)
    return net


@pytest.mark.parametrize("head", HEADS)
def test_state_is_the_weights_and_each_is_there_once(head: str) -> None:
    """What is saved of a run are parameters by name: a buffer, or a weight by a second name, would be missing."""
    net = set_detector(head)
    names = [name for name, _ in net.named_parameters()]
    assert sorted(net.state_dict()) == sorted(names)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert [name for name in names if "backbone" in name] == [name for name in names if name.startswith("backbone.")]
    other = detector(head, seed=7)
    other.load_state_dict(dict(net.named_parameters()))
    images = squares().images
    with torch.no_grad():
        for one, two in zip(net.eval()(images), other.eval()(images), strict=True):
            assert torch.equal(one.boxes, two.boxes)
            assert torch.equal(one.scores, two.scores)


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_the_librarys(head: str) -> None:
    net, scenes = set_detector(head), squares()
    torch.manual_seed(1)
    losses = net(scenes)
    expected = ["loss_vfl", "loss_bbox", "loss_giou"] + (["loss_fgl", "loss_ddf"] if head == "d-fine" else [])
    assert sorted(losses) == sorted(expected)
    labels = [
        {
            "class_labels": each.labels,
            "boxes": torch.tensor(
                [
                    [(x0 + x1) / 2 / PX, (y0 + y1) / 2 / PX, (x1 - x0) / PX, (y1 - y0) / PX]
                    for x0, y0, x1, y1 in each.boxes
                ]
            ),
        }
        for each in scenes.objects
    ]
    torch.manual_seed(1)
    theirs = net._outputs(scenes.images, labels).loss
    torch.testing.assert_close(total(losses), theirs, rtol=1e-5, atol=1e-5)


class Known(torch.nn.Module):
    """A transformer whose queries say what it is told."""

    def __init__(self, logits: Tensor, boxes: Tensor) -> None:
        super().__init__()
        self.logits, self.pred_boxes = logits, boxes


def test_best_scores_first_of_boxes_that_lie_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    net = set_detector("rt-detr-v2", detections=4).eval()
    logits = torch.tensor([[[2.0, -1.0], [1.0, 3.0], [0.5, -9.0], [4.0, -9.0]]])
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0], [0.1, 0.1, 0.1, 0.1], [0.9, 0.5, 0.1, 0.1]]])
    monkeypatch.setattr(net, "_outputs", lambda images, labels: Known(logits, boxes))
    found = net(torch.zeros(1, 3, 64, 50))[0]  # padded to 64: the fourth box lies in the padding
    assert found.labels.tolist() == [1, 0, 0]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    expected = [[0.0, 0.0, 32.0, 64.0], [16.0, 0.0, 48.0, 32.0], [0.0, 0.0, 32.0, 64.0]]
    assert found.boxes.tolist() == expected


def test_learns_to_find_squares() -> None:
    net, scenes = detector("rt-detr-v2"), squares()
    learn(net, scenes, steps=70)
    assert precision(net, scenes)["box_ap50"] > 50


def test_an_image_with_objects_beside_one_without() -> None:
    scenes = squares()
    none = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None)
    for head in HEADS:
        losses = detector(head)(Scenes(scenes.images, (none, scenes.objects[1])))
        assert all(torch.isfinite(loss) for loss in losses.values())


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model.channels 36 is not a multiple of 8"):
        detector("d-fine", channels=36)
    with pytest.raises(ConfigError, match=r"model.queries 300 is more than the 84 positions .* data.resolution 64"):
        detector("d-fine", queries=300)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"model.head d-fine needs .* pip install 'hornet-pretraining\[heads\]'"):
        detector("d-fine")
