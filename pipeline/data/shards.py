"""Random access to the samples of WebDataset shards through their indexes: one seek a sample, no scan, no unpacking.

Nothing but file sizes is looked at before the first sample: an index is read when a sample of its shard is asked for,
so that a set of 14 million samples opens at once and in little memory.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.manifest import Manifest, ShardIndex, index_path
from data_prep.storage import Folder
from pipeline.config import Data
from pipeline.data.remote import RemoteError, RemoteShards
from pipeline.data.shard_cache import OPEN_SHARDS, OpenFile, OpenFiles

_KEPT_INDEXES = 512  # about 0.6 MB each at 10,000 samples
_REQUESTS = 32  # in flight at a time, of each process: an object store answers in tens of milliseconds


class DataError(ValueError):
    """A shard or sample cannot be read. The message names the file, the key, and what to do."""


class ShardReader:
    """The encoded images and labels of one split, by sample id (the position in the concatenated shards).

    Made before data workers are forked, used by any number of threads. `local` reads with `pread`; a remote folder goes
    through `RemoteShards`. Raises ManifestError or DataError at once when a local shard is missing or not of the size
    that the manifest says.
    """

    def __init__(self, data: Data, manifest: Manifest, split: str) -> None:
        self.path, self.manifest = data.path.rstrip("/"), manifest
        self.entries = manifest.split(split).shards
        self._ends = np.cumsum([entry.samples for entry in self.entries])
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._files = OpenFiles(OPEN_SHARDS)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self.remote: RemoteShards | None = None
        if data.is_remote:
            self.remote = RemoteShards(
                self.path,
                self.entries,
                manifest.dataset_id,
                data.cache_folder.expanduser(),
                int(data.cache_gb * 1e9),
            )
        else:
            for entry in self.entries:
                check_file(Path(self.path) / entry.file, entry.bytes)
                check_file(Path(self.path) / index_path(entry.file), None)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def encoded(self, sample: int) -> bytes:
        """The file of a sample's image, as it was stored. Raises DataError."""
        shard, place, index = self._find(sample)
        offset, size = int(index.offsets[place]), int(index.sizes[place])
        if self.remote is not None:
            try:
                return self.remote.read(shard, offset, size)
            except RemoteError as error:
                raise DataError(str(error)) from None
        data = self._file(shard).read(offset, size)
        if len(data) != size:
            raise DataError(f"{self.describe(sample)}: the shard ends after {len(data)} of the image's {size} bytes")
        return data

    def encoded_many(self, samples: Sequence[int] | np.ndarray) -> list[bytes | DataError]:
        """`encoded` of several; remote ones are fetched at the same time. An error stands in its sample's place."""
        if self.remote is None:
            return [self._encoded_or_error(int(sample)) for sample in samples]
        self._after_fork()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="shards")
        return list(self._pool.map(self._encoded_or_error, map(int, samples)))

    def label(self, sample: int) -> int:
        """The class number of a sample in the manifest's `synsets`."""
        _, place, index = self._find(sample)
        return int(index.labels[place])

    def ahead(self, shards: Sequence[int]) -> None:
        """Say which shards are needed next, soonest first; remote ones are fetched into the cache meanwhile."""
        if self.remote is not None:
            self.remote.ahead(shards)

    def damaged(self, sample: int, reason: object) -> DataError:
        """The error for a sample whose bytes were read but are no image."""
        return DataError(f"{self.describe(sample)} does not decode: {reason}; the shard is damaged, rebuild it")

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages."""
        shard, place, index = self._find(sample)
        return f"shard {self.path}/{self.entries[shard].file}: sample {str(index.keys[place])!r} (id {sample})"

    def _encoded_or_error(self, sample: int) -> bytes | DataError:
        try:
            return self.encoded(sample)
        except DataError as error:
            return error

    def _find(self, sample: int) -> tuple[int, int, ShardIndex]:
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        with self._lock:
            index = self._indexes.get(shard)
            if index is not None:
                self._indexes.move_to_end(shard)
        if index is None:
            index = self.manifest.load_index(self.path, self.entries[shard])
            with self._lock:
                self._indexes[shard] = index
                if len(self._indexes) > _KEPT_INDEXES:
                    self._indexes.popitem(last=False)
        return shard, sample - int(self._ends[shard]) + self.entries[shard].samples, index

    def _file(self, shard: int) -> OpenFile:
        file = self._files.get(shard)
        if file is None:
            file = OpenFile(os.open(f"{self.path}/{self.entries[shard].file}", os.O_RDONLY))
            file = self._files.add(shard, file)
        return file

    def _after_fork(self) -> None:
        if self._pid != os.getpid():  # threads do not follow into a forked worker
            self._pid, self._pool = os.getpid(), None


def load_labels(path: str, manifest: Manifest, split: str) -> np.ndarray:
    """Class numbers by sample id, int32 (samples,), from the shards' indexes; the shards themselves may be absent."""
    return np.concatenate([manifest.load_index(path, entry).labels for entry in manifest.split(split).shards])


def check_file(path: Path, size_bytes: int | None) -> None:
    """Raise DataError unless `path` exists with the size that the manifest says (None: any)."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(
            f"{path} is named by {path.parent}/dataset.json but missing: copy it there or rebuild"
        ) from None
    if size_bytes is not None and found != size_bytes:
        raise DataError(
            f"{path} has {found} bytes, {path.parent}/dataset.json says {size_bytes}: it is truncated or of another "
            f"build; copy it again or rebuild"
        )


def check_remote_files(data: Data, manifest: Manifest) -> None:
    """`check_file` for all shards of a remote folder, by one listing. Raises DataError."""
    folder = Folder(data.path)
    sizes = folder.sizes()
    for split in manifest.splits.values():
        for entry in split.shards:
            for name, wanted in ((entry.file, entry.bytes), (str(index_path(entry.file)), None)):
                if name not in sizes:
                    raise DataError(
                        f"{folder.join(name)} is named by dataset.json but missing: copy it there or rebuild"
                    )
                if wanted is not None and sizes[name] != wanted:
                    raise DataError(
                        f"{folder.join(name)} has {sizes[name]} bytes, dataset.json says {wanted}: it is truncated or "
                        f"of another build; copy it again or rebuild"
                    )
