"""Random access to the samples of WebDataset shards through their indexes: one seek a sample, no scan, no unpacking."""

from __future__ import annotations

import os
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.manifest import Manifest

_OPEN_SHARDS = 128  # of each process; stays below the usual limit of 1,024 open files


class DataError(ValueError):
    """A shard or sample cannot be read. The message names the file, the key, and what to do."""


class ShardImages:
    """The encoded images of one split, by sample id (the position in the concatenated shards).

    `labels` is int32 (samples,), the class numbers of the manifest's `synsets`.
    Raises ManifestError or DataError at once when a shard or index is missing or not of the size the manifest says.
    """

    def __init__(self, directory: Path | str, manifest: Manifest, split: str) -> None:
        self.directory = Path(directory)
        self.manifest = manifest
        self.entries = manifest.split(split).shards
        for entry in self.entries:
            check_file(self.directory / entry.file, entry.bytes)
        indexes = [manifest.load_index(self.directory, entry) for entry in self.entries]
        self._starts = np.cumsum([0] + [len(index) for index in indexes])
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self.labels = np.concatenate([index.labels for index in indexes])  # int32 (samples,)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, sample: int) -> bytes:
        """The JPEG bytes of a sample."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        offset, size = int(self._offsets[sample]), int(self._sizes[sample])
        data = os.pread(self._file(shard), size, offset)
        if len(data) != size:
            raise DataError(f"{self.describe(sample)}: the shard ends after {len(data)} of the image's {size} bytes")
        return data

    def image(self, sample: int) -> Image.Image:
        """The decoded RGB image of a sample. Raises DataError naming shard and key when it does not decode."""
        try:
            with Image.open(BytesIO(self.encoded(sample))) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            if isinstance(error, DataError):
                raise
            reason = "no image data" if "cannot identify" in str(error) else str(error)
            raise DataError(
                f"{self.describe(sample)} does not decode: {reason}; the shard is damaged, rebuild it"
            ) from None

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        index = self.manifest.load_index(self.directory, self.entries[shard])
        key = str(index.keys[sample - self._starts[shard]])
        return f"shard {self.directory / self.entries[shard].file}: sample {key!r} (id {sample})"

    def _file(self, shard: int) -> int:
        # Each worker process opens its own: `pread` needs no shared position, but a forked copy must not close ours.
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.directory / self.entries[shard].file, os.O_RDONLY)
        return self._files[shard]


def load_labels(directory: Path, manifest: Manifest, split: str) -> np.ndarray:
    """Class numbers by sample id, int32 (samples,), from the shards' indexes; the shards themselves may be absent."""
    return np.concatenate([manifest.load_index(directory, entry).labels for entry in manifest.split(split).shards])


def check_file(path: Path, size_bytes: int) -> None:
    """Raise DataError unless `path` exists with the size that the manifest says."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(
            f"{path} is named by {path.parent}/dataset.json but missing: copy it there or rebuild"
        ) from None
    if found != size_bytes:
        raise DataError(
            f"{path} has {found} bytes, {path.parent}/dataset.json says {size_bytes}: it is truncated or of another "
            f"build; copy it again or rebuild"
        )
