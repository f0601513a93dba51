"""Average precision against pycocotools, on made-up sets and on awkward ones."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as reference_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.detection.average_precision import RESULTS, Evaluator
from pipeline.detection.scenes import Found

NAMES = ["cat", "dog", "bird", "fish"]
Truth = dict[str, Any]
Sample = tuple[int, tuple[int, int], list[Truth], Found]


def true_object(
    number: int, label: int, box: list[float], size: tuple[int, int], crowd: bool = False
) -> dict[str, Any]:
    """An ellipse that fills its box (x, y, width, height)."""
    x, y, width, height = box
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    inside = ((columns - x - width / 2) / (width / 2)) ** 2 + ((rows - y - height / 2) / (height / 2)) ** 2 <= 1
    encoded = reference_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    segmentation = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    area = float(reference_mask.area(encoded))
    return {
        "id": number,
        "label": label,
        "bbox": box,
        "area": area,
        "iscrowd": int(crowd),
        "segmentation": segmentation,
    }


def found_at(boxes: list[list[float]], scores: list[float], labels: list[int], masks: bool = True) -> Found:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    mask = (1.3 - rows.square() - columns.square()).clamp(0, 1)
    return Found(
        torch.tensor([boxes[i] for i in order]).reshape(-1, 4),
        torch.tensor([scores[i] for i in order]),
        torch.tensor([labels[i] for i in order], dtype=torch.int64),
        mask.repeat(len(order), 1, 1) if masks else None,
    )


def made_up(images: int = 12, seed: int = 0, masks: bool = True) -> list[Sample]:
    """Objects of all sizes, crowds among them; found are some of them, shifted, some twice, some of another class, and
    some that are not there; scores of one digit tie. The last class is found and never true.
    """
    draw = np.random.default_rng(seed)
    samples: list[Sample] = []
    for image_id in range(5, 5 + images):
        size = tuple(int(side) for side in draw.integers(150, 260, 2))
        truth, boxes, scores, labels = [], [], [], []
        for _ in range(int(draw.integers(0, 7))):
            width, height = draw.uniform(6, 140, 2)
            x, y = draw.uniform(0, size[1] - width), draw.uniform(0, size[0] - height)
            box, label = [x, y, width, height], int(draw.integers(0, 3))
            truth.append(true_object(100 * image_id + len(truth), label, box, size, crowd=draw.random() < 0.15))
            for _ in range(int(draw.integers(0, 3))):
                corners = np.array([x, y, x + width, y + height]) + draw.normal(0, 0.06, 4) * np.array(
                    [width, height] * 2
                )
                boxes.append([float(v) for v in np.clip(corners, 0, [size[1], size[0]] * 2)])
                labels.append(label if draw.random() < 0.8 else int(draw.integers(0, 4)))
        for _ in range(int(draw.integers(0, 4))):
            x, y = draw.uniform(0, 100, 2)
            boxes.append([x, y, x + float(draw.uniform(5, 50)), y + float(draw.uniform(5, 50))])
            labels.append(int(draw.integers(0, 4)))
        scores = [round(float(each), 1) for each in draw.random(len(boxes))]
        samples.append((image_id, size, truth, found_at(boxes, scores, labels, masks)))
    return samples


def evaluated(samples: list[Sample]) -> Evaluator:
    evaluator = Evaluator(NAMES)
    for sample in samples:
        evaluator.add(*sample)
    return evaluator


def by_pycocotools(evaluator: Evaluator, samples: list[Sample], kind: str) -> dict[str, float]:
    """Percent, by our names. Masks as the evaluator pasted them: what they are is another test."""
    pasted = {image.image_id: image.masks for image in evaluator.parts()}
    true, found = [], []
    for image_id, _, truth, detections in samples:
        true += [{**each, "image_id": image_id, "category_id": each["label"] + 1} for each in truth]
        for place in range(len(detections.scores)):
            left, top, right, bottom = detections.boxes[place].tolist()
            one: dict[str, Any] = {"image_id": image_id, "category_id": int(detections.labels[place]) + 1}
            one["score"] = float(detections.scores[place])
            if kind == "box":
                one["bbox"] = [left, top, right - left, bottom - top]
            else:
                one["segmentation"] = pasted[image_id][place]
            found.append(one)
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": image_id, "height": size[0], "width": size[1]} for image_id, size, _, _ in samples],
        "categories": [{"id": label, "name": name} for label, name in enumerate(NAMES, 1)],
        "annotations": [{**each, "id": number} for number, each in enumerate(true, 1)],
    }
    coco.createIndex()
    if found:
        results = coco.loadRes(found)
    else:  # loadRes looks at the first detection
        results = COCO()
        results.dataset = {**coco.dataset, "annotations": []}
        results.createIndex()
    reference = COCOeval(coco, results, "bbox" if kind == "box" else "segm")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    values = zip(RESULTS, reference.stats[:6], strict=True)
    return {f"{kind}_{name}": 100 * float(value) for name, value in values if value > -1}


def of_kind(results: dict[str, float], kind: str) -> dict[str, float]:
    return {name: value for name, value in results.items() if name.startswith(kind)}


IMAGE = (120, 160)
BOX = [20.0, 30.0, 50.0, 40.0]
EVERYWHERE = [0.0, 0.0, 160.0, 120.0]
FOUND = [20.0, 30.0, 70.0, 70.0]
NOTHING = found_at([], [], [])
AWKWARD: dict[str, list[Sample]] = {
    "no detections": [(1, IMAGE, [true_object(1, 0, BOX, IMAGE)], NOTHING)],
    "one object found twice": [
        (1, IMAGE, [true_object(1, 0, BOX, IMAGE)], found_at([FOUND, FOUND], [0.9, 0.8], [0, 0])),
    ],
    "ties in score, the worse box first": [
        (
            *(1, IMAGE, [true_object(1, 0, BOX, IMAGE)]),
            found_at([[24.0, 30.0, 80.0, 70.0], FOUND, [90.0, 10.0, 99.0, 30.0]], [0.5, 0.5, 0.5], [0, 0, 0]),
        ),
        (2, IMAGE, [true_object(2, 0, BOX, IMAGE)], found_at([[0.0, 0.0, 9.0, 9.0], FOUND], [0.5, 0.5], [0, 0])),
    ],
    "crowds only": [(1, IMAGE, [true_object(1, 0, BOX, IMAGE, crowd=True)], found_at([FOUND], [0.9], [0]))],
    "a crowd beside an object": [
        (
            *(
                1,
                IMAGE,
                [true_object(1, 0, BOX, IMAGE), true_object(2, 0, EVERYWHERE, IMAGE, crowd=True)],
            ),
            found_at([[90.0, 60.0, 99.0, 90.0], [80.0, 50.0, 99.0, 90.0], FOUND], [0.9, 0.8, 0.7], [0, 0, 0]),
        )
    ],
    "an image without objects": [
        (1, IMAGE, [], found_at([FOUND], [0.95], [0])),
        (2, IMAGE, [true_object(1, 0, BOX, IMAGE)], found_at([FOUND], [0.9], [0])),
        (3, IMAGE, [], NOTHING),
    ],
    "a class that is never true": [
        (1, IMAGE, [true_object(1, 0, BOX, IMAGE)], found_at([FOUND, FOUND], [0.95, 0.9], [3, 0])),
    ],
    "an annotation whose id is 0": [(1, IMAGE, [true_object(0, 0, BOX, IMAGE)], found_at([FOUND], [0.9], [0]))],
}


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools(kind: str, seed: int) -> None:
    samples = made_up(seed=seed)
    evaluator = evaluated(samples)
    found = of_kind(evaluator.results(), kind)
    assert len(found) == len(RESULTS)
    assert 10 < found[f"{kind}_ap"] < 90
    assert found == pytest.approx(by_pycocotools(evaluator, samples, kind), abs=1e-6)


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("name", AWKWARD)
def test_equals_pycocotools_on_awkward_sets(name: str, kind: str) -> None:
    samples = AWKWARD[name]
    evaluator = evaluated(samples)
    found = of_kind(evaluator.results(), kind)
    assert found == pytest.approx(by_pycocotools(evaluator, samples, kind), abs=1e-6)
    assert bool(found) == (name != "crowds only")


def test_figures_that_are_known() -> None:
    assert evaluated(AWKWARD["no detections"]).results()["box_ap"] == 0
    assert evaluated(AWKWARD["one object found twice"]).results()["box_ap"] == pytest.approx(100)
    assert evaluated(AWKWARD["an annotation whose id is 0"]).results()["box_ap"] == pytest.approx(100)
    assert evaluated(AWKWARD["an image without objects"]).results()["box_ap"] == pytest.approx(50)
    assert evaluated(AWKWARD["crowds only"]).results() == {}


def test_parts_of_other_ranks_in_any_order_are_the_whole() -> None:
    samples = made_up()
    whole, parts = evaluated(samples), [evaluated(samples[rank::2]).parts() for rank in range(2)]
    for order in ((0, 1), (1, 0)):
        merged = Evaluator(NAMES)
        merged.merge([])
        for rank in order:
            merged.merge(pickle.loads(pickle.dumps(parts[rank])))
        assert merged.results() == whole.results()
        assert merged.per_class() == whole.per_class()
    with pytest.raises(ValueError, match="image 5 was evaluated twice"):
        whole.merge(parts[0])


def test_classes_and_curves_have_the_mean_of_the_whole() -> None:
    evaluator = evaluated(made_up())
    results, classes, curves = evaluator.results(), evaluator.per_class(), evaluator.curves()
    assert [each["class"] for each in classes] == NAMES
    assert classes[3] == {"class": "fish", "annotations": 0, "box_ap": None, "mask_ap": None}
    crowds = sum(each["iscrowd"] for image in evaluator.parts() for each in image.truth)
    objects = sum(len(image.truth) for image in evaluator.parts())
    assert crowds
    assert sum(each["annotations"] for each in classes) == objects - crowds
    for kind in ("box", "mask"):
        known = [each[f"{kind}_ap"] for each in classes if each[f"{kind}_ap"] is not None]
        assert np.mean(known) == pytest.approx(results[f"{kind}_ap"])
        for name in ("ap", "ap50", "ap75"):
            curve = curves[f"{kind}_{name}"]
            assert curve.shape == curves["recall"].shape
            assert curve.mean() * 100 == pytest.approx(results[f"{kind}_{name}"])


def test_masks_are_pasted_into_their_boxes() -> None:
    mask = torch.zeros(1, 28, 28)
    mask[:, :14] = 1  # the upper half
    found = Found(torch.tensor([[40.0, 20.0, 96.0, 76.0]]), torch.tensor([0.9]), torch.tensor([0]), mask)
    evaluator = Evaluator(NAMES)
    evaluator.add(1, IMAGE, [], found)
    pasted = reference_mask.decode(evaluator.parts()[0].masks[0])
    expected = np.zeros(IMAGE, bool)
    expected[20:48, 40:96] = True
    assert pasted.shape == IMAGE
    assert (pasted != expected).sum() < 0.08 * expected.sum()  # a pixel at the edges


def test_masks_count_where_there_are_some() -> None:
    without = made_up(masks=False)
    assert not of_kind(evaluated(without).results(), "mask")
    boxes_alone = [(i, size, [{**each, "segmentation": None} for each in truth], f) for i, size, truth, f in made_up()]
    assert evaluated(boxes_alone).results() == pytest.approx(evaluated(without).results())
    one = [true_object(1, 0, BOX, IMAGE), {**true_object(2, 0, [90.0, 60.0, 30.0, 30.0], IMAGE), "segmentation": None}]
    found = found_at([FOUND, [90.0, 60.0, 120.0, 90.0]], [0.8, 0.9], [0, 0])
    results = evaluated([(1, IMAGE, one, found)]).results()
    assert results["mask_ap50"] == pytest.approx(100)  # what lies on the object without a mask counts neither way


def test_what_cannot_be_evaluated_is_said() -> None:
    with pytest.raises(ValueError, match="no image was evaluated"):
        Evaluator(NAMES).results()
    with pytest.raises(ValueError, match="image 7: boxes or scores that were found are not finite"):
        Evaluator(NAMES).add(7, IMAGE, [], found_at([[0.0, 0.0, float("nan"), 9.0]], [0.5], [0]))
