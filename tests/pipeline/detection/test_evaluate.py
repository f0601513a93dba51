"""From a net's boxes in a resized image to those of the image as stored, and what that scores: by nets that know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.detect import DetectConfig, DetectionEvaluate
from pipeline.config.load import load
from pipeline.data.shards import DataError
from pipeline.dense.data import Annotated, DenseReader
from pipeline.detection.data import objects_of, validation_images
from pipeline.detection.evaluate import evaluated, found_in, summarised
from pipeline.detection.figures import shown, strip_of
from pipeline.detection.opened import open_instances
from pipeline.detection.scenes import Found
from pipeline.ranks.collectives import Ranks
from tests.support.dense_sets import build_instances

CPU = torch.device("cpu")


class Knows(nn.Module):
    """Finds each true object of the image that comes next, at its place in what it gets; mirrored every second time."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip, self.calls = flip, 0
        self.next: Annotated | None = None
        self.sizes: list[tuple[int, int]] = []

    def forward(self, images: Tensor) -> list[Found]:
        assert self.next is not None
        height, width = self.next.image.shape[1:]
        objects = objects_of(self.next.annotations, height, width, masks=False)
        high, wide = images.shape[-2:]
        self.sizes.append((high, wide))
        boxes = objects.boxes * torch.tensor([wide / width, high / height] * 2)
        masks = torch.ones(len(boxes), 28, 28)
        if self.flip and self.calls % 2:
            boxes = torch.stack([wide - boxes[:, 2], boxes[:, 1], wide - boxes[:, 0], boxes[:, 3]], 1)
        self.calls += 1
        return [Found(boxes, torch.linspace(0.9, 0.8, len(boxes)), objects.labels, masks)]


def settings(flip: bool = False) -> DetectionEvaluate:
    tree = {"every_epochs": 1, "short_side_px": 96, "long_side_max_px": 160, "flip": flip}
    return DetectionEvaluate.model_validate(tree)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Annotated]:
    folder: Path = build_instances(tmp_path_factory.mktemp("instances"))
    config = load("configs/demo_detect.yaml", [f"data.path={folder}"], DetectConfig)
    return list(validation_images(config, DenseReader(str(folder), open_instances(config), "val"), Ranks()))


@pytest.mark.parametrize("flip", [False, True])
def test_a_net_that_knows_scores_all(images: list[Annotated], flip: bool) -> None:
    net = Knows(flip)

    def one_by_one() -> object:
        for each in images:
            net.next = each
            yield each

    found: dict[int, Found] = {}
    evaluator, count = evaluated(
        net, one_by_one(), ["red", "blue"], settings(flip), 100, CPU, False, lambda a, f: found.update({a.sample: f})
    )
    assert count == len(images) == 7
    metrics = summarised(evaluator, count)
    assert metrics["box_ap"] == pytest.approx(100)
    assert metrics["mask_ap"] > 95  # a pasted mask of 28 x 28 ends up to a pixel beside its box
    assert metrics["val_samples"] == 7
    assert [row["annotations"] for row in evaluator.per_class()] == [6, 6]
    for each in images:
        truth = objects_of(each.annotations, *each.image.shape[1:], masks=False)
        assert len(found[each.sample].boxes) == len(truth.boxes)  # what both say is said once
        assert torch.allclose(found[each.sample].boxes, truth.boxes, atol=1e-3)
    sides = [(min(size), max(size)) for size in net.sizes]
    assert all(short == 96 or long == 160 for short, long in sides)
    assert all(short <= 96 and long <= 160 for short, long in sides)


def test_boxes_end_with_the_image(images: list[Annotated]) -> None:
    """And so do those of the mirrored image, of which the best are kept."""

    class Everywhere(nn.Module):
        def forward(self, images: Tensor) -> list[Found]:
            high, wide = images.shape[-2:]
            boxes = torch.tensor([[-9.0, -9, wide + 9, high + 9], [0, 0, 5, 5]])
            return [Found(boxes, torch.tensor([0.9, 0.5]), torch.tensor([0, 1]), None)]

    image = images[0].image
    found = found_in(Everywhere().eval(), image, settings(flip=True), 2, False)
    assert found.boxes[0].tolist() == pytest.approx([0, 0, image.shape[2], image.shape[1]])
    assert len(found.boxes) == 2  # of three that say different things
    assert found.scores.tolist() == pytest.approx([0.9, 0.5])


def test_no_objects_are_no_score(images: list[Annotated]) -> None:
    net = Knows(flip=False)
    net.next = next(each for each in images if not each.annotations)
    evaluator, count = evaluated(net, [net.next], ["red", "blue"], settings(), 100, CPU, False)
    with pytest.raises(DataError, match="no objects to evaluate on"):
        summarised(evaluator, count)


def test_pictures_show_what_counts_however_uncertain() -> None:
    """Of each class at least as many as are true, and what is certain in any case; by class, as the score goes."""
    told = [{"bbox": [10, 10, 20, 20], "label": 1, "iscrowd": 0, "segmentation": None}]
    image = Annotated(torch.zeros(3, 60, 80, dtype=torch.uint8), 1, told, 0)
    boxes = torch.tensor([[40.0, 5.0, 70.0, 50.0]] * 2 + [[10.0, 10.0, 30.0, 30.0]] * 2)
    found = Found(boxes, torch.tensor([0.6, 0.2, 0.1, 0.05]), torch.tensor([0, 0, 1, 1]), None)
    drawn = shown(image, found, 90.0, "a: b")
    assert (drawn.true.labels, drawn.found.labels) == ([1], [0, 1])
    assert drawn.found.scores == pytest.approx([0.6, 0.1])
    assert strip_of(drawn, ["cat", "dog"]).shape == (240, 644, 3)
    nothing = shown(image, Found(boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64), None), 0.0, "a: b")
    assert nothing.found.labels == []
    assert strip_of(nothing, ["cat", "dog"]).shape == (240, 644, 3)
