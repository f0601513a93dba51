"""What make.py did and test_former.py does again: the commands by relative paths, and how what they leave is read."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What decides the bytes of images that are decoded and encoded again, and of Parquet files.
LIBRARIES = ("numpy", "pillow", "pyarrow", "simplejpeg", "torch")


def shards_build() -> list[str]:
    """All that is kept passes byte for byte: the same shards with any library."""
    return [
        *("shard", "--source", "raw/in22k.tar", "--val-source", "raw/in22k-val.tar"),
        *("--exclude", "raw/exclude.txt", "--output", "data/in22k", "--samples-per-shard", "20", "--max-reject", "0.2"),
        *("--min-side", "16", "--format", "both", "--workers", "1"),
    ]


def odd_build() -> list[str]:
    """Images of every form, all encoded again."""
    return [
        *("shard", "--source", "raw/odd.tar", "--val-per-class", "1", "--output", "data/odd"),
        *("--samples-per-shard", "5", "--min-side", "16", "--short-side", "32", "--reencode", "always"),
        *("--duplicates", "drop", "--workers", "1"),
    ]


def indexing() -> list[str]:
    return ["index", "data/in1k", "--classes", "raw/in1k-classes.txt"]


def pretraining() -> list[str]:
    """Three steps an epoch; a checkpoint each fourth step, at the end, and at the best evaluation."""
    return [
        *("pretrain", "configs/demo_pretrain.yaml", "name=pretrain", "data.path=data/in22k", "data.resolution=32"),
        *("model.name=hornet_former_gf", "model.drop_path_rate=0.1", "train.precision=fp32", "train.epochs=8"),
        *("train.global_batch=16", "train.micro_batch=4", "optimizer.warmup_epochs=1", "evaluate.every_epochs=2"),
        *("evaluate.micro_batch=8", "checkpoint.every_steps=4", "checkpoint.keep_last=1"),
        *("checkpoint.best_metric=val_loss", "tracking.log_every_steps=1", "tracking.uri=sqlite:///runs/mlflow.db"),
    ]


def finetuning() -> list[str]:
    """Six steps on other classes at another resolution, in one process."""
    return [
        *("finetune", "configs/demo_finetune.yaml", "name=finetune", "data.path=data/in1k", "data.resolution=64"),
        *("model.name=hornet_former_gf", "init.checkpoint=runs/pretrain", "optimizer.layer_decay=0.7"),
        *("train.precision=fp32", "train.epochs=2", "train.global_batch=8", "train.micro_batch=4"),
        *("optimizer.warmup_epochs=0.5", "evaluate.every_epochs=2", "evaluate.micro_batch=8"),
        *("tracking.log_every_steps=1", "tracking.uri=sqlite:///runs/mlflow.db"),
    ]


def libraries() -> dict[str, str]:
    """Versions, and the kind of processor."""
    found = {"machine": platform.machine()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def log_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluated(said: str) -> dict[str, float]:
    """The figures in the table that `python -m pipeline evaluate` prints."""
    rows = [re.findall(r"[0-9.]+", line) for line in said.splitlines() if line.strip().startswith(("│", "|"))]
    top1, top5, loss, images = (float(number) for number in rows[-1])
    return {"top1": top1, "top5": top5, "loss": loss, "images": images}
