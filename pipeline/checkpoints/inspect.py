"""What is in a run's checkpoints, and whether they are whole: ``python -m pipeline checkpoint PATH``.

Only files are read, without torch: it answers in a moment, also while the run goes on.
"""

from __future__ import annotations

import math
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from data_prep.dense_set import load_set
from data_prep.storage import DataPrepError
from pipeline.checkpoints import files
from pipeline.checkpoints.files import META_FILE, CheckpointError, Meta
from pipeline.config.sections import Checkpoint

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class TensorFacts(NamedTuple):
    """One tensor of a file: `dtype` in safetensors' words (F32); `norm`: L2, None where it was not asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * _ITEM_BYTES.get(self.dtype, 0)


def show(path: Path, hashes: bool, tensors: bool) -> bool:
    """Print what a run folder or a checkpoint folder holds; returns whether all is whole. Raises CheckpointError."""
    console = Console()
    if not console.is_terminal:  # a log: rich takes it for 80 columns, which break the names of files
        console = Console(width=max(console.width, 140))
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give a run folder or one of its checkpoints")
    folder = path / "checkpoints"
    if files.step_folders(folder, set_aside=True):
        return show_run(path, hashes, console)
    if folder.is_dir():
        raise CheckpointError(f"{path} has no checkpoint yet")
    return show_checkpoint(files.locate(path), tensors, console)


def show_run(run: Path, hashes: bool, console: Console) -> bool:
    """Print a row for each checkpoint of a run; returns whether all are whole, those set aside not counted."""
    folder = run / "checkpoints"
    paths = files.step_folders(folder, set_aside=True)
    faults = {path: files.verify(path, hashes) for path in paths}
    paths = [path for path in paths if path.is_dir()]  # the run may have deleted one meanwhile
    metas = {path: files.read_meta(path) for path in paths if not faults[path]}
    own = [meta for path, meta in metas.items() if not path.name.startswith(files.SET_ASIDE)]
    kept = files.reasons_to_keep(own, Checkpoint.model_validate(own[-1].config["checkpoint"])) if own else {}
    steps_per_epoch = _steps_per_epoch(run, own[-1]) if own else None

    name = f"{run}: {own[-1].model_name}, {own[-1].num_classes:,} classes" if own else str(run)
    table = Table(title=Text(name), caption=_caption(folder, hashes))
    score = next((_SCORES[name] for meta in own for name in _SCORES if name in meta.metrics), "score")
    for column in ("step", "epoch", "images seen", "written", f"{score} %", "size", "kept because", "state"):
        left = column in ("written", "kept because", "state")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for path in paths:
        meta = metas.get(path)
        aside = path.name.startswith(files.SET_ASIDE)
        table.add_row(
            f"{files.step_of(path):,}",
            f"{meta.step / steps_per_epoch:.2f}" if meta and steps_per_epoch else "",
            f"{meta.samples_seen:,}" if meta else "",
            _written(path),
            _score(meta) if meta else "",
            decimal(_bytes(path)),
            "set aside" if aside else ", ".join(kept.get(meta.step, ["nothing: goes next"])) if meta else "",
            Text("good", "green") if meta else Text(f"damaged: {'; '.join(faults[path])}", "red"),
        )
    console.print(table)
    return not any(faults[path] for path in paths if not path.name.startswith(files.SET_ASIDE))


def show_checkpoint(path: Path, tensors: bool, console: Console) -> bool:
    """Print what one checkpoint holds, every byte checked; returns whether it is whole. Raises CheckpointError."""
    meta = files.read_meta(path)
    contents = {name: _tensors(path / name, norms=tensors) for name in meta.files}
    weights = contents.get("model.safetensors")
    steps_per_epoch = _steps_per_epoch(path.parent.parent, meta)

    table = Table(title=Text(str(path)), show_header=False)
    table.add_row("model", meta.model_name)
    table.add_row("parameters", f"{sum(t.elements for t in weights):,}" if weights else "unknown")
    table.add_row("classes", f"{meta.num_classes:,}")
    table.add_row("data set", meta.dataset_id)
    table.add_row("step", f"{meta.step:,}" + (f" (epoch {meta.step / steps_per_epoch:.2f})" if steps_per_epoch else ""))
    table.add_row("updates", f"{meta.updates:,} ({meta.step - meta.updates:,} steps without one)")
    table.add_row("images seen", f"{meta.samples_seen:,}")
    table.add_row("training time", f"{meta.seconds / 3600:.2f} h")
    table.add_row("written", _written(path))
    measured = "" if meta.metrics_step is None else f" (at step {meta.metrics_step:,})"
    table.add_row("metrics", (_pairs(meta.metrics) + measured) if meta.metrics else "none yet")
    table.add_row("guard", _pairs(meta.guard) or "off")
    console.print(table)

    verdicts = {name: files.file_fault(path / name, expected, True) for name, expected in meta.files.items()}
    table = Table(title="files, every byte checked")
    for column in ("file", "size", "tensors", "dtypes", "tensor bytes", "sha256", "verdict"):
        right = column in ("size", "tensors", "tensor bytes")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for name, expected in meta.files.items():
        found, verdict = contents[name], verdicts[name]
        dtypes = Counter(tensor.dtype for tensor in found or ())
        table.add_row(
            name,
            f"{expected.bytes:,}",
            f"{len(found):,}" if found is not None else "unreadable",
            ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items()),
            f"{sum(tensor.bytes for tensor in found):,}" if found is not None else "",
            expected.sha256[:12],
            Text(verdict, "red") if verdict else Text("good", "green"),
        )
    console.print(table)
    others = [fault for fault in files.verify(path, hashes=False) if fault not in verdicts.values()]
    for fault in others:
        console.print(Text(fault, "red"))
    if tensors:
        table = Table("file", "tensor", "shape", "dtype", "L2 norm", title="tensors")
        for name, found in contents.items():
            for tensor in found or ():
                norm = "" if tensor.norm is None else f"{tensor.norm:.6g}"
                table.add_row(name, tensor.name, " x ".join(map(str, tensor.shape)), tensor.dtype, norm)
        console.print(table)
    return not others and not any(verdicts.values())


def _tensors(file: Path, norms: bool) -> list[TensorFacts] | None:
    """What a safetensors file holds, None where it cannot be read. Norms are summed in float64."""
    found = []
    try:
        with safe_open(file, framework="np") as content:
            for name in content.keys():  # noqa: SIM118 (not a mapping: it has no iterator)
                part = content.get_slice(name)
                dtype, shape = str(part.get_dtype()), tuple(part.get_shape())
                norm = None
                if norms and dtype != "BF16":  # which numpy lacks
                    norm = float(np.sqrt(np.square(content.get_tensor(name), dtype=np.float64).sum()))
                found.append(TensorFacts(name, dtype, shape, norm))
    except (SafetensorError, OSError):
        return None
    return found


_SCORES = {"top1": "top-1", "miou": "mIoU", "box_ap": "box AP"}


def _steps_per_epoch(run: Path, meta: Meta) -> int | None:
    """From the copy of the data set's manifest in the run folder; None where that is gone or of another data set."""
    try:
        manifest = load_set(run)
        samples = manifest.split("train").samples if manifest.dataset_id == meta.dataset_id else 0
    except DataPrepError:
        return None
    return samples // meta.config["train"]["global_batch"] or None


def _caption(folder: Path, hashes: bool) -> str:
    links = [f"{name} -> {(folder / name).readlink()}" for name in ("latest", "best") if (folder / name).is_symlink()]
    checked = "every byte checked" if hashes else "sizes checked; --hashes reads every byte"
    return "; ".join([*links, checked])


def _written(path: Path) -> str:
    try:
        return f"{datetime.fromtimestamp((path / META_FILE).stat().st_mtime):%Y-%m-%d %H:%M}"
    except OSError:
        return ""


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _score(meta: Meta) -> str:
    """Of its own step; with the step it was measured at where that is an earlier one."""
    score = next((name for name in _SCORES if name in meta.metrics), None)
    if score is None:
        return ""
    return f"{meta.metrics[score]:.2f}" + (
        f" (at {meta.metrics_step:,})" if meta.metrics_step not in (None, meta.step) else ""
    )


def _pairs(values: dict[str, Any]) -> str:
    """Plain values as they are, of lists and the like their length."""
    words = []
    for key, value in values.items():
        if isinstance(value, float):
            value = f"{value:.6g}"
        elif isinstance(value, list | dict):
            value = f"({len(value)} values)"
        words.append(f"{key} {value}")
    return ", ".join(words)
