"""Checkpoints by parameter name, free of world size and ZeRO stage: save, resume, start a fine-tuning from one.

    runs/NAME/checkpoints/step-00001200/
        model.safetensors       fp32 weights, published state-dict keys
        ema.safetensors         their moving average, where the run keeps one
        optimizer.safetensors   exp_avg/NAME, exp_avg_sq/NAME
        checkpoint.json         step, label space, model, configuration, metrics

Rank 0 gathers and writes; a folder is renamed to its final name once all of it is on disk, so one that has that name is
whole. Random state is not stored: every draw of a run is keyed by the step or the sample.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.config import Config

if TYPE_CHECKING:  # importing DeepSpeed takes seconds, which reading a checkpoint need not wait for
    from pipeline.engine import Engine

META_FILE = "checkpoint.json"
_STEP_FOLDER = re.compile(r"step-(\d{8})")
# What a run may change between two starts and still be the same run.
_FREE_KEYS = re.compile(
    r"output_root|data\.(path|format|workers_per_rank|on_bad_sample|bad_samples_max|cache_folder|cache_gb|ffcv_cache)"
    r"|train\.(micro_batch|zero_stage|precision)"
    r"|model\.activation_checkpointing|(evaluate|init|checkpoint|tracking)\..*"
)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of something else. The message names it and what to change."""


class Meta(BaseModel):
    """What `checkpoint.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format_version: Literal[1] = 1
    step: int
    samples_seen: int
    skipped_steps: int
    seconds: float
    num_classes: int
    synsets: list[str]
    dataset_id: str
    metrics: dict[str, float]
    config: dict[str, Any]

    @property
    def model_name(self) -> str:
        return str(self.config["model"]["name"])


def save(folder: Path, engine: Engine, meta: Meta, keep_last: int) -> Path:
    """Write a checkpoint under `folder` and drop all but the newest `keep_last`. All ranks must call it.

    Returns its path. Nothing stands under that name before all of it is on disk; the disk holds one more than
    `keep_last` meanwhile.
    """
    final = folder / f"step-{meta.step:08d}"
    weights = engine.full_state("model")
    optimizer = {state: engine.full_state(state) for state in engine.state_names}
    if engine.ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(".tmp-*"):
            shutil.rmtree(unfinished)
        temporary = folder / f".tmp-{final.name}"
        temporary.mkdir()
        save_file(weights, temporary / "model.safetensors")
        if "ema" in optimizer:
            save_file(optimizer.pop("ema"), temporary / "ema.safetensors")
        flat = {f"{state}/{name}": value for state, tensors in optimizer.items() for name, value in tensors.items()}
        save_file(flat, temporary / "optimizer.safetensors")
        (temporary / META_FILE).write_text(meta.model_dump_json(indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(folder)
        for old in _complete(folder)[:-keep_last]:
            shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The newest checkpoint under `folder`, or None."""
    return next(reversed(_complete(folder)), None)


def read_meta(path: Path) -> Meta:
    """`checkpoint.json` of a checkpoint folder."""
    try:
        return Meta.model_validate_json((path / META_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {META_FILE}") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / META_FILE} is damaged: {str(error).splitlines()[0]}") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file, on the CPU."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove the folder {path.parent} to go on from the checkpoint before it"
        ) from None


def read_optimizer(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Optimizer states of a checkpoint folder: state -> parameter name -> tensor, as `Engine.load_state` takes them."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in read_tensors(path / "optimizer.safetensors").items():
        state, _, name = key.partition("/")
        states.setdefault(state, {})[name] = value
    if (path / "ema.safetensors").exists():
        states["ema"] = read_tensors(path / "ema.safetensors")
    return states


def newest_of_run(config: Config, dataset_id: str, resume: bool) -> tuple[Path, Meta] | tuple[None, None]:
    """The checkpoint that the run of `config` goes on from, if any.

    Raises CheckpointError if it is another run's, or if there is one and `resume` is false.
    """
    last = newest(config.run_dir / "checkpoints")
    if last is None:
        return None, None
    if not resume:
        raise CheckpointError(
            f"{config.run_dir} already holds a run ({last.name}): leave out --resume never to continue it, "
            f"set another name, or remove the folder"
        )
    meta = read_meta(last)
    _check_same_run(last, meta, config, dataset_id)
    return last, meta


def _check_same_run(path: Path, meta: Meta, config: Config, dataset_id: str) -> None:
    changes = differing_keys(meta.config, config.model_dump(mode="json"))
    changes = {key: values for key, values in changes.items() if not _FREE_KEYS.fullmatch(key)}
    if meta.dataset_id != dataset_id:
        changes["data.path (dataset_id)"] = (meta.dataset_id[:12], dataset_id[:12])
    if changes:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changes.items())
        raise CheckpointError(f"{path} is of another configuration: {listed}. Set them back, or set another name")


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), where two nested mappings differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def locate(path: Path) -> Path:
    """A run folder or a checkpoint folder -> the checkpoint folder (a run's newest); a file -> itself."""
    if path.is_file() or (path / META_FILE).exists():
        return path
    found = newest(path / "checkpoints") if path.is_dir() else None
    if found is None:
        raise CheckpointError(
            f"{path} is neither a run folder with a checkpoint, nor a checkpoint folder, nor a weight file"
        )
    return found


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
