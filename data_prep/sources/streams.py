"""Forward readers of bytes: a range of a file, a bounded part of another reader; `inflate.py` has compressed files.

Damaged data never raises: reading ends early and `error` says why. SourceError is for what the user must mend first
(a file that is gone, no permission, a store that does not answer).
"""

from typing import Any, BinaryIO, Self

from data_prep.storage import DataPrepError, StorageError, behind, file_system, is_url, open_binary

LOCAL_BUFFER_BYTES = 1 << 18
JUMP_BUFFER_BYTES = 1 << 12
JUMP_BLOCK_BYTES = 1 << 16  # fetched at each jump, where a remote archive is only leafed through
PASSED_BLOCK_BYTES = 1 << 19  # of what cannot be passed over without reading it


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
            return read_away(self, size)
        size = max(0, min(size, self.end - self.position))
        self.position += size
        self._try(self._file.seek, self.position)
        return size

    def unread(self, data: bytes) -> None:
        self.position -= len(data)
        self._try(self._file.seek, self.position)

    def close(self) -> None:
        self._file.close()


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


def read_away(reader: Reader, size: int) -> int:
    """Pass over `size` bytes by reading them; returns how many there were."""
    left = size
    while left > 0 and (data := reader.read(min(left, PASSED_BLOCK_BYTES))):
        left -= len(data)
    return size - left
