"""Checkpoints as files: what a folder holds, whether it is whole, which of them a run keeps. Needs no torch.

    runs/NAME/checkpoints/step-00001200/
        model.safetensors       fp32 weights, published state-dict keys
        ema.safetensors         their moving average, where the run keeps one
        optimizer.safetensors   exp_avg/NAME, exp_avg_sq/NAME
        checkpoint.json         step, label space, model, configuration, metrics, guard, sizes and checksums of the rest
    runs/NAME/checkpoints/latest, best         for people: relative links to step folders
    runs/NAME/checkpoints/damaged-step-...     set aside when a run was resumed from an older one

A folder gets its final name once all of it is on disk, and loses it before any of it is deleted. What a disk does to
it afterwards is found by size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config.sections import Checkpoint
from pipeline.ranks.log_file import say

META_FILE = "checkpoint.json"
FORMAT_VERSION = 2
SET_ASIDE = "damaged-"
UNREADABLE = "cannot be read"  # a fault of the disk or network, perhaps for a while: not of the checkpoint
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_STEP_FOLDER = re.compile(rf"(?:{SET_ASIDE})?step-(\d{{8}})")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of something else. The message names it and what to change."""


class FileRecord(BaseModel):
    """One file of a checkpoint, as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Meta(BaseModel):
    """What `checkpoint.json` says.

    `updates`: weight updates made, AdamW's step count; `metrics_step`: the step that `metrics` were measured at;
    `guard`: the guard's own state, of which only `in_a_row` is read here; `files` by name, empty until written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format_version: Literal[2] = 2
    step: int
    samples_seen: int
    updates: int
    seconds: float
    num_classes: int
    synsets: list[str]
    dataset_id: str
    metrics: dict[str, float]
    metrics_step: int | None = None
    guard: dict[str, Any] = {}
    config: dict[str, Any]
    files: dict[str, FileRecord] = {}

    @property
    def model_name(self) -> str:
        return str(self.config["model"]["name"])

    @property
    def is_healthy(self) -> bool:
        """Whether the guard had nothing against the steps just before it: what a rewind may go back to."""
        return self.guard.get("in_a_row", 0) == 0


def read_meta(path: Path) -> Meta:
    """`checkpoint.json` of a checkpoint folder. Raises CheckpointError."""
    meta = _meta_or_fault(path)
    if isinstance(meta, str):
        raise CheckpointError(f"{path}: {meta}")
    return meta


def _meta_or_fault(path: Path) -> Meta | str:
    try:
        tree = json.loads((path / META_FILE).read_text(encoding="utf-8"))
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            return (
                f"{META_FILE} has format_version {version}, this code reads {FORMAT_VERSION}: use the code that wrote "
                f"it, or start another run from a copy of its weight file (init.checkpoint)"
            )
        return Meta.model_validate(tree)
    except (FileNotFoundError, NotADirectoryError):
        return f"{META_FILE} is missing"
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"])) or "content"
        return f"{META_FILE} is damaged: {key}: {fault['msg']}"
    except ValueError as error:  # neither UTF-8 nor JSON
        return f"{META_FILE} is damaged: {error}"
    except OSError as error:
        return f"{META_FILE} {UNREADABLE}: {error.strerror or error}"


def record(file: Path) -> FileRecord:
    """Size and checksum of a file as it is now."""
    with open(file, "rb") as stream:
        return FileRecord(bytes=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def file_fault(file: Path, expected: FileRecord, hashes: bool) -> str | None:
    """What is wrong with a file of a checkpoint, if anything; without `hashes` only its size is looked at."""
    try:
        size = file.stat().st_size
        if size != expected.bytes:
            return f"{file.name} has {size:,} bytes instead of {expected.bytes:,}"
        if hashes and record(file).sha256 != expected.sha256:
            return f"{file.name} has the right size but another sha256 than when it was written"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} {UNREADABLE}: {error.strerror or error}"
    return None


def verify(path: Path, hashes: bool = True) -> list[str]:
    """The faults of a checkpoint folder; none: it is as it was written.

    With `hashes` every byte is read (a second or two a gigabyte); without, only sizes are compared.
    """
    meta = _meta_or_fault(path)
    return [meta] if isinstance(meta, str) else _faults(path, meta, hashes)


def _faults(path: Path, meta: Meta, hashes: bool) -> list[str]:
    faults = [] if meta.files else [f"{META_FILE} lists no files"]
    if step_of(path) not in (None, meta.step):
        faults.append(f"{META_FILE} is of step {meta.step}")
    found = (file_fault(path / name, expected, hashes) for name, expected in meta.files.items())
    return faults + [fault for fault in found if fault]


def step_of(path: Path) -> int | None:
    """The step that a folder's name says, if it is a checkpoint's name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def step_folders(folder: Path, set_aside: bool = False) -> list[Path]:
    """Checkpoint folders under `folder`, oldest first, good or not; those `set_aside` as damaged only if asked for."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None]
    return sorted(
        (path for path in found if set_aside or not path.name.startswith(SET_ASIDE)),
        key=lambda path: (step_of(path), path.name),
    )


def newest_good(
    folder: Path, hashes: bool, wanted: Callable[[Meta], bool] = lambda meta: True
) -> tuple[tuple[Path, Meta] | None, dict[Path, list[str]]]:
    """The newest checkpoint under `folder` that is whole and `wanted`, and the faults of the newer damaged ones."""
    faults: dict[Path, list[str]] = {}
    for path in reversed(step_folders(folder)):
        meta = _meta_or_fault(path)
        if isinstance(meta, str):
            faults[path] = [meta]
        elif wanted(meta):
            damage = _faults(path, meta, hashes)
            if not damage:
                return (path, meta), faults
            faults[path] = damage
    return None, faults


def find_rewind(folder: Path) -> tuple[Path, Meta] | None:
    """The newest whole checkpoint whose guard counted no left-out step in a row; every byte of it is checked.

    Warns of damaged newer ones. To be called while no checkpoint is being written (`CheckpointWriter.wait`).
    """
    found, faults = newest_good(folder, True, lambda meta: meta.is_healthy)
    if found is not None:
        warn_of_damage(faults, found[0])
    return found


def locate(path: Path) -> Path:
    """A run folder -> its newest whole checkpoint (by sizes); a checkpoint folder or a link to one -> that folder; a
    file -> itself. Raises CheckpointError.
    """
    if path.is_file():
        return path
    if path.is_symlink():
        path = path.parent / path.readlink()
    if (path / META_FILE).exists() or (step_of(path) is not None and path.is_dir()):
        return path
    for folder in (path / "checkpoints", path):
        found, faults = newest_good(folder, hashes=False)
        if found is not None:
            warn_of_damage(faults, found[0])
            return found[0]
        if faults:
            raise none_good(path, faults)
    raise CheckpointError(_why_none(path))


def refuse_missing(path: Path) -> None:
    """CheckpointError where nothing has that name: for commands that take seconds to import torch before they look."""
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(_why_none(path))


def _why_none(path: Path) -> str:
    if not path.exists():
        if _ADDRESS.match(str(path)):
            return f"{path} is not fetched: download the file, and name it where it is then"
        return f"{path} does not exist: it has to be a run folder, one of its checkpoints, or a weight file"
    text = f"{path} is neither a run folder with a checkpoint, nor a checkpoint folder, nor a weight file"
    held = sorted(path.iterdir()) if path.is_dir() else []
    runs = [each.name for each in held if (each / "checkpoints").is_dir()]
    weights = [each.name for each in held if each.suffix in _WEIGHTS]
    for what, names in (("runs", runs), ("weight files", weights)):
        if names:
            text += f"; it holds {what}, name one: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    return text


def none_good(run: Path, faults: dict[Path, list[str]]) -> CheckpointError:
    """The error for a run that has checkpoints, all of them damaged."""
    listed = "; ".join(_described(path, found) for path, found in list(faults.items())[:3])
    return CheckpointError(
        f"{run} has {len(faults)} checkpoints, none of them whole: {listed}. Put back a copy, or set another name"
    )


def warn_of_damage(faults: dict[Path, list[str]], instead: Path, note: str = "") -> None:
    """A line on stderr for each damaged checkpoint, and which one is taken."""
    for path, found in faults.items():
        say(f"warning: {_described(path, found)}; taking {instead.name} instead{note}", sys.stderr)


def _described(path: Path, faults: Sequence[str]) -> str:
    return f"checkpoint {path} is damaged: {', '.join(faults)}"


def reasons_to_keep(metas: Iterable[Meta], settings: Checkpoint) -> dict[int, list[str]]:
    """Step -> why its checkpoint stays: last, every, best, rewind. Steps that are not in it may go."""
    by_step = sorted(metas, key=lambda meta: meta.step)
    steps, every = [meta.step for meta in by_step], settings.keep_every_steps
    best = best_of(by_step, settings.best_metric)
    kept = {
        "last": steps[-settings.keep_last :],
        "every": [step for step in steps if every and step % every == 0],
        "best": [best.step] if best else [],
        "rewind": [meta.step for meta in by_step if meta.is_healthy][-1:],
    }
    return {step: why for step in steps if (why := [reason for reason, found in kept.items() if step in found])}


def to_keep(metas: Iterable[Meta], settings: Checkpoint) -> set[int]:
    """Steps whose checkpoints stay: the newest, the regular ones, the best, and the one that a rewind goes back to."""
    return set(reasons_to_keep(metas, settings))


def best_of(metas: Iterable[Meta], metric: str | None) -> Meta | None:
    """The best of those that were evaluated at their own step; of equals the newest. None where there is none."""
    if metric is None:
        return None
    sign = -1 if metric == "val_loss" else 1
    scores = {
        (sign * meta.metrics[metric], meta.step): meta
        for meta in metas
        if metric in meta.metrics and meta.metrics_step == meta.step and math.isfinite(meta.metrics[metric])
    }
    return scores[max(scores)] if scores else None


def point(folder: Path, name: str, target: Path | None) -> None:
    """Make `folder`/`name` a relative link to `target`, at once; None removes it. Disks without links go without."""
    temporary = folder / f".tmp-{name}"
    with suppress(OSError):
        if target is None:
            if (folder / name).is_symlink():
                (folder / name).unlink()
            return
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name, target_is_directory=True)
        os.replace(temporary, folder / name)


def before(final: Path) -> Path:
    """Where a checkpoint is for the moment in which another of its step takes its name."""
    return final.with_name(f".tmp-before-{final.name}")


def put_back(folder: Path) -> None:
    """Undo that for a checkpoint that no other one has replaced: a kill or a fault came between."""
    for path in folder.glob(".tmp-before-*") if folder.is_dir() else ():
        final = path.with_name(path.name.removeprefix(".tmp-before-"))
        if not final.exists():
            with suppress(OSError):
                os.replace(path, final)


def remove(path: Path) -> None:
    """Delete a folder, file or link, if it is there; what cannot be deleted is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
