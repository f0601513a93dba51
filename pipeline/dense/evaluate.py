"""How well a net segments: intersection over union, pooled over a whole split, every image once at its own size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.dense_set import IGNORED
from pipeline.config.dense import STRIDE_PX, DenseEvaluate
from pipeline.data.augment import normalise
from pipeline.dense.augment import fitted_size
from pipeline.dense.data import Labelled

Reduce = Callable[[Tensor], Tensor]
Look = Callable[[Labelled, Tensor, Tensor], None]


@torch.inference_mode()
def probabilities(
    net: nn.Module, image: Tensor, settings: DenseEvaluate, window_px: int, size: tuple[int, int], bf16: bool
) -> Tensor:
    """(classes, *size) float32 of an image uint8 (3, H, W) on the net's device, in eval mode.

    The mean over scales and mirror images, where the settings ask for them.
    """
    total: Tensor | None = None
    variants = 0
    for scale in settings.scales:
        fitted = fitted_size(image.shape[1], image.shape[2], settings.short_side_px, settings.long_side_max_px, scale)
        resized = F.interpolate(normalise(image[None]), fitted, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True) if settings.flip else (False,):
            logits = _logits(net, resized.flip(3) if mirrored else resized, settings, window_px, bf16)
            logits = logits.flip(3) if mirrored else logits
            whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].softmax(0)
            total = whole if total is None else total.add_(whole)
            variants += 1
    assert total is not None
    return total / variants


def _logits(net: nn.Module, image: Tensor, settings: DenseEvaluate, window_px: int, bf16: bool) -> Tensor:
    """(1, classes, H, W) float32 at the size of `image` (1, 3, H, W)."""
    height, width = image.shape[-2:]
    if settings.mode == "whole":
        return _of_window(net, image, bf16)
    image = _padded(image, max(height, window_px), max(width, window_px))
    high, wide = image.shape[-2:]
    total, counts = None, image.new_zeros(1, 1, high, wide)
    for top in _starts(high, window_px, settings.stride_px):
        for left in _starts(wide, window_px, settings.stride_px):
            place = (..., slice(top, top + window_px), slice(left, left + window_px))
            logits = _of_window(net, image[place], bf16)
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], high, wide)
            total[place] += logits
            counts[place] += 1
    assert total is not None
    return (total / counts)[..., :height, :width]


def _of_window(net: nn.Module, image: Tensor, bf16: bool) -> Tensor:
    height, width = image.shape[-2:]
    # Else the backbone would leave out what is past the last whole stride.
    image = _padded(image, *(-(-side // STRIDE_PX) * STRIDE_PX for side in (height, width)))
    with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
        logits = net(image).float()
    return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)[..., :height, :width]


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    """Filled to (height, width), to the right and below, with the mean colour, which is 0."""
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Where windows begin: each a stride after the one before; the last ends with the image."""
    last = length - window
    yield from range(0, last, stride)
    yield last


@torch.inference_mode()
def confusion(
    net: nn.Module,
    images: Iterable[Labelled],
    settings: DenseEvaluate,
    window_px: int,
    num_classes: int,
    device: torch.device,
    bf16: bool,
    reduce: Reduce = lambda sums: sums,
    look: Look | None = None,
) -> tuple[Tensor, float, int]:
    """(pixels by true and predicted class, int64 (classes, classes); mean loss of a pixel; number of images).

    `reduce` sums this rank's part over all ranks; it is called once, at the end. `look` gets each image, the labels
    found in it (H, W), and its own pixels by true and predicted class. Raises ValueError where no pixel of any image
    has a label.
    """
    # Not before: torchmetrics (1.9.0) imports transformers, scipy.signal and matplotlib, as long a start as torch's.
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    net.eval()
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, images
    for labelled in images:
        mask = labelled.mask.to(device).long()
        found = probabilities(net, labelled.image.to(device), settings, window_px, (mask.shape[0], mask.shape[1]), bf16)
        labels = found.argmax(0)
        own = multiclass_confusion_matrix(labels, mask, num_classes, ignore_index=IGNORED)
        counts += own
        if look is not None:
            look(labelled, labels, own)
        loss = F.nll_loss(found.clamp_min(1e-30).log()[None], mask[None], ignore_index=IGNORED, reduction="sum")
        sums += torch.stack([loss.double(), torch.ones((), dtype=torch.float64, device=device)])
    # Pixels of a whole set are more than float32 can count, and fewer than float64.
    whole = reduce(torch.cat([sums, counts.flatten().double()]))
    pixels = whole[2:].round().long().view(num_classes, num_classes).cpu()
    if not pixels.sum():
        raise ValueError("there are no labelled pixels to evaluate on: no score is better than a made-up one")
    return pixels, float(whole[0]) / float(pixels.sum()), int(whole[1])


def image_iou(pixels: Tensor) -> float:
    """Mean intersection over union of one image, percent, over the classes that are there or found."""
    return float(class_ious(pixels).nanmean())


def class_ious(pixels: Tensor) -> Tensor:
    """Intersection over union of each class, percent, float64 (classes,); nan where it is neither there nor found."""
    pixels = pixels.double()
    hits = pixels.diag()
    return 100 * hits / (pixels.sum(0) + pixels.sum(1) - hits)


def summarised(pixels: Tensor, loss: float, images: int) -> dict[str, float]:
    """miou: mean over the classes that are there or found; macc: mean of the classes' share of pixels found; pixel
    accuracy (percent all); classes that are neither there nor found; val_loss; val_samples.
    """
    ious, true = class_ious(pixels), pixels.sum(1)
    recalls = 100 * pixels.diag()[true > 0].double() / true[true > 0]
    return {
        "miou": float(ious.nanmean()),
        "macc": float(recalls.mean()),
        "pixel_accuracy": 100 * float(pixels.diag().sum()) / float(pixels.sum()),
        "classes_absent": float(ious.isnan().sum()),
        "val_loss": loss,
        "val_samples": float(images),
    }
