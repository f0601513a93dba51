"""Intersection over union, pooled over a set: against torchmetrics, on awkward sets, by windows, on several ranks."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from data_prep.dense_set import IGNORED
from pipeline.config.dense import DenseEvaluate
from pipeline.dense.data import Labelled
from pipeline.dense.evaluate import class_ious, confusion, probabilities, summarised

CLASSES, CPU = 5, torch.device("cpu")


def settings(**more: object) -> DenseEvaluate:
    wanted = {"every_epochs": 1, "mode": "whole", "short_side_px": 64, "long_side_max_px": 256, "stride_px": 40}
    return DenseEvaluate.model_validate({**wanted, "scales": [1.0], "flip": False, **more})


class ByBrightness(nn.Module):
    """A class for each range of brightness: a net without weights that sees every pixel by itself, at stride 4."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2] % 32 == images.shape[3] % 32 == 0
        grey = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
        centres = torch.linspace(-2, 2, CLASSES).view(1, CLASSES, 1, 1)
        return -10 * (grey - centres) ** 2


def images(count: int = 5, seed: int = 0) -> list[Labelled]:
    """Of odd sizes, with masks that have little to do with them, and ignored pixels."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for sample in range(count):
        height, width = (int(torch.randint(40, 120, (), generator=draw)) for _ in range(2))
        image = torch.randint(0, 256, (3, height // 8, width // 8), dtype=torch.uint8, generator=draw)
        image = nn.functional.interpolate(image[None].float(), (height, width))[0].to(torch.uint8)
        mask = torch.randint(0, CLASSES - 1, (height, width), dtype=torch.uint8, generator=draw)
        mask[: height // 4] = IGNORED
        found.append(Labelled(image, mask, sample))
    return found


def predicted(labelled: Labelled, asked: DenseEvaluate) -> Tensor:
    size = (labelled.mask.shape[0], labelled.mask.shape[1])
    return probabilities(ByBrightness(), labelled.image, asked, 64, size, False).argmax(0)


def test_as_torchmetrics_pools_it() -> None:
    metric = MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED, average="none")
    for each in images():
        metric.update(predicted(each, settings()), each.mask.long())
    pixels, loss, count = confusion(ByBrightness(), images(), settings(), 64, CLASSES, CPU, False)
    ious = class_ious(pixels)
    # The last class is in no mask, but found: it counts, with 0.
    assert ious[CLASSES - 1] == 0
    torch.testing.assert_close(ious, 100 * metric.compute().double(), rtol=1e-6, atol=1e-6)
    told = summarised(pixels, loss, count)
    assert told["miou"] == pytest.approx(float(ious.mean()))
    assert told["val_samples"] == count == 5
    assert int(pixels.sum()) == sum(int((each.mask != IGNORED).sum()) for each in images())


def test_a_class_that_is_nowhere_counts_in_no_mean() -> None:
    pixels = torch.zeros(3, 3, dtype=torch.int64)
    pixels[0, 0], pixels[0, 1], pixels[1, 1] = 6, 2, 2
    assert class_ious(pixels)[:2].tolist() == pytest.approx([100 * 6 / 8, 100 * 2 / 4])
    assert math.isnan(class_ious(pixels)[2])
    told = summarised(pixels, 0.5, 2)
    assert told["miou"] == pytest.approx(62.5)
    assert told["macc"] == pytest.approx((75 + 100) / 2)
    assert told["pixel_accuracy"] == pytest.approx(80)
    assert told["classes_absent"] == 1


def test_ranks_together_are_one() -> None:
    whole, loss, count = confusion(ByBrightness(), images(), settings(), 64, CLASSES, CPU, False)
    parts: list[Tensor] = []

    def noted(sums: Tensor) -> Tensor:
        parts.append(sums)
        return sums

    for rank in range(2):
        confusion(ByBrightness(), images()[rank::2], settings(), 64, CLASSES, CPU, False, noted)
    # A rank without images takes part.
    with pytest.raises(ValueError, match="no labelled pixels"):
        confusion(ByBrightness(), [], settings(), 64, CLASSES, CPU, False, noted)
    together = confusion(
        ByBrightness(), [], settings(), 64, CLASSES, CPU, False, lambda sums: torch.stack(parts).sum(0)
    )
    assert torch.equal(together[0], whole)
    assert together[1:] == (pytest.approx(loss), count)


@pytest.mark.parametrize("stride", [17, 40, 64])
def test_windows_cover_all_and_agree_where_the_net_sees_pixels(stride: int) -> None:
    for each in images(3, seed=1):
        size = (each.mask.shape[0], each.mask.shape[1])
        asked = settings(mode="slide", stride_px=stride, short_side_px=100)
        slid = probabilities(ByBrightness(), each.image, asked, 64, size, False)
        whole = probabilities(ByBrightness(), each.image, settings(short_side_px=100), 64, size, False)
        assert slid.shape == (CLASSES, *size)
        assert torch.isfinite(slid).all()
        torch.testing.assert_close(slid.sum(0), torch.ones(size))
        assert (slid.argmax(0) == whole.argmax(0)).float().mean() > 0.85


def test_an_image_smaller_than_a_window() -> None:
    each = images(1)[0]
    small = Labelled(each.image[:, :20, :30], each.mask[:20, :30], 0)
    asked = settings(mode="slide", short_side_px=20)
    assert probabilities(ByBrightness(), small.image, asked, 64, (20, 30), False).shape == (CLASSES, 20, 30)


def test_mirror_images_and_scales_are_averaged() -> None:
    each = images(1)[0]
    size = (each.mask.shape[0], each.mask.shape[1])

    def of(image: Tensor, **more: object) -> Tensor:
        return probabilities(ByBrightness(), image, settings(**more), 64, size, False)

    both = of(each.image, flip=True)
    torch.testing.assert_close(both, (of(each.image) + of(each.image.flip(2)).flip(2)) / 2)
    scaled = of(each.image, scales=[1.0, 1.5])
    torch.testing.assert_close(scaled, (of(each.image, scales=[1.0]) + of(each.image, scales=[1.5])) / 2)


def test_a_rank_starts_without_what_only_evaluations_need() -> None:
    """torchmetrics (1.9.0) brings transformers, scipy.signal and matplotlib: as long a start as torch's."""
    slow = {"torchmetrics", "transformers", "scipy.signal", "matplotlib"}
    program = "import sys, pipeline.dense.segmentation, pipeline.detection.detection, pipeline.training.run; "
    done = subprocess.run(
        [sys.executable, "-c", f"{program} print(sorted({slow} & sys.modules.keys()))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
