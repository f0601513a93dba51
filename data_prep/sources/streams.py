"""Forward readers of bytes: a range of a file, a compressed file, a bounded part of another reader.

Damaged data never raises: reading ends early and `error` says why. SourceError is for what the user must mend first
(a file that is gone, no permission, a store that does not answer).
"""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Self

from data_prep.storage import DataPrepError, StorageError, behind, file_system, is_url, open_binary

LOCAL_BUFFER_BYTES = 1 << 18
JUMP_BUFFER_BYTES = 1 << 12
JUMP_BLOCK_BYTES = 1 << 16  # fetched at each jump, where a remote archive is only leafed through
# zlib gives nothing for the input block that it fails on, so a small one loses little.
COMPRESSED_BLOCK_BYTES = 1 << 16
INFLATED_BLOCK_BYTES = 1 << 19  # measured: blocks of 1 MiB, which malloc maps anew, are a third slower
MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0"}


class SourceError(DataPrepError):
    """The source is missing, is not what it should be, or cannot be reached."""


class Reader:
    """Reads forward. `position` is the next byte, `end` the one after the last where that is known.

    error: why reading ended early, None where it did not; cut: the end came early and is reported by another.
    """

    position: int = 0
    end: int | None = None
    error: str | None = None

    @property
    def cut(self) -> bool:
        return self.error is not None

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        raise NotImplementedError

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns how many there were."""
        raise NotImplementedError

    def unread(self, data: bytes) -> None:
        """Put back what was read last."""
        raise NotImplementedError

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def unreachable(path: str, error: BaseException) -> SourceError:
    """The error for a file that cannot be opened or fetched."""
    error = behind(error)
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{path} does not exist: check the path")
    if isinstance(error, PermissionError):
        return SourceError(f"{path} must not be read by this user: change its permissions, or the credentials")
    return SourceError(f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")


class FileRange(Reader):
    """Bytes [offset, offset + length) of a file, local or remote; positions count from the file's beginning.

    jumping: most of it will be skipped, in large steps (decides only how much is fetched at once).
    """

    def __init__(
        self, path: str, offset: int = 0, length: int | None = None, *, cut: bool = False, jumping: bool = False
    ):
        self.path = path
        self._remote = is_url(path)
        try:
            self._file = self._open(jumping)
            self._size = None if length is not None else self._measure()
        except StorageError:
            raise
        except Exception as error:  # each remote file system has its own
            raise unreachable(path, error) from None
        self.move(offset, length, cut=cut)

    def _open(self, jumping: bool) -> BinaryIO:
        if not self._remote:
            return open(self.path, "rb", buffering=JUMP_BUFFER_BYTES if jumping else LOCAL_BUFFER_BYTES)
        if not jumping:
            return open_binary(self.path)
        system, inner = file_system(self.path)
        return system.open(inner, "rb", block_size=JUMP_BLOCK_BYTES, cache_type="readahead")

    def _measure(self) -> int | None:
        try:
            size = self._file.seek(0, 2)
        except ValueError:  # fsspec's for a server that only streams
            return None
        self._file.seek(0)
        return size

    def move(self, offset: int, length: int | None = None, *, cut: bool = False) -> None:
        """Make this the reader of another range of the same file."""
        self.position = offset
        self.end = self._size if length is None else offset + length
        self.error = None
        self._cut = cut
        if offset or self._file.seekable():
            self._try(self._file.seek, offset)

    @property
    def cut(self) -> bool:
        return self._cut or self.error is not None

    def _try(self, function: Any, argument: int) -> Any:
        try:
            return function(argument)
        except Exception as error:
            # A disk's bad sector is damage, which stays; a network's trouble goes, and must not count as such.
            if self._remote or not isinstance(error, OSError):
                raise unreachable(self.path, error) from None
            self.error = f"{self.path} cannot be read at byte {self.position}: {error}"
            return None

    def read(self, size: int) -> bytes:
        if self.end is not None:
            size = min(size, self.end - self.position)
        if size <= 0 or self.error:
            return b""
        data: bytes = self._try(self._file.read, size) or b""
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        if self.end is None:
            return _read_away(self, size)
        size = max(0, min(size, self.end - self.position))
        self.position += size
        self._try(self._file.seek, self.position)
        return size

    def unread(self, data: bytes) -> None:
        self.position -= len(data)
        self._try(self._file.seek, self.position)

    def close(self) -> None:
        self._file.close()


class Inflated(Reader):
    """The content of a compressed file; a thread inflates ahead by one block.

    `position` counts inflated bytes, `source.position` compressed ones.
    """

    def __init__(self, source: FileRange, compression: str):
        self.source = source
        self._blocks = _gunzip(source) if compression == "gzip" else _decompress(source, compression)
        self._trouble: str | None = None
        self._block, self._at = b"", 0
        self._thread = ThreadPoolExecutor(1, "inflate")
        self._ahead: Future[bytes] | None = self._thread.submit(self._inflate)

    def _inflate(self) -> bytes:
        parts, size = [], 0
        try:
            while size < INFLATED_BLOCK_BYTES:
                part = next(self._blocks, None)
                if part is None:
                    self._trouble = self._trouble or self.source.error
                    break
                parts.append(part)
                size += len(part)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            self._trouble = f"compressed data is broken or cut short near byte {self.source.position}: {error}"
        return b"".join(parts)

    def _next(self) -> bytes:
        if self._ahead is None:
            return b""
        block = self._ahead.result()
        if block and self._trouble is None:
            self._ahead = self._thread.submit(self._inflate)
        else:
            self._ahead, self.error = None, self._trouble
        return block

    def read(self, size: int) -> bytes:
        start = self._at
        self._at += size
        if self._at <= len(self._block):
            self.position += size
            return self._block[start : self._at]
        parts = [self._block[start:]]
        missing = size - len(parts[0])
        self._block, self._at = b"", 0
        while missing > 0 and (block := self._next()):
            self._block, self._at = block, min(missing, len(block))
            parts.append(block[: self._at])
            missing -= self._at
        data = b"".join(parts)
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        return _read_away(self, size)

    def unread(self, data: bytes) -> None:
        self._block, self._at = data + self._block[self._at :], 0
        self.position -= len(data)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self.source.close()


class Bounded(Reader):
    """The next `size` bytes of another reader."""

    def __init__(self, parent: Reader, size: int):
        self._parent = parent
        self.position = parent.position
        self.end = parent.position + size
        self._short = False

    @property
    def cut(self) -> bool:
        return self._short

    def read(self, size: int) -> bytes:
        size = min(size, self.end - self.position)  # type: ignore[operator]
        data = self._parent.read(size)
        self._short |= len(data) < size
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        size = min(size, self.end - self.position)  # type: ignore[operator]
        skipped = self._parent.skip(size)
        self._short |= skipped < size
        self.position += skipped
        return skipped

    def unread(self, data: bytes) -> None:
        self._parent.unread(data)
        self.position -= len(data)


def compression_of(path: str) -> str | None:
    """gzip, bzip2 or xz by the first bytes of the file; None for another."""
    with FileRange(path, jumping=True) as file:
        start = file.read(8)
    return next((name for name, magic in MAGIC.items() if start.startswith(magic)), None)


def open_reader(path: str, compression: str | None, *, jumping: bool = False) -> Reader:
    """A reader of the whole content of a file."""
    file = FileRange(path, jumping=jumping)
    return file if compression is None else Inflated(file, compression)


def _read_away(reader: Reader, size: int) -> int:
    left = size
    while left > 0 and (data := reader.read(min(left, INFLATED_BLOCK_BYTES))):
        left -= len(data)
    return size - left


def _gunzip(file: FileRange) -> Iterator[bytes]:
    # Not gzip.GzipFile: before Python 3.12 it feeds zlib by 8 KiB, and what it has inflated is lost at an error.
    inflate, begun = zlib.decompressobj(wbits=31), False
    while data := file.read(COMPRESSED_BLOCK_BYTES):
        while data:
            begun = True
            yield inflate.decompress(data, INFLATED_BLOCK_BYTES)  # zeros inflate a thousandfold: hence the bound
            data = inflate.unconsumed_tail
            if inflate.eof:
                data = inflate.unused_data.lstrip(b"\0")
                inflate, begun = zlib.decompressobj(wbits=31), False
                if not data.startswith(MAGIC["gzip"][: len(data)]):
                    return  # as gzip does: what follows the last member is not ours
    yield inflate.flush()
    if begun and not inflate.eof and file.error is None:
        raise EOFError("the end is missing")


def _decompress(file: FileRange, compression: str) -> Iterator[bytes]:
    opener: Any = {"bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[compression]
    with opener(file) as content:
        while data := content.read1(INFLATED_BLOCK_BYTES):
            yield data
