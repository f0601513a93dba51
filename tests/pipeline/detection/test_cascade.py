"""The cascade: what each stage is trained on, written out plainly; what it gives in the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from pipeline.detection.cascade import OVERLAPS, WEIGHTS, CascadeHeads, best, matched
from pipeline.detection.regions import RegionDetector
from tests.support.detection_nets import PX, detector, learn, precision, squares

pytestmark = pytest.mark.usefixtures("one_thread")


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def random_boxes(count: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    corner, side = 40 * torch.rand(count, 2, generator=draw), 4 + 18 * torch.rand(count, 2, generator=draw)
    return torch.cat([corner, corner + side], 1)


@pytest.mark.parametrize("least", OVERLAPS)
def test_matches_are_those_of_a_plain_search(least: float) -> None:
    true = random_boxes(5, seed=0)
    labels = torch.tensor([3, 1, 2, 2, 1])
    boxes = torch.cat([random_boxes(60, seed=1), true + 2 * torch.rand(5, 4), true])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    matches, found = matched([boxes, boxes], [{"boxes": true, "labels": labels}, none], least)
    for box, match, label in zip(boxes.tolist(), matches[0].tolist(), found[0].tolist(), strict=True):
        overlaps = [overlap(box, each) for each in true.tolist()]
        assert overlaps[match] == max(overlaps)
        assert label == (int(labels[match]) if max(overlaps) >= least else 0)
    assert (found[0] > 0).sum() >= 5
    assert not found[1].any()


def written_out(heads: CascadeHeads, maps: dict[str, Tensor], boxes: Tensor, true: Tensor, labels: Tensor) -> Tensor:
    """Losses of the classifier and of boxes by stage, (3, 2), of one image, box by box."""
    losses = []
    for stage, scale in enumerate((1.0, 2.0, 3.0)):
        logits, deltas = heads.boxes[stage](heads.cut(maps, [boxes], [(PX, PX)]))
        classes = boxes.new_zeros(())
        places = boxes.new_zeros(())
        moved = []
        for box, score, delta in zip(boxes, logits, deltas, strict=True):
            left, top, right, bottom = box
            width, height = right - left, bottom - top
            overlaps = box_iou(box[None], true)[0]
            match = int(overlaps.argmax())
            label = int(labels[match]) if overlaps[match] >= OVERLAPS[stage] else 0
            classes = classes - score.log_softmax(0)[label]
            if label:
                x0, y0, x1, y1 = true[match]
                wanted = torch.stack(
                    [
                        10 * scale * ((x0 + x1) / 2 - (left + right) / 2) / width,
                        10 * scale * ((y0 + y1) / 2 - (top + bottom) / 2) / height,
                        5 * scale * ((x1 - x0) / width).log(),
                        5 * scale * ((y1 - y0) / height).log(),
                    ]
                )
                off = (delta - wanted).abs()
                places = places + torch.where(off < 1, off.square() / 2, off - 0.5).sum()
            dx, dy, dw, dh = (delta / scale / torch.tensor([10, 10, 5, 5])).detach()
            x, y = (left + right) / 2 + dx * width, (top + bottom) / 2 + dy * height
            w, h = width * dw.exp(), height * dh.exp()
            moved.append(torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2]).clamp(0, PX))
        losses.append(torch.stack([classes, places]) * WEIGHTS[stage] / len(boxes))
        boxes = torch.stack(moved)
    return torch.stack(losses)


def test_losses_of_all_stages_are_those_written_out() -> None:
    net = detector("cascade-mask-rcnn", masks=False)
    assert isinstance(net, RegionDetector)
    heads = net.heads
    assert isinstance(heads, CascadeHeads)
    for stage in heads.boxes:  # so that boxes move
        torch.nn.init.normal_(stage[1].boxes.weight, std=0.1)
    torch.manual_seed(3)
    maps = {str(level): torch.randn(1, 32, PX // stride, PX // stride) for level, stride in enumerate((4, 8, 16, 32))}
    true, labels = random_boxes(4, seed=0), torch.tensor([1, 2, 2, 1])
    boxes = torch.cat([random_boxes(20, seed=1), true + 1, true + 3])
    target = {"boxes": true, "labels": labels}
    losses = heads._losses(maps, [boxes], [(PX, PX)], [target])
    found = torch.stack([losses[f"loss_{kind}_{n}"] for n in (1, 2, 3) for kind in ("classifier", "box_reg")])
    expected = written_out(heads, maps, boxes, true, labels)
    assert (expected > 0).all()
    torch.testing.assert_close(found.view(3, 2), expected, rtol=1e-4, atol=1e-6)


def test_at_most_512_are_sampled_a_quarter_of_them_positive() -> None:
    heads = detector("cascade-mask-rcnn").heads
    assert isinstance(heads, CascadeHeads)
    true = random_boxes(3, seed=0)
    boxes = torch.cat([random_boxes(900, seed=1), true.repeat(100, 1)])
    target = {"boxes": true, "labels": torch.tensor([1, 1, 2])}
    sampled = heads._sampled([boxes], [target])
    _, labels = matched(sampled, [target], OVERLAPS[0])
    assert len(sampled[0]) == 512
    assert int((labels[0] > 0).sum()) == 128
    few = heads._sampled([true[:1] + 30], [target])[0]
    assert few.tolist() == [*(true[:1] + 30).tolist(), *true.tolist()]  # the true ones are among them


def test_best_of_each_class() -> None:
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 20.0, 30.0], [30.0, 0.0, 40.0, 9.0]]
    )
    scores = torch.tensor([[0.9, 0.04], [0.8, 0.7], [0.9, 0.9], [0.3, 0.6]])
    found = best(boxes, scores, most=3)
    assert found["labels"].tolist() == [1, 2, 2]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert found["boxes"].tolist() == boxes[[0, 1, 3]].tolist()
    assert not len(best(boxes[:0], scores[:0], most=3)["boxes"])


def test_learns_to_find_squares() -> None:
    net, scenes = detector("cascade-mask-rcnn"), squares()
    learn(net, scenes, steps=50)
    found = precision(net, scenes)
    assert found["box_ap50"] > 80
    assert found["mask_ap50"] > 80
