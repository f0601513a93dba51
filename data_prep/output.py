"""The output folder of a build: one writer at a time, what is there already, what an interrupted build left."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.manifest import MANIFEST_NAME, TEMP_MARK, DataPrepError, Manifest, atomic_write, index_path

REJECTED_NAME = "rejected.jsonl"
OUR_FILES = re.compile(r"(train|val)-\d{6,}\.(tar|index\.npz)|(train|val)(-\d+)?\.beton|" + re.escape(REJECTED_NAME))


class ShardError(DataPrepError):
    """The output folder cannot be used for this build."""


@dataclass
class BuildResult:
    """`rejected`: one dict (split, wnid, name, reason) for each image or file that is in no shard."""

    manifest: Manifest
    already_built: bool
    rejected: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"another run is writing to {output}: wait for it, or choose another --output") from None
        except OSError:
            pass  # some network file systems cannot lock a folder; then nothing guards against two runs
        yield
    finally:
        os.close(folder)


def already_built(output: Path, name: str, wanted: dict[str, Any]) -> BuildResult:
    manifest = Manifest.load(output)

    def compared(dataset_name: str, settings: dict[str, Any]) -> dict[str, Any]:
        # A source may be moved or renamed: only its content counts.
        content = {key: (settings.get(key) or {}).get("fingerprint", "none") for key in ("source", "val_source")}
        return {"name": dataset_name, **settings, **content}

    there, now = compared(manifest.name, manifest.settings), compared(name, wanted)
    differing = [
        f"{key} ({there.get(key)} there, {now.get(key)} now)"
        for key in sorted(there.keys() | now.keys())
        if there.get(key) != now.get(key)
    ]
    if differing:
        raise ShardError(
            f"{output} holds a dataset built with other settings: {', '.join(differing)}: "
            "give --force to replace it, or choose another --output"
        )
    for split in manifest.splits.values():
        for entry in [*split.shards, *split.betons]:
            path = output / entry.file
            if (
                not path.is_file()
                or path.stat().st_size != entry.bytes
                or not (entry in split.betons or index_path(path).is_file())
            ):
                raise ShardError(
                    f"{path} or its index is missing or has another size than {MANIFEST_NAME} says: "
                    "give --force to build the dataset anew"
                )
    rejected_path = output / REJECTED_NAME
    lines = rejected_path.read_text().splitlines() if rejected_path.exists() else []
    return BuildResult(manifest, True, [json.loads(line) for line in lines])


def clear(output: Path) -> None:
    """Remove what an interrupted or earlier build left. The manifest goes first: without it nothing else counts."""
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    clear_unfinished(output)
    for path in output.iterdir():
        if OUR_FILES.fullmatch(path.name):
            path.unlink()


def clear_unfinished(output: Path) -> None:
    """Remove the temporary files of killed runs; only for the sole writer of the folder."""
    for path in output.glob(f".*{TEMP_MARK}*"):
        path.unlink()


@contextmanager
def spill_file(output: Path) -> Iterator[BinaryIO]:
    path = output / f".spill{TEMP_MARK}{os.getpid()}"
    with open(path, "w+b") as spill:
        path.unlink()  # the open file lives on without a name, so that not even a kill leaves it behind
        yield spill


def write_rejected(output: Path, rejected: list[dict[str, str]]) -> None:
    with atomic_write(output / REJECTED_NAME) as file:
        for row in rejected:
            file.write(json.dumps(row).encode() + b"\n")
