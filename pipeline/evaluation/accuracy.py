"""Accuracy over a split, every sample exactly once, as training asks for it: a few sums over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.data.augment import normalise
from pipeline.data.views import Batch
from pipeline.evaluation.scores import places, tied


def logits_of(model: nn.Module, batch: Batch, device: torch.device, bf16: bool) -> torch.Tensor:
    """(B, classes) float32 of a model in eval mode; `bf16`: its body under autocast, its head is float32 anyway."""
    images = batch.images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = normalise(images)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model(images).float()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    bf16: bool,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """top1, top5 and tied_top1 (percent; see `scores.py`), val_loss (mean cross-entropy) and val_samples of `model`, in
    eval mode, over `batches`.

    `reduce` sums this rank's counts over all ranks; it is called once, at the end, so ranks may hold different numbers
    of batches (one that holds none still takes part). With fewer than five classes, top5 counts that many.
    """
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, top1 hits, top5 hits, ties, samples
    for batch in batches:
        logits, labels = logits_of(model, batch, device, bf16), batch.labels.to(device, non_blocking=True)
        place = places(logits, labels)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = ((place < 1).sum(), (place < 5).sum(), tied(logits).sum(), torch.tensor(len(labels), device=device))
        sums += torch.stack([loss.double(), *(count.double() for count in counts)])
    loss_sum, hits1, hits5, ties, samples = reduce(sums).tolist()
    if not samples:
        raise ValueError("there are no images to evaluate on: no accuracy is better than a made-up one")
    return {
        "top1": 100 * hits1 / samples,
        "top5": 100 * hits5 / samples,
        "tied_top1": 100 * ties / samples,
        "val_loss": loss_sum / samples,
        "val_samples": samples,
    }
