"""A net as a checkpoint has it, to be measured or handed over: which file, which weights, at which resolution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoints.files import CheckpointError, Meta, file_fault, locate, read_meta
from pipeline.checkpoints.state import read_tensors
from pipeline.config.load import Config
from pipeline.models.build import build_model
from pipeline.models.hornet import HorNet
from pipeline.ops.global_filter import resize_global_filters

_WARP_FROM = 384  # pixels: as published, the whole image is resized to the square from there on
_CROP_RATIO = 0.875


@dataclass(frozen=True)
class Weights:
    """One of the weights of a checkpoint folder: `which` is "ema" or "raw"."""

    path: Path
    meta: Meta
    which: str

    @property
    def file(self) -> Path:
        return self.path / ("ema.safetensors" if self.which == "ema" else "model.safetensors")

    @property
    def run(self) -> Path:
        """The run folder; of a checkpoint that was copied out of one, the folder that it lies in."""
        folder = self.path.absolute().parent
        return folder.parent if folder.name == "checkpoints" else folder


def find_weights(path: Path, which: str | None, task: str | None = None) -> Weights:
    """In a run folder (its newest checkpoint) or a checkpoint folder; by default the EMA where there is one.

    task: what its run has to have learned, as its configuration has it; None: to classify.

    Raises CheckpointError.
    """
    path = locate(path)
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give a run folder or one of its checkpoints")
    meta = read_meta(path)
    if (learned := meta.config.get("task")) != task:
        command = "evaluate" if learned is None else f"evaluate-{learned}"
        raise CheckpointError(
            f"{path} is of a run that learned to {learned or 'classify'}, and not to {task or 'classify'}: `python -m "
            f"pipeline {command}` measures it"
        )
    found = Weights(path, meta, which or ("ema" if "ema.safetensors" in meta.files else "raw"))
    if found.file.name not in meta.files:
        raise CheckpointError(f"{path} has no {found.file.name}: leave --weights out")
    if fault := file_fault(found.file, meta.files[found.file.name], hashes=False):
        raise CheckpointError(f"checkpoint {path} is damaged: {fault}; give another one")
    return found


def at_resolution(tree: dict[str, Any], side: int) -> dict[str, Any]:
    """A configuration for square images of `side` pixels, with the published crop. Raises CheckpointError."""
    if side % 32 or side < 32:
        raise CheckpointError(f"--resolution {side}: of classification it is a multiple of 32, as data.resolution")
    warp = side >= _WARP_FROM
    protocol = {"resize": "warp" if warp else "crop", "crop_ratio": 1.0 if warp else _CROP_RATIO}
    data = {**tree["data"], "resolution": side, "resolution_by_epoch": None}
    return {**tree, "data": data, "evaluate": {**tree["evaluate"], **protocol}}


def on_data(tree: dict[str, Any], path: str) -> dict[str, Any]:
    """A configuration for the indexed set, or the folder of images, at `path`, whatever it read before."""
    streamed = {"stream_val": None, "stream_samples_per_epoch": None, "reader": "indexed", "stream_classes": None}
    return {**tree, "data": {**tree["data"], **streamed, "path": path}}


def restore(weights: Weights, config: Config) -> HorNet:
    """The net on the CPU, in eval mode, for images of the configuration's resolution: its filters are resized to it."""
    model = build_model(config.model, weights.meta.num_classes, config.data.resolution)
    model.load_state_dict(resize_global_filters(read_tensors(weights.file), model))
    return model.eval()
