"""Checkpoints by parameter name, free of world size and ZeRO stage: save while training goes on, resume exactly.

All ranks gather the state; rank 0 then writes it in a thread (`pipeline/checkpoints/files.py` says what). Random state
is not stored: every draw of a run is keyed by the step or the sample.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from rich.filesize import decimal
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import files
from pipeline.checkpoints.files import META_FILE, CheckpointError, Meta, read_meta
from pipeline.config.sections import Checkpoint

_LAST_SECONDS = 25.0  # launchers wait for 30 s before they kill what is left
SPARE_BYTES = 32 * 2**20  # left free by a save, for the logs of the run that goes on
_HEADER_BYTES = 512  # a tensor, at most, in the header of its file

Tensors = dict[str, torch.Tensor]


class Stateful(Protocol):
    """What has a state to save: `full_state` takes "model" or a name of `state_names`; a collective."""

    @property
    def state_names(self) -> Iterable[str]: ...

    def full_state(self, state: str) -> Tensors: ...


class CheckpointWriter:
    """Writes a run's checkpoints into `folder`: all ranks gather, rank 0 writes in a thread while training goes on.

    `failed`: saves that could not be written; `last`: the newest checkpoint on disk, as far as this writer knows;
    `stall_seconds`: how long the last `save` held up training, waiting for the one before it included. Rank 0 only.
    """

    def __init__(self, folder: Path, settings: Checkpoint, rank: int) -> None:
        self.folder, self.settings, self.rank = folder, settings, rank
        self.failed = 0
        self.stall_seconds = 0.0
        self.last: Path | None = None
        self._writing: Future[bool] | None = None
        self._written = True
        if rank == 0:
            found, _ = files.newest_good(folder, hashes=False)
            self.last = found[0] if found else None
            # A rank leaves without waiting for it: the end of a run calls `wait`, or `finish` after an error.
            self._thread = ThreadPoolExecutor(1, "checkpoint")

    def save(self, engine: Stateful, meta: Meta) -> None:
        """Gather the state of `engine` and begin to write it. A collective: all ranks must call it.

        A disk that is full or fails is told on stderr and counted in `failed`, not raised; anything else that went
        wrong in the write before this one is raised here.
        """
        started = time.monotonic()
        self.wait()  # first: rank 0's memory is to hold the state once
        content = {"model.safetensors": engine.full_state("model")}
        for state in engine.state_names:
            tensors = engine.full_state(state)
            if state == "ema":
                content["ema.safetensors"] = tensors
            else:
                optimizer = content.setdefault("optimizer.safetensors", {})
                optimizer |= {f"{state}/{name}": value for name, value in tensors.items()}
        if self.rank == 0:  # in a thread of Python: safetensors' writer (0.8) releases the GIL
            self._writing = self._thread.submit(self._write, content, meta)
        self.stall_seconds = time.monotonic() - started

    def wait(self) -> bool:
        """Return when nothing is being written any more: True where the newest save is on disk. True on other ranks.

        Raises what went wrong in writing, other than the disk.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._written = False
            self._written = writing.result()
        return self._written

    def finish(self, kind: type[BaseException] | None, *_: object) -> None:
        """The run ends with an error, if with any: what is being written may still get on disk, in `_LAST_SECONDS`."""
        if kind is not None and self._writing is not None:
            with suppress(Exception):
                self._writing.result(_LAST_SECONDS)

    def _write(self, content: dict[str, Tensors], meta: Meta) -> bool:
        final = self.folder / f"step-{meta.step:08d}"
        temporary = self.folder / f".tmp-{final.name}"
        tensors = [tensor for part in content.values() for tensor in part.values()]
        needed = sum(tensor.nbytes for tensor in tensors) + _HEADER_BYTES * len(tensors)
        needed += len(meta.model_dump_json().encode()) + SPARE_BYTES
        del tensors
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.put_back(self.folder)
            for unfinished in self.folder.glob(".tmp-*"):
                files.remove(unfinished)
            if needed > _free_bytes(self.folder):
                raise OSError(errno.ENOSPC, f"no space left for its {decimal(needed)}")
            temporary.mkdir()
            records = {}
            for name in list(content):
                save_tensors(content.pop(name), temporary / name)
                records[name] = files.record(temporary / name)
            text = meta.model_copy(update={"files": records}).model_dump_json(indent=1)
            (temporary / META_FILE).write_text(text, encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                files.sync(path)
            if final.exists():  # of a step that is saved again
                os.replace(final, files.before(final))
            os.replace(temporary, final)
            files.sync(self.folder)
        except OSError as error:
            files.remove(temporary)
            files.put_back(self.folder)
            self.failed += 1
            self._tell_not_written(meta.step, error, needed)
            return False
        self.last = final
        self._tidy()
        return True

    def _tell_not_written(self, step: int, error: OSError, needed: int) -> None:
        reason = error.strerror or str(error)
        newest = f"the newest checkpoint is {self.last.name}" if self.last else "there is no checkpoint yet"
        advice = "see to the disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                short = needed - _free_bytes(self.folder)
                # What the file system calls free may still be over a quota, or out of inodes.
                advice = f"free {decimal(short)}" if short > 0 else "free space, inodes or quota"
        _warn(
            f"CHECKPOINT NOT WRITTEN: step {step}: {reason}; training goes on; {newest}; {advice} at {self.folder} "
            f"({self.failed} failed so far)"
        )

    def _tidy(self) -> None:
        """Point the links to the newest and the best, and delete what is no longer kept; damaged ones are left."""
        try:
            good = [path for path in files.step_folders(self.folder) if not files.verify(path, hashes=False)]
            metas = [read_meta(path) for path in good]
            paths = {meta.step: path for path, meta in zip(good, metas, strict=True)}
            best = files.best_of(metas, self.settings.best_metric)
            files.point(self.folder, "latest", self.last)
            files.point(self.folder, "best", paths[best.step] if best else None)
            files.remove(files.before(self.last or self.folder))
            for step in sorted(paths.keys() - files.to_keep(metas, self.settings)):
                gone = self.folder / f".tmp-gone-{paths[step].name}"
                os.replace(paths[step], gone)  # first: a half-deleted one must not have a checkpoint's name
                shutil.rmtree(gone)
        except (OSError, CheckpointError) as error:  # the latter: somebody else removed one meanwhile
            _warn(f"warning: older checkpoints in {self.folder} could not be removed: {error}")


def save_tensors(tensors: Tensors, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError where the system refuses; safetensors tells it in words only."""
    path.touch()
    mode = path.stat().st_mode & 0o777  # as the umask says; safetensors (0.8) lets nobody but its owner read a file
    try:
        save_file(tensors, path, None if metadata is None else dict(metadata))
        path.chmod(mode)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _warn(text: str) -> None:
    with suppress(OSError):  # stderr may be a file on the same full disk
        print(text, file=sys.stderr, flush=True)


def read_tensors(path: Path) -> Tensors:
    """A safetensors file, on the CPU."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove the folder {path.parent} to go on from the checkpoint before it"
        ) from None


def read_optimizer(path: Path) -> dict[str, Tensors]:
    """Optimizer states of a checkpoint folder: state -> parameter name -> tensor, as `Engine.load_state` takes them."""
    states: dict[str, Tensors] = {}
    for key, value in read_tensors(path / "optimizer.safetensors").items():
        state, _, name = key.partition("/")
        states.setdefault(state, {})[name] = value
    if (path / "ema.safetensors").exists():
        states["ema"] = read_tensors(path / "ema.safetensors")
    return states
