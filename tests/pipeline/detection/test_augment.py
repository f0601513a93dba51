"""An image, its boxes and masks stay together, whatever is drawn; what is drawn hangs on the key alone."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode

from pipeline.config.detect import DetectionAugment
from pipeline.data.keyed import uniform_one, view_keys
from pipeline.detection.augment import _nearest, training_view
from pipeline.detection.scenes import Objects

SIDE = 96
PAD = torch.tensor([124, 116, 104], dtype=torch.uint8)


def settings(**more: float) -> DetectionAugment:
    wanted = {"scale_min": 0.3, "scale_max": 2.5, "box_side_min_px": 1.0, "horizontal_flip": 0.5, "photometric": 0.0}
    return DetectionAugment.model_validate({**wanted, **more})


def scene(height: int = 90, width: int = 130) -> tuple[torch.Tensor, Objects]:
    """Ellipses of one colour each on black, with their masks, and boxes that fit them."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    centres = [(20, 30, 15, 22), (45, 100, 30, 12), (70, 50, 12, 30), (20, 110, 6, 8), (80, 8, 9, 7)]
    masks = torch.stack([((y - cy) / h) ** 2 + ((x - cx) / w) ** 2 < 1 for cy, cx, h, w in centres])
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for number, mask in enumerate(masks):
        image[:, mask] = 40 * (number + 1)
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return image, Objects(boxes, torch.arange(len(centres)), masks.to(torch.uint8))


def fitted(masks: torch.Tensor) -> torch.Tensor:
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return boxes


def test_boxes_are_those_of_their_masks() -> None:
    """Within a pixel, for every object that the view shows; the same objects and boxes are there without masks, but for
    those that a crop has cut.
    """
    image, objects = scene()
    shown, mirrored, cut = 0, 0, 0
    for key in view_keys(0, torch.arange(200).numpy()).tolist():
        view, left = training_view(image, objects, settings(), SIDE, key)
        assert (view.shape, view.dtype) == ((3, SIDE, SIDE), torch.uint8)
        assert left.masks is not None
        assert (left.masks.shape, left.masks.dtype) == ((len(left.labels), SIDE, SIDE), torch.uint8)
        assert ((left.boxes >= 0) & (left.boxes <= SIDE)).all()
        assert (left.boxes[:, 2:] - left.boxes[:, :2] >= 1).all()
        if len(left.labels):
            assert (fitted(left.masks) - left.boxes).abs().max() <= 1
        for label, mask in zip(left.labels.tolist(), left.masks.bool(), strict=True):
            if mask.sum() > 80:  # of a small one, most pixels are of its edge, and have black in them
                assert view[0][mask].float().median() == 40 * (label + 1)
        _, plain = training_view(image, objects._replace(masks=None), settings(), SIDE, key)
        assert set(left.labels.tolist()) <= set(plain.labels.tolist())
        for label, box in zip(left.labels, left.boxes, strict=True):
            other = plain.boxes[plain.labels == label][0]
            assert (other[:2] <= box[:2] + 1e-4).all()
            assert (other[2:] >= box[2:] - 1e-4).all()
            cut += not torch.allclose(other, box)
        shown += len(left.labels)
        mirrored += uniform_one(key, 48) < 0.5
    assert shown > 400
    assert cut > 10
    assert 80 < mirrored < 120


def test_place_and_size_by_hand() -> None:
    """Twice as large as what fits, mirrored, then not cut: x of the box is counted from the other side."""
    image, objects = scene(48, 96)
    whole = settings(scale_min=0.5, scale_max=0.5, horizontal_flip=1.0)
    view, left = training_view(image, objects, whole, SIDE, 3)
    wanted = objects.boxes[:, [2, 1, 0, 3]] * 0.5
    wanted[:, [0, 2]] = 48 - wanted[:, [0, 2]]
    assert torch.allclose(left.boxes, wanted[left.labels])
    assert (view[:, 24:] == PAD[:, None, None]).all()
    assert (view[:, :, 48:] == PAD[:, None, None]).all()


def test_masks_are_resized_as_torchvision_does() -> None:
    _, objects = scene()
    assert objects.masks is not None
    for size in ((45, 65), (31, 77), (200, 210)):
        rows, columns = _nearest(90, size[0]), _nearest(130, size[1])
        wanted = F.resize(objects.masks, list(size), InterpolationMode.NEAREST_EXACT)
        assert torch.equal(objects.masks[:, rows[:, None], columns], wanted)


def test_what_is_hardly_left_is_left_out() -> None:
    image, objects = scene()
    keys = view_keys(1, torch.arange(60).numpy()).tolist()
    views = {
        least: [training_view(image, objects, settings(box_side_min_px=least), SIDE, key)[1] for key in keys]
        for least in (0.0, 20.0)
    }
    sides = torch.cat([each.boxes[:, 2:] - each.boxes[:, :2] for each in views[20.0]])
    assert sides.min() >= 20
    assert sum(len(each.labels) for each in views[0.0]) > len(sides)
    assert min(len(each.labels) for each in views[0.0]) >= 0
    nothing = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 90, 130, dtype=torch.uint8))
    _, left = training_view(image, nothing, settings(), SIDE, 7)
    assert left.masks is not None
    assert (left.boxes.shape, left.masks.shape) == ((0, 4), (0, SIDE, SIDE))


def test_the_key_alone_decides() -> None:
    image, objects = scene()
    drawn = []
    for key in (1, 2, 1):
        torch.manual_seed(len(drawn))
        drawn.append(training_view(image, objects, settings(photometric=0.5), SIDE, key))
    assert torch.equal(drawn[0][0], drawn[2][0])
    assert torch.equal(drawn[0][1].boxes, drawn[2][1].boxes)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_scales_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match=r"augment.scale_min 2 is above augment.scale_max 1"):
        settings(scale_min=2, scale_max=1)
