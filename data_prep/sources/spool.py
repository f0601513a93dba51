"""The spool: chunks of an archive that only one process can read, each put in one file for a worker to read.

A spool file is the images' bytes one after another, an index of all items (JSON), and the index's size in 8 bytes.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.sources.items import Damage, Item, Record, Stray
from data_prep.sources.streams import SourceError
from data_prep.storage import TEMP_MARK, Folder, is_url, open_binary

TAIL_BYTES = 8


def write_spool(folder: Folder, name: str, items: Iterable[Item]) -> None:
    """Write items to the file `name`, which appears when it is whole; holds the index in memory, but no image.

    Raises SourceError when the folder cannot be written to.
    """
    try:
        if not folder.is_local:
            with folder.writing(name) as temp, open(temp, "wb") as file:
                _write(file, items)
            return
        # Not synced to the disk, for which the reader would have to wait: what a power cut takes is made again.
        path = Path(folder.join(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{name}{TEMP_MARK}{os.getpid()}")
        try:
            with open(temp, "wb") as file:
                _write(file, items)
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    except OSError as error:
        raise SourceError(f"spool file {folder.join(name)} cannot be written: {error}") from None


def _write(file: BinaryIO, items: Iterable[Item]) -> None:
    index: list[list[Any]] = []
    for item in items:
        if isinstance(item, Record):
            file.write(item.data)
            index.append(["Record", *item[:-1], len(item.data)])
        else:
            index.append([type(item).__name__, *item])
    # As ASCII: names that are not valid UTF-8 come back as they were.
    encoded = json.dumps(index).encode("ascii")
    file.write(encoded)
    file.write(len(encoded).to_bytes(TAIL_BYTES, "little"))


def read_spool(path: str) -> Iterator[Item]:
    """The items of a spool file, in order. Raises SourceError where it is missing or not whole."""
    try:
        with open_binary(path) if is_url(path) else open(path, "rb", buffering=0) as file:
            end = file.seek(0, 2) - TAIL_BYTES
            file.seek(end)
            size = int.from_bytes(file.read(TAIL_BYTES), "little")
            file.seek(end - size)
            index = json.loads(file.read(size))
            file.seek(0)
            # Unbuffered, where a file is local: an image is read in one call, without a copy between.
            for kind, *fields in index:
                if kind == "Record":
                    split, wnid, name, size = fields
                    yield Record(split, wnid, name, file.read(size))
                else:
                    yield {"Stray": Stray, "Damage": Damage}[kind](*fields)
    except (OSError, ValueError) as error:
        raise SourceError(f"spool file {path} cannot be read ({error}): run the same command again") from None
