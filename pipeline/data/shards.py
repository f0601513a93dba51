"""Random access to the samples of WebDataset shards through their indexes: one seek a sample, no scan, no unpacking.

Nothing but file sizes is looked at before the first sample: an index is read when a sample of its shard is asked for,
so that a set of 14 million samples opens at once and in little memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_prep.manifest import Manifest, ManifestError, ShardIndex, dataset_folder, index_path
from data_prep.storage import Folder, is_url
from pipeline.config.data import Data
from pipeline.data.order import MicroBatch
from pipeline.data.remote import RemoteError, RemoteShards
from pipeline.data.shard_cache import OPEN_SHARDS, OpenFile, OpenFiles

_KEPT_INDEXES = 512  # about 0.16 MB each at 10,000 samples; the windows of 64 lanes are in half as many shards
_REQUESTS = 32  # in flight at a time, of each process: an object store answers in tens of milliseconds


class DataError(ValueError):
    """A shard or sample cannot be read. The message names the file, the key, and what to do."""


class EncodedReader(Protocol):
    """The encoded images and labels of a split, whatever it is read by. `fetch_threads`: see ShardReader; `remote`: not
    None where images come over a network; `random_access`: whether any sample can be had at any time.
    """

    random_access: bool

    @property
    def remote(self) -> object: ...

    @property
    def fetch_threads(self) -> int | None: ...

    @property
    def shard_count(self) -> int: ...

    def __len__(self) -> int: ...

    def encoded_many(self, samples: Sequence[int] | np.ndarray) -> Sequence[bytes | DataError]: ...

    def encoded_batch(self, micro: MicroBatch) -> Sequence[bytes | DataError]: ...

    def label_of(self, sample: int, data: bytes) -> int: ...

    def damaged(self, sample: int, reason: object, data: bytes = b"") -> DataError: ...

    def ahead(self, shards: Sequence[int]) -> None: ...

    def close(self) -> None: ...


class _Index(NamedTuple):
    """A ShardIndex without its keys, which are three quarters of it and only messages name."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


class ShardReader:
    """The encoded images and labels of one split, by sample id (the position in the concatenated shards).

    Made before data workers are forked, used by any number of threads. Local shards are read in place, remote ones go
    through `RemoteShards`. Raises ManifestError or DataError at once when a local shard is missing or not of the size
    that the manifest says.
    """

    random_access = True
    remote: RemoteShards | None

    def __init__(self, data: Data, manifest: Manifest, split: str) -> None:
        self.path, self.manifest = dataset_folder(data.folder), manifest
        self.shards = manifest.shards_folder(self.path)  # of tars of others perhaps elsewhere than their indexes
        self.entries = manifest.split(split).shards
        self._ends = np.cumsum([entry.samples for entry in self.entries])
        self._indexes: dict[int, _Index] = {}
        self._loading = [threading.Lock() for _ in range(_REQUESTS)]
        self._files = OpenFiles(OPEN_SHARDS)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self.remote = None
        if is_url(self.shards):
            self.remote = RemoteShards(
                self.shards,
                self.entries,
                manifest.dataset_id,
                data.cache_folder.expanduser(),
                int(data.cache_gb * 1e9),
            )
        else:
            for entry in self.entries:
                check_file(Path(self.shards) / entry.file, entry.bytes)
                check_file(Path(self.path) / index_path(entry.file), None)

    @property
    def shard_count(self) -> int:
        return len(self.entries)

    @property
    def fetch_threads(self) -> int | None:
        """How many threads fetch batches (0: as many as are under way); None: those that decode read by themselves."""
        return 0 if self.remote is not None else None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def encoded(self, sample: int) -> bytes:
        """The file of a sample's image, as it was stored. Raises DataError."""
        shard, place, index = self._find(sample)
        offset, size = int(index.offsets[place]), int(index.sizes[place])
        try:
            if self.remote is not None:
                return self.remote.read(shard, offset, size)
            data = self._file(shard).read(offset, size)
        except RemoteError as error:
            raise DataError(str(error)) from None
        except OSError as error:
            raise DataError(f"{self.describe(sample)} cannot be read: {error}") from None
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

    def encoded_batch(self, micro: MicroBatch) -> Sequence[bytes | DataError]:
        """`encoded_many` of a micro-batch's samples."""
        return self.encoded_many(micro.samples)

    def label_of(self, sample: int, data: bytes) -> int:
        """`label`; other readers have it with the bytes."""
        return self.label(sample)

    def label(self, sample: int) -> int:
        """The class number of a sample in the manifest's `synsets`."""
        _, place, index = self._find(sample)
        return int(index.labels[place])

    def ahead(self, shards: Sequence[int]) -> None:
        """Say which shards are needed next, soonest first; remote ones are fetched into the cache meanwhile."""
        if self.remote is not None:
            self.remote.ahead(shards)

    def close(self) -> None:
        """End the read-ahead of a remote folder."""
        if self.remote is not None:
            self.remote.close()

    def damaged(self, sample: int, reason: object, data: bytes = b"") -> DataError:
        """The error for a sample whose bytes were read but are no image."""
        return DataError(
            f"{self.describe(sample)} does not decode: {reason}; `python -m data_prep verify {self.path}` lists what "
            f"does not, data.on_bad_sample=skip trains without"
        )

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages."""
        shard, place, _ = self._find(sample)
        key = str(self._load_index(shard).keys[place])
        return f"shard {self.shards}/{self.entries[shard].file}: sample {key!r} (id {sample})"

    def _encoded_or_error(self, sample: int) -> bytes | DataError:
        try:
            return self.encoded(sample)
        except DataError as error:
            return error

    def _find(self, sample: int) -> tuple[int, int, _Index]:
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        index = self._indexes.get(shard)
        if index is None:
            # All threads come to a new shard at once: one of them reads its index.
            with self._loading[shard % len(self._loading)]:
                index = self._indexes.get(shard)
                if index is None:
                    whole = self._load_index(shard)
                    index = _Index(whole.offsets, whole.sizes.astype(np.int32), whole.labels)
                    self._keep(shard, index)
        return shard, sample - int(self._ends[shard]) + self.entries[shard].samples, index

    def _keep(self, shard: int, index: _Index) -> None:
        with self._lock:
            self._indexes[shard] = index
            if len(self._indexes) > _KEPT_INDEXES:
                del self._indexes[next(iter(self._indexes))]  # the oldest: lanes go on from shard to shard

    def _load_index(self, shard: int) -> ShardIndex:
        entry = self.entries[shard]
        try:
            beside = self.remote is not None and self.path == self.shards
            data = self.remote.read_beside(shard, ".index.npz") if self.remote is not None and beside else None
            return self.manifest.load_index(self.path, entry, data)
        except (ManifestError, RemoteError) as error:
            raise DataError(str(error)) from None

    def _file(self, shard: int) -> OpenFile:
        file = self._files.get(shard)
        if file is None:
            file = OpenFile(os.open(f"{self.shards}/{self.entries[shard].file}", os.O_RDONLY))
            file = self._files.add(shard, file)
        return file

    def _after_fork(self) -> None:
        if self._pid != os.getpid():  # threads do not follow into a forked worker
            self._pid, self._pool = os.getpid(), None


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
    """`check_file` for the shards of a remote folder: all by one listing, or, where its server has none, the first and
    the last of each split. Raises DataError.
    """
    folder, indexes = Folder(manifest.shards_folder(data.folder)), Folder(dataset_folder(data.folder))
    sizes: dict[str, int | None] = {}
    gone = "is named by dataset.json but missing: copy it there or rebuild"
    for place in {folder.url: folder, indexes.url: indexes}.values():
        try:
            sizes |= place.sizes()
        except Exception:  # each store has its own; web servers often forbid it
            continue
    for name, split in manifest.splits.items():
        if not any(entry.file in sizes for entry in split.shards):
            remote = ShardReader(data, manifest, name).remote
            assert remote is not None
            try:
                for shard in {0, len(split.shards) - 1} if split.shards else ():
                    remote.check(shard)
            except RemoteError as error:
                raise DataError(str(error)) from None
            continue
        for entry in split.shards:
            for file, wanted in ((entry.file, entry.bytes), (str(index_path(entry.file)), None)):
                if file not in sizes:
                    raise DataError(f"{(folder if file == entry.file else indexes).join(file)} {gone}")
                if wanted is not None and sizes[file] not in (None, wanted):
                    raise DataError(
                        f"{folder.join(file)} has {sizes[file]} bytes, dataset.json says {wanted}: it is truncated or "
                        f"of another build; copy it again or rebuild"
                    )
