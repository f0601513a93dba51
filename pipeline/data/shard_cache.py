"""Whole shards in a folder that all processes of a host share, and the files that a process keeps open.

DIGEST-train-000000.tar              whole; its time of change says when it was last read, or on somebody's list
.DIGEST-train-000000.tar.tmp-PID-X   on its way, of full length from the start; locked while its writer lives
.lock                                held to look at the folder and to change what is in it
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Self

from data_prep.manifest import ShardEntry
from data_prep.storage import TEMP_MARK

OPEN_SHARDS = 128  # of each process; stays below the usual limit of 1,024 open files
_DOWNLOADS_PER_HOST = 8
_TOUCH_SECONDS, _SPARED_SECONDS = 5.0, 30.0  # what any process has touched in the last 30 s is not evicted
_CACHED_NAME = re.compile(r"[0-9a-f]{24}-.+")  # the folder may hold other files: they are nothing to us


class OpenFile:
    """Closed when its last reader lets go, so that no reader finds its descriptor to be another file's."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.touched = descriptor, 0.0

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from byte `offset`; fewer at the end of the file."""
        return os.pread(self.descriptor, size, offset)


class OpenFiles:
    """The `maximum` files asked for last, by number. For any number of threads."""

    def __init__(self, maximum: int) -> None:
        self._maximum, self._lock = maximum, threading.Lock()
        self._files: OrderedDict[int, OpenFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, number: int) -> OpenFile | None:
        """The file, where it is among them."""
        with self._lock:
            if number in self._files:
                self._files.move_to_end(number)
            return self._files.get(number)

    def add(self, number: int, file: OpenFile) -> OpenFile:
        """`file`, or the one that another thread has added meanwhile."""
        with self._lock:
            file = self._files.setdefault(number, file)
            self._files.move_to_end(number)
            if len(self._files) > self._maximum:
                self._files.popitem(last=False)
            return file

    def forget_deleted(self) -> None:
        """Let go of deleted files: each takes its room on the disk for as long as one process has it open."""
        with self._lock:
            for number in [at for at, file in self._files.items() if not os.fstat(file.descriptor).st_nlink]:
                del self._files[number]

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._files.clear()


class ShardCache:
    """The shards `entries` of the data set `dataset_id`, by their place in `entries`, as far as `folder` holds them.

    All processes of the host together keep at most max_bytes in it (0: there is no folder, and nothing in it). Any
    number of threads may `open`. Raises OSError when the folder cannot be made, or no longer be used.
    """

    def __init__(self, folder: Path, max_bytes: int, dataset_id: str, entries: Sequence[ShardEntry]) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._bytes = [entry.bytes for entry in entries]
        contents = [f"{dataset_id} {entry.file} {entry.sha256} {entry.bytes}" for entry in entries]
        self._names = [
            f"{sha256(content.encode()).hexdigest()[:24]}-{entry.file}"
            for content, entry in zip(contents, entries, strict=True)
        ]
        if max_bytes:
            folder.mkdir(parents=True, exist_ok=True)
        self._start_anew()

    def _start_anew(self) -> None:
        self.files = OpenFiles(OPEN_SHARDS)
        self.held: set[int] = set()  # descriptors with a lock

    def after_fork(self) -> None:
        """To be called in the child."""
        for descriptor in self.held:
            os.close(descriptor)  # else the parent's locks would outlive it
        self._start_anew()

    def path(self, shard: int) -> Path:
        """Where a shard is, or would be."""
        return self.folder / self._names[shard]

    def open(self, shard: int) -> OpenFile | None:
        """A whole shard, or None; says to all processes that it is in use."""
        if not self.max_bytes:
            return None
        file = self.files.get(shard)
        if file is None:
            try:
                file = OpenFile(os.open(self.path(shard), os.O_RDONLY))
            except OSError:
                return None
            if os.fstat(file.descriptor).st_size != self._bytes[shard]:
                return None
            self.files.forget_deleted()
            file = self.files.add(shard, file)
        if time.monotonic() - file.touched > _TOUCH_SECONDS:
            file.touched = time.monotonic()
            with suppress(OSError):
                os.utime(file.descriptor)
        return file

    def touch(self, shards: Sequence[int]) -> None:
        """Tell the other processes that this one will read them."""
        for shard in shards:
            with suppress(OSError):
                os.utime(self.path(shard))

    def claim(self, listed: Sequence[int], skipped: Collection[int]) -> Download | None:
        """The first of the shards `listed` that is not `skipped`, neither here nor on its way, after making room for
        it: by eviction of what has long not been read, and is not listed. None where there is none, or no room. Called
        with the folder `locked`.
        """
        whole, under_way = self._contents()
        wanted = {self._names[shard]: shard for shard in listed}
        spared_from = time.time() - _SPARED_SECONDS
        idle = [name for name in whole if name not in wanted and whole[name].st_mtime < spared_from]
        idle.sort(key=lambda name: whole[name].st_mtime, reverse=True)
        used = sum(under_way.values()) + sum(stat.st_size for stat in whole.values())
        for name, shard in wanted.items():
            size = self._bytes[shard]
            here = name in under_way or (name in whole and whole[name].st_size == size)
            if here or shard in skipped:
                continue
            room = self.max_bytes - used + sum(whole[each].st_size for each in idle)
            if size > room or len(under_way) >= _DOWNLOADS_PER_HOST:
                break  # not a later, smaller one either: what it took would be missing here
            while used + size > self.max_bytes:
                used -= whole[idle[-1]].st_size
                (self.folder / idle.pop()).unlink(missing_ok=True)
            return Download(self, shard, size)
        return None

    def _contents(self) -> tuple[dict[str, os.stat_result], dict[str, int]]:
        """(whole shards, bytes of those on their way) by name; removes what dead writers have left."""
        whole, under_way = {}, {}
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                name, mark, _ = entry.name.partition(TEMP_MARK)
                if mark and _CACHED_NAME.fullmatch(name[1:]) and not _is_abandoned(entry.path):
                    under_way[name[1:]] = entry.stat().st_size
                elif _CACHED_NAME.fullmatch(name):
                    whole[name] = entry.stat()
        return whole, under_way

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else claims, evicts or finishes meanwhile."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        self.held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would not, while a forked child has it open
        finally:
            self.held.discard(descriptor)
            os.close(descriptor)


class Download:
    """A shard on its way into the cache; as a context manager removed at the end, unless it was finished."""

    def __init__(self, cache: ShardCache, shard: int, size: int) -> None:
        self.shard, self._cache, self._size = shard, cache, size
        path = cache.path(shard)
        self._temp = path.with_name(f".{path.name}{TEMP_MARK}{os.getpid()}-{secrets.token_hex(4)}")
        self._descriptor = os.open(self._temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        cache.held.add(self._descriptor)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        os.ftruncate(self._descriptor, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._temp.unlink(missing_ok=True)
        self._cache.held.discard(self._descriptor)
        os.close(self._descriptor)

    def allocate(self) -> None:
        """Take the room on the disk, where its file system can. Raises OSError where there is none."""
        try:
            os.posix_fallocate(self._descriptor, 0, self._size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError unless all could be written."""
        if os.pwrite(self._descriptor, data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish(self) -> None:
        """Everything is written: from now on it is a whole shard, for all processes."""
        os.fsync(self._descriptor)
        with self._cache.locked():
            self._temp.rename(self._cache.path(self.shard))


def _is_abandoned(path: str) -> bool:
    """Whether a file's writer is dead, in which case the file is removed."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    os.unlink(path)
    return True
