"""Checkpoints without a training: an engine of two tensors, what a run says of itself, a whole one, and damage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.checkpoints.files import META_FILE, Meta, record
from pipeline.config.load import Config
from pipeline.models.build import build_model
from pipeline.models.hornet import HorNet
from pipeline.ranks.collectives import Ranks
from tests.support.models import drawn_state

SYNSETS = ["n02084071", "n02121620", "n02958343"]
DATASET = "0" * 32


class TinyEngine:
    """As the writer sees an engine: full tensors, of other values in each state and step."""

    state_names = ("exp_avg", "exp_avg_sq", "ema")

    def __init__(self, rank: int = 0, floats: int = 1000) -> None:
        self.ranks, self.floats, self.step = Ranks(rank, 2), floats, 0

    def full_state(self, state: str, everywhere: bool = False) -> dict[str, torch.Tensor]:
        if self.ranks.rank and not everywhere:
            return {}
        value = float(self.step + 1000 * ["model", *self.state_names].index(state))
        return {"stem.weight": torch.full((2, self.floats // 2), value), "head.bias": torch.tensor([value, 1.0, 2.0])}


def meta_at(step: int, config: Config | None = None, **values: Any) -> Meta:
    """A run's `checkpoint.json` at a step, with other `values`."""
    tree = {} if config is None else config.model_dump(mode="json")
    standard: dict[str, Any] = {"samples_seen": 64 * step, "updates": step, "seconds": 1.0, "num_classes": 3}
    standard |= {"synsets": SYNSETS, "dataset_id": DATASET, "metrics": {}, "config": tree}
    return Meta(step=step, **(standard | values))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def write_checkpoint(run: Path, config: Config, synsets: Sequence[str], step: int = 1) -> HorNet:
    """A checkpoint of a run that never was, with EMA and raw weights that differ; returns the net with the EMA's."""
    torch.manual_seed(0)
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    nets = {}
    for name in ("model", "ema"):
        nets[name] = build_model(config.model, len(synsets), config.data.resolution).eval()
        nets[name].load_state_dict(drawn_state(nets[name]))
        if name == "model":
            torch.nn.init.normal_(nets[name].head.bias)
        save_file(nets[name].state_dict(), folder / f"{name}.safetensors")
    files = {f"{name}.safetensors": record(folder / f"{name}.safetensors") for name in nets}
    meta = meta_at(step, config, synsets=list(synsets), num_classes=len(synsets), files=files)
    (folder / META_FILE).write_text(meta.model_dump_json())
    return nets["ema"]
