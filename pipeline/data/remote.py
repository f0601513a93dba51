"""Shards behind an fsspec URL (s3://, gs://, http://...): single images by range requests, whole shards by read-ahead.

No shard has to be whole for reading: what the cache does not hold yet is fetched image by image. (A plain LRU of shards
thrashes: one node alone would read 729 times its part, see tests/bench/RESULTS.md.) Meanwhile a thread of each process
downloads what is needed next into a folder that all processes of a host share (`shard_cache.py`).
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from data_prep.manifest import MANIFEST_NAME, ShardEntry
from data_prep.storage import DataPrepError
from pipeline.data.shard_cache import ShardCache

T = TypeVar("T")

_CHUNK_BYTES, _CHUNKS_IN_FLIGHT = 8 << 20, 8  # 64 MiB of memory; a stream of an object store gives 50 to 100 MB/s
_CONNECTIONS = 64  # botocore opens 10 unless told, fewer than a worker has threads
_REQUEST_SECONDS = 120  # a request that takes longer hangs: 64 MiB at 560 kB/s
# No attempt begins later: a read asks twice, and the loader takes 600 s of silence for a hang.
_PATIENCE_SECONDS = 240.0
_FIRST_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.5, 30.0
_IDLE_SECONDS = 2.0  # until the next look at the folder
_PAUSE_SECONDS = 60.0  # after a download that failed
_LASTING = (errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG)  # s3fs makes them of requests that a retry cannot mend
_HICCUPS = ("Timeout", "Connection", "Disconnected", "Payload", "IncompleteRead")  # in the stores' own exceptions
_ADVICE = {
    "is missing": f"it is named by the {MANIFEST_NAME} there; upload it, or rebuild",
    "may not be read": "give credentials that may, as its store wants them",
    "cannot be read": "see to the network and the store, then start the same run again",
}
# Every draw of a run is keyed, so that it resumes exactly: this one leaves the global generators alone.
_jitter = secrets.SystemRandom()


class RemoteError(DataPrepError):
    """A remote shard cannot be read. The message names its URL, what happened, and what to change."""


class RemoteShards:
    """The shards `entries` in the folder `url`. Any number of threads may read; processes forked after it was made have
    their own connections, thread and counters.

    cache: folder for whole shards, together at most cache_bytes for all processes of the host (0: no cache).
    retries: after the first attempt, with growing delays. Counters: bytes over the network, bytes read from the cache,
    reads, those of them by range request, retries. Raises RemoteError when the cache folder cannot be made.
    """

    def __init__(
        self, url: str, entries: Sequence[ShardEntry], dataset_id: str, cache: Path, cache_bytes: int, retries: int = 9
    ) -> None:
        self.url, self.entries, self.dataset_id = url.rstrip("/"), list(entries), dataset_id
        self.cache, self.cache_bytes, self.retries = Path(cache), cache_bytes, retries
        try:
            self._whole = ShardCache(self.cache, cache_bytes, dataset_id, self.entries)
        except OSError as error:
            raise RemoteError(f"cache folder {cache} cannot be made ({error}): name one that can be") from None
        self._of_parents: list[Any] = []
        self._start_anew()
        _alive.add(self)

    def _start_anew(self) -> None:
        self._lock, self._changed, self._closed = threading.Lock(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._system: Any = None
        self._checked: set[int] = set()  # shards whose remote size is right
        self._ahead: list[int] = []
        self._paused: dict[int, float] = {}  # shard: time until which it is not downloaded
        self._growing = self.cache_bytes > 0
        self.bytes_fetched = self.bytes_from_cache = self.reads = self.ranged_reads = self.retries_made = 0

    def _after_fork(self) -> None:
        self._whole.after_fork()
        # The finalizer of its file system would wait for an event loop that does not run in this process.
        self._of_parents.append(self._system)
        self._start_anew()

    def __reduce__(self) -> Any:
        return RemoteShards, (self.url, self.entries, self.dataset_id, self.cache, self.cache_bytes, self.retries)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from byte `offset`. Raises RemoteError, after the retries."""
        file = self._whole.open(shard)
        if file is not None:
            with suppress(OSError):
                data = file.read(offset, size)
                if len(data) == size:
                    self._count(reads=1, bytes_from_cache=size)
                    return data
        (data,) = self._fetch(shard, [(offset, size)]) if size else [b""]
        self._count(reads=1, ranged_reads=1)
        return data

    def read_beside(self, shard: int, suffix: str) -> bytes:
        """The whole file beside a shard whose name ends in `suffix` instead of .tar. Raises RemoteError."""

        def request(system: Any, path: str, limit: dict[str, Any]) -> bytes:
            return bytes(system.cat_file(path.removesuffix(".tar") + suffix, **limit))

        data = self._retrying(shard, request)
        self._count(bytes_fetched=len(data))
        return data

    def check(self, shard: int) -> None:
        """Raise RemoteError unless the shard is there and of its size, as far as its server tells."""
        self._check_size(shard)

    def ahead(self, shards: Sequence[int]) -> None:
        """These shards are needed next, in this order: replaces the former list. They are downloaded as far as the
        budget goes, and not evicted while on the list.
        """
        with self._lock:
            self._ahead = list(shards)
            if self._growing and self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._download_all, name="read-ahead", daemon=True)
                self._thread.start()
        self._changed.set()

    def close(self) -> None:
        """End the read-ahead, giving up a download under way."""
        self._closed.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self._whole.files.clear()

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def _fetch(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes at some (offset, size), fetched together."""
        self._check_size(shard)
        whole = self.entries[shard].bytes

        def request(system: Any, path: str, limit: dict[str, Any]) -> list[bytes]:
            starts, stops = [start for start, _ in ranges], [start + size for start, size in ranges]
            found = system.cat_ranges([path] * len(ranges), starts, stops, on_error="return", **limit)
            for data, (_, size) in zip(found, ranges, strict=True):
                if isinstance(data, Exception):
                    raise data
                if len(data) == whole > size:
                    raise RemoteError(
                        f"{self.url}/{self.entries[shard].file}: its server ignores byte ranges and sent the whole "
                        "file: serve it with one that knows them (an object store, nginx), or copy it to a local folder"
                    )
                if len(data) != size:
                    raise OSError(f"{len(data)} of {size} bytes came")
            return found

        found = self._retrying(shard, request)
        self._count(bytes_fetched=sum(map(len, found)))
        return found

    def _check_size(self, shard: int) -> None:
        if shard not in self._checked:
            found = self._retrying(shard, lambda system, path, limit: system.info(path, **limit).get("size"))
            wanted = self.entries[shard].bytes
            if found not in (None, wanted):  # not every web server tells
                raise RemoteError(
                    f"{self.url}/{self.entries[shard].file} has {found} bytes, {MANIFEST_NAME} says {wanted}: it is "
                    "truncated or of another build; upload it again, or rebuild"
                )
            self._checked.add(shard)

    def _retrying(self, shard: int, request: Callable[[Any, str, dict[str, Any]], T]) -> T:
        url = f"{self.url}/{self.entries[shard].file}"
        with self._lock:
            if self._system is None:
                self._system, self._root = _connect(self.url)
        limit = {"timeout": _REQUEST_SECONDS} if getattr(self._system, "async_impl", False) else {}
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        for attempt in range(self.retries + 1):
            try:
                return request(self._system, f"{self._root}/{self.entries[shard].file}", limit)
            except RemoteError:
                raise
            except Exception as error:  # each store has its own
                trouble, passes = _trouble(error)
                late = time.monotonic() > give_up_at
                if not passes or attempt == self.retries or late or self._closed.is_set():
                    text = f"{' '.join(str(error).split()) or type(error).__name__}, {attempt + 1} attempt(s)"
                    raise RemoteError(f"{url} {trouble} ({text}): {_ADVICE[trouble]}") from None
            self._count(retries_made=1)
            delay = min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**attempt)
            self._closed.wait(delay * _jitter.uniform(0.5, 1))
        raise AssertionError  # the last attempt returned or raised

    def _download_all(self) -> None:
        while not self._closed.is_set():
            self._changed.clear()
            try:
                if self._download_next():
                    continue
            except RemoteError:
                pass  # whoever reads that shard gets the error
            except OSError as error:
                if self._growing:
                    text = f"{self.cache} takes no more shards ({error}), they are read over the network; make room"
                    print(f"warning: {text}, or give a smaller budget", file=sys.stderr, flush=True)
                self._growing = False
            self._whole.files.forget_deleted()
            self._changed.wait(_IDLE_SECONDS)

    def _download_next(self) -> bool:
        """Download the first shard of the list that is neither here nor on its way; False where there is none."""
        self._whole.touch(self._ahead)
        with self._whole.locked():
            listed, now = self._ahead, time.monotonic()
            skipped = [shard for shard in listed if not self._growing or self._paused.get(shard, 0) > now]
            download = self._whole.claim(listed, skipped)
        if download is None:
            return False
        shard, size = download.shard, self.entries[download.shard].bytes
        with download:
            try:
                self._check_size(shard)
                download.allocate()
                for start in range(0, size, _CHUNK_BYTES * _CHUNKS_IN_FLIGHT):
                    if self._closed.is_set() or shard not in self._ahead:
                        return True  # nobody needs it any more
                    self._whole.touch(self._ahead)
                    stop = min(size, start + _CHUNK_BYTES * _CHUNKS_IN_FLIGHT)
                    ranges = [(at, min(_CHUNK_BYTES, stop - at)) for at in range(start, stop, _CHUNK_BYTES)]
                    for (at, _), data in zip(ranges, self._fetch(shard, ranges), strict=True):
                        download.write(at, data)
                download.finish()
            except (RemoteError, OSError):
                self._paused[shard] = time.monotonic() + _PAUSE_SECONDS
                raise
        return True


def _connect(url: str) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": _CONNECTIONS, **configured}
    try:
        # A cached instance may be one of the process that this one was forked from.
        return fsspec.url_to_fs(url, skip_instance_cache=True, **options)
    except (ImportError, ValueError) as error:
        raise RemoteError(f"{url} cannot be opened: {error}") from None


def _trouble(error: BaseException) -> tuple[str, bool]:
    """What an exception of a store means (a key of _ADVICE), and whether another attempt may help."""
    status = getattr(error, "status", None) or getattr(error, "code", None)  # aiohttp, gcsfs
    if isinstance(error, FileNotFoundError):
        # fsspec's HTTP says so of every failure to find the size; what it was stands behind.
        behind = _trouble(error.__cause__) if error.__cause__ else ("is missing", False)
        return behind if behind[1] or hasattr(error.__cause__, "status") else ("is missing", False)
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return "may not be read", False
    if isinstance(status, int) and 400 <= status < 600:
        return "is missing" if status in (404, 410) else "cannot be read", status >= 500 or status in (408, 425, 429)
    if isinstance(error, OSError) and error.errno not in _LASTING:
        return "cannot be read", True
    names = [each.__name__ for each in type(error).__mro__]
    return "cannot be read", any(hiccup in name for name in names for hiccup in _HICCUPS)


_alive: weakref.WeakSet[RemoteShards] = weakref.WeakSet()


def _after_fork() -> None:
    for shards in list(_alive):
        shards._after_fork()


os.register_at_fork(after_in_child=_after_fork)
