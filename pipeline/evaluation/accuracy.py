"""Accuracy over a split, every sample exactly once: during training on all ranks, and of a checkpoint on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.utils import accuracy
from torch import nn
from tqdm import tqdm

from data_prep.manifest import ManifestError
from pipeline.checkpoints.files import CheckpointError, locate, read_meta
from pipeline.checkpoints.state import read_tensors
from pipeline.config.load import Config
from pipeline.data.augment import normalise
from pipeline.data.loader import validation_batches
from pipeline.data.stream.manifest import load_manifest
from pipeline.data.views import Batch
from pipeline.models.build import build_model
from pipeline.ranks.collectives import Ranks


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    bf16: bool,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """top1 and top5 (percent), loss (mean cross-entropy) and samples of `model`, in eval mode, over `batches`.

    `reduce` sums this rank's counts over all ranks; it is called once, at the end, so ranks may hold different numbers
    of batches (one that holds none still takes part). With fewer than five classes, top5 counts that many.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top1 hits, top5 hits, samples
    for batch in batches:
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalise(images)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        logits = logits.float()
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        share = len(labels) / 100
        sums += torch.stack([loss, top1 * share, top5 * share, torch.tensor(len(labels), device=device)]).double()
    loss_sum, hits1, hits5, samples = reduce(sums).tolist()
    if not samples:
        raise ValueError("there are no images to evaluate on: no accuracy is better than a made-up one")
    return {
        "top1": 100 * hits1 / samples,
        "top5": 100 * hits5 / samples,
        "val_loss": loss_sum / samples,
        "val_samples": samples,
    }


def evaluate_checkpoint(path: Path, data: str | None, weights: str | None) -> dict[str, float]:
    """Evaluate a run's newest checkpoint, or one checkpoint folder, on the validation split; prints a table.

    `data` replaces the dataset that the run used (the classes have to be the same); `weights` is "ema" or "model", and
    by default the EMA where the checkpoint has one.
    """
    path = locate(path)
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give a run folder or one of its checkpoints")
    meta = read_meta(path)
    tree = dict(meta.config)
    if data is not None:
        streamed = {"stream_val": None, "stream_samples_per_epoch": None, "reader": "indexed", "stream_classes": None}
        tree["data"] = {**tree["data"], **streamed, "path": data}
    config = Config.model_validate(tree)
    manifest = load_manifest(config.data)
    if manifest.synsets != meta.synsets:
        raise CheckpointError(
            f"{config.data.shown_path} has {manifest.num_classes} classes, {path} was trained on {len(meta.synsets)} "
            f"others"
        )
    if "val" not in manifest.splits or not manifest.split("val").samples:
        raise ManifestError(f"{config.data.shown_path} has no validation images: give another data set with --data")
    weights = weights or ("ema" if "ema.safetensors" in meta.files else "model")
    if f"{weights}.safetensors" not in meta.files:
        raise CheckpointError(f"{path} has no {weights}.safetensors: leave --weights out")
    model = build_model(config.model, meta.num_classes, config.data.resolution)
    model.load_state_dict(read_tensors(path / f"{weights}.safetensors"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = tqdm(
        validation_batches(config, manifest, Ranks()),
        total=-(-manifest.split("val").samples // config.evaluate.micro_batch),
        unit="batch",
        desc="evaluate",
    )
    result = evaluate(model.to(device), batches, device, config.train.bf16_on(device.type))
    table = Table(title=f"{path} ({weights}) on {config.data.shown_path}")
    for column in ("top-1 %", "top-5 %", "loss", "images"):
        table.add_column(column, justify="right")
    top1, top5, loss, samples = result.values()
    table.add_row(f"{top1:.2f}", f"{top5:.2f}", f"{loss:.4f}", f"{samples:.0f}")
    Console().print(table)
    return result
