"""Folders and files, on this machine or behind an fsspec URL (s3://bucket/folder, gs://, ...), in one way.

Whatever is written gets its final name only when it is whole: locally by temporary name, fsync and rename; on an
object store by one upload, which shows nothing until it is complete.
"""

import argparse
import errno
import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

TEMP_MARK = ".tmp-"  # unfinished files are named `.NAME.tmp-PID`; readers never look at them
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
# Stores on which an upload appears as a whole under its final name; on others it is renamed after it.
WHOLE_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory", "oci"}


class DataPrepError(ValueError):
    """A mistake the user can correct; its text is one line: what, where, what to change."""


class StorageError(DataPrepError):
    """A URL cannot be used: unknown scheme, missing package, or no access."""


class LostWorkError(DataPrepError):
    """Unfinished work of a build was changed or removed by somebody else; it can only begin anew."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; when the block ends well, the file the block wrote
    there is made durable and renamed to `path`. When the block raises, the temporary file is removed and
    `path` is as it was.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # renamed over, /dev/null would be a file from then on
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    # Two hosts may write the same file, under the same process id.
    temp = path.with_name(f".{path.name}{TEMP_MARK}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield temp
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    # The rename itself is durable only once the folder is on disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """As `atomic_path`, but yields the open binary file."""
    with atomic_path(path) as temp, open(temp, "wb") as file:
        yield file


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, made with its parents; when the block ends well it is renamed to `path`, in
    place of what was there; of a link, what it leads to is replaced. When the block raises, the folder is removed and
    `path` is as it was. Of several that are written at once the last one stays. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    mark = f"{TEMP_MARK}{os.getpid()}-{os.urandom(4).hex()}"
    temp, before = path.with_name(f".{path.name}{mark}"), path.with_name(f".{path.name}{mark}-before")
    temp.mkdir(parents=True)
    try:
        yield temp
        for file in temp.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        while True:
            with suppress(FileNotFoundError):
                os.rename(path, before)
            try:
                os.rename(temp, path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    with suppress(FileNotFoundError):
                        os.rename(before, path)
                    raise
                # Another process has put its own there meanwhile: that is as much "before" as this one.
                shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def user_path(text: str) -> str:
    """A path as a user gives it, also in quotes: ~ and ~name at its beginning are home folders. The type of every
    option that takes a path.
    """
    return text if is_url(text) else os.path.expanduser(text)


def refuse_unwritable(folder: "Folder", advice: str) -> None:
    """Raise StorageError, which ends in `advice`, where nothing can be written into a local folder, or where it cannot
    be made. A store behind a URL tells only when it is written to.
    """
    if not folder.is_local:
        return
    import tempfile  # every command imports this file, and few need it

    path = os.path.abspath(folder.url)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=f".probe{TEMP_MARK}"):
            pass
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk has its own advice
            raise StorageError(f"{folder.url} cannot be written to ({path}: {error.strerror}): {advice}") from None


class OncePath(argparse._StoreAction):
    """Refuses a path option that is given twice: argparse takes the last one, and drops the first without a word."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if option and self.type is user_path:
            given = namespace.__dict__.setdefault("_given", set())
            if self.dest in given:
                parser.error(f"{option} is given twice: give it once")
            given.add(self.dest)
        super().__call__(parser, namespace, values, option)


def number(minimum: int, maximum: int | None = None) -> "type[int]":
    """The type of options that take an integer within bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"{value} is not in {minimum}..{'' if maximum is None else maximum}")
        return value

    parse.__name__ = "int"  # argparse puts it into "invalid int value"
    return parse  # type: ignore[return-value]  # argparse takes any callable


def share(text: str) -> float:
    """The type of options that take 0.05 or 5%."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def place(path: str, option: str) -> str:
    """A URL as it is, a path made absolute: workers may run in another folder."""
    if not path:
        raise DataPrepError(f"{option} is empty: is the variable in your command set?")
    return path if is_url(path) else os.path.abspath(path)


def is_url(path: str | Path) -> bool:
    """Whether `path` is an fsspec URL rather than a local path."""
    return "://" in str(path)


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it. Raises StorageError when fsspec cannot make one."""
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{url} cannot be opened: {error}") from None


def open_binary(path: str | Path) -> BinaryIO:
    """Open a file for reading, seekable, local or remote."""
    if not is_url(path):
        return open(path, "rb")
    system, inner = file_system(str(path))
    # Sequential reads dominate: one block ahead, nothing kept.
    return system.open(inner, "rb", block_size=8 << 20, cache_type="readahead")


def behind(error: BaseException) -> BaseException:
    """What a store really said: fsspec's HTTP takes every failure, also that to connect, for a file that is missing."""
    cause = error.__cause__
    missing = cause is None or getattr(cause, "status", None) in (404, 410)
    return error if not isinstance(error, FileNotFoundError) or missing or cause is None else cause


def _unreachable(url: str, error: BaseException) -> StorageError:
    text = " ".join(str(error).split()) or type(error).__name__
    return StorageError(f"{url} cannot be read ({text}): see to the address, the credentials and the network")


class Folder:
    """A folder of files, local or remote. Names may hold slashes; a remote folder needs not exist beforehand."""

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        self.is_local = not is_url(url)
        self._system: Any = None
        self._root = self.url
        if not self.is_local:
            self._system, self._root = file_system(self.url)

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def __reduce__(self) -> Any:
        return Folder, (self.url,)  # file systems hold connections: each process makes its own

    def join(self, name: str) -> str:
        """Path or URL of a file of this folder."""
        return f"{self.url}/{name}"

    def folder(self, name: str) -> "Folder":
        """A folder inside this one."""
        return Folder(self.join(name))

    def _inner(self, name: str) -> str:
        return f"{self._root}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file, 0 where a web server does not tell, or None where there is none. Raises StorageError where
        a store does not say, OSError where a disk does not.
        """
        try:
            if self._system is None:
                return os.stat(self.join(name)).st_size
            return int(self._system.info(self._inner(name))["size"] or 0)
        except (FileNotFoundError, NotADirectoryError) as error:
            # Web servers refuse (403) what is not there, too.
            real = behind(error)
            if real is not error and not 402 <= getattr(real, "status", 500) < 500:
                raise _unreachable(self.join(name), real) from None
            return None
        except Exception as error:  # each store has its own
            if self.is_local:
                raise
            raise _unreachable(self.join(name), error) from None

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self.size(name) is not None

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names of the files right in this folder that match; unfinished files are never among them."""
        return sorted(name for name in self.sizes() if fnmatch.fnmatchcase(name, pattern))

    def sizes(self) -> dict[str, int | None]:
        """Bytes by name of the files right in this folder, by one listing; unfinished files are never among them.

        None where the listing does not tell, as that of a web server. Raises StorageError where it is a file, or where
        a store cannot be listed.
        """
        found: dict[str, int | None]
        if self._system is None:
            try:
                found = {entry.name: entry.stat().st_size for entry in os.scandir(self.url) if entry.is_file()}
            except FileNotFoundError:
                return {}
            except NotADirectoryError:
                raise StorageError(f"{self.url} is a file: give the folder that its files are in") from None
        else:
            self._system.invalidate_cache()
            try:
                listed = self._system.ls(self._root, detail=True)
            except FileNotFoundError as error:
                if behind(error) is not error:
                    raise _unreachable(self.url, behind(error)) from None
                return {}
            except Exception as error:  # each store has its own
                raise _unreachable(self.url, error) from None
            found = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listed if entry["type"] == "file"}
        return {name: size for name, size in found.items() if TEMP_MARK not in name}

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        if self._system is None:
            return Path(self.join(name)).read_bytes()
        return bytes(self._system.cat_file(self._inner(name)))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes [start, stop) of files, given as (name, start, stop); remote ranges are fetched together.

        Raises OSError when a file is shorter than asked.
        """
        if self._system is None:
            found = []
            for name, start, stop in ranges:
                with open(self.join(name), "rb") as file:
                    found.append(os.pread(file.fileno(), stop - start, start))
        else:
            paths = [self._inner(name) for name, _, _ in ranges]
            found = self._system.cat_ranges(paths, [r[1] for r in ranges], [r[2] for r in ranges], on_error="raise")
        for (name, start, stop), data in zip(ranges, found, strict=True):
            if len(data) != stop - start:
                raise OSError(f"{self.join(name)} ends before byte {stop}")
        return found

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a local temporary path; what the block wrote there appears under `name` when the block ends well."""
        if self._system is None:
            path = Path(self.join(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temp:
                yield temp
            return
        import tempfile

        with tempfile.TemporaryDirectory(prefix="data_prep-") as scratch:
            temp = Path(scratch) / "file"
            yield temp
            target = self._inner(name)
            protocol = self._system.protocol
            protocols = {protocol} if isinstance(protocol, str) else set(protocol)
            if protocols & WHOLE_OBJECT_STORES:
                self._system.put_file(str(temp), target)
            else:
                self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                hidden = f"{target}{TEMP_MARK}{os.getpid()}"
                self._system.put_file(str(temp), hidden)
                self._system.mv(hidden, target)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file as `writing` does."""
        with self.writing(name) as temp:
            temp.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self._system is None:
            Path(self.join(name)).unlink(missing_ok=True)
        else:
            with suppress(FileNotFoundError):
                self._system.rm_file(self._inner(name))

    def remove_all(self) -> None:
        """Remove the folder with everything in it."""
        if self._system is None:
            shutil.rmtree(self.url, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                self._system.rm(self._root, recursive=True)
