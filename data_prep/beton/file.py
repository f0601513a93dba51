"""The layout of a `.beton`, in FFCV's own record types:

    header, descriptions of the fields          1 KB a field
    table of samples                            32 bytes each: mode, width, height, address; label; sample id
    pages                                       image data; an image lies within one page
    table of allocations                        24 bytes each: sample, address, size

FFCV is imported only inside the functions: it is optional.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.storage import DataPrepError

FIELD_NAMES = ("image", "label", "sample")
JPG, RAW = 0, 1  # FFCV's IMAGE_MODES
MAX_SIDE_PX = 65_535  # 16 bits
MIN_PAGE_BYTES = 8 << 20  # FFCV's default: some 150 images of 50 kB, so little is lost at the end of a page
MAX_PAGE_BYTES = 1 << 31  # the next power of two does not fit FFCV's 32-bit field
TABLE_BYTES = 56  # of a sample, in both tables


class BetonError(DataPrepError):
    """FFCV is missing, or a `.beton` cannot be written from these shards."""


def require_ffcv() -> None:
    """Raise BetonError, saying how to get it, when FFCV cannot be imported."""
    try:
        import ffcv.reader
        import ffcv.writer  # noqa: F401
    except ImportError as error:
        raise BetonError(
            f"FFCV cannot be imported ({error}): `make setup` builds it or prints the system packages it needs; "
            "--format webdataset works without it"
        ) from None


def page_size(largest_bytes: int) -> int:
    """Bytes of a page that holds the largest image. Raises BetonError where FFCV has no such page."""
    page = max(MIN_PAGE_BYTES, 1 << max(0, largest_bytes - 1).bit_length())
    if page > MAX_PAGE_BYTES:
        raise BetonError(
            f"the largest image has {largest_bytes} bytes, more than an FFCV page can hold: build the shards with a "
            "smaller --short-side, or the .beton with a maximum resolution"
        )
    return page


class BetonFile:
    """Writes a `.beton`, one sample after the other; whole only after `close`."""

    def __init__(self, path: Path, samples: int, page_bytes: int):
        from ffcv.fields import IntField, RGBImageField
        from ffcv.types import (
            ALLOC_TABLE_TYPE,
            CURRENT_VERSION,
            TYPE_ID_HANDLER,
            FieldDescType,
            HeaderType,
            get_metadata_type,
        )
        from ffcv.utils import align_to_page

        handlers = [RGBImageField(), IntField(), IntField()]
        self.row_type, self._allocation_type = get_metadata_type(handlers), ALLOC_TABLE_TYPE
        self._samples, self._written, self._page_bytes = samples, 0, page_bytes
        self._header = np.zeros(1, HeaderType)
        self._header["version"], self._header["num_fields"] = CURRENT_VERSION, len(handlers)
        self._header["page_size"], self._header["num_samples"] = page_bytes, samples
        type_ids = {handler: number for number, handler in TYPE_ID_HANDLER.items()}
        fields = np.zeros(len(handlers), FieldDescType)  # none of these fields has arguments
        for row, name, handler in zip(fields, FIELD_NAMES, handlers, strict=True):
            row["type_id"] = type_ids[type(handler)]
            row["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        rows_start = HeaderType.itemsize + fields.nbytes
        # Two handles: rows and pages are both written in order, each in its own region.
        self._pages = open(path, "wb")  # noqa: SIM115  # closed by __exit__
        self._rows = open(path, "r+b")  # noqa: SIM115
        self._pages.write(bytes(HeaderType.itemsize) + fields.tobytes())
        self._rows.seek(rows_start)
        self._next = int(align_to_page(rows_start + samples * self.row_type.itemsize, page_bytes))
        self._pages.seek(self._next)
        # The last region: its place is known only at the end.
        self._allocations = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
        self.max_width = self.max_height = 0

    def add(self, mode: int, width: int, height: int, data: bytes, label: int) -> None:
        """Append the next sample. Raises BetonError when FFCV cannot hold it."""
        if not 0 < len(data) <= self._page_bytes or not 0 < max(width, height) <= MAX_SIDE_PX:
            raise BetonError(f"FFCV cannot hold an image of {width} x {height} pixels in {len(data)} bytes")
        left = -self._next % self._page_bytes
        if len(data) > left:
            self._pages.write(bytes(left))
            self._next += left
        row = np.zeros(1, self.row_type)
        row["f0"] = (mode, width, height, self._next)
        row["f1"], row["f2"] = label, self._written
        self._rows.write(row.tobytes())
        allocation = np.zeros(1, self._allocation_type)
        allocation[0] = (self._written, self._next, len(data))
        self._allocations.write(allocation.tobytes())
        self._pages.write(data)
        self._next += len(data)
        self._written += 1
        self.max_width, self.max_height = max(self.max_width, width), max(self.max_height, height)

    def finish(self) -> None:
        """Write what stands at the end, and the header, which says where that is."""
        if self._written != self._samples:
            raise BetonError(f"the shards hold {self._written} samples, not {self._samples}: rebuild with --force")
        self._pages.write(bytes(-self._next % self._page_bytes))  # FFCV reads whole pages
        self._header["alloc_table_ptr"] = self._pages.tell()
        self._allocations.seek(0)
        while block := self._allocations.read(1 << 20):
            self._pages.write(block)
        self._pages.flush()
        self._rows.seek(0)
        self._rows.write(self._header.tobytes())
        self._rows.flush()

    def __enter__(self) -> "BetonFile":
        return self

    def __exit__(self, *exception: object) -> None:
        # Closing flushes, which fails again on a full disk: the first error is the one to tell.
        for file in (self._pages, self._rows, self._allocations):
            try:
                file.close()
            except OSError:
                if exception[0] is None:
                    raise


def open_reader(path: str | Path) -> Any:
    """FFCV's Reader of a file, with its tables mapped rather than read: they have 56 bytes a sample.

    Raises BetonError where the file is not a whole `.beton`.
    """
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType

    class MappedReader(Reader):
        def read_metadata(self) -> None:
            offset = HeaderType.itemsize + FieldDescType.itemsize * int(self.num_fields)
            count = int(self.num_samples)
            self.metadata = np.memmap(self._fname, self.metadata_type, "r", offset, (count,))

        def read_allocation_table(self) -> None:
            offset = int(self.header["alloc_table_ptr"])
            count = (os.path.getsize(self._fname) - offset) // ALLOC_TABLE_TYPE.itemsize
            self.alloc_table = np.memmap(self._fname, ALLOC_TABLE_TYPE, "r", offset, (count,))

    try:
        reader = MappedReader(str(path))
    except Exception as error:  # index, value, key, type, assertion and Unicode errors, depending on the damage
        raise BetonError(f"{path} is not a whole FFCV file: {error or type(error).__name__}") from None
    names = list(reader.field_names)
    if names != list(FIELD_NAMES):
        raise BetonError(f"{path} has the fields {names}, not {list(FIELD_NAMES)}")
    return reader
