"""A source's files, in a folder or in a zip as it is published: listed once, then read one by one by any process."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.storage import DataPrepError

MAX_FILE_BYTES = 256 << 20  # of an image or a mask: one that is uncompressed, at the bound of `images`
HIDDEN = ("__MACOSX", "@eaDir")


class DenseSourceError(DataPrepError):
    """The source is not what it should be, or not whole."""


class UnreadableFile(ValueError):
    """One file of the source cannot be read."""


class Stat(NamedTuple):
    """What a listing tells of a file; `mark` is a zip's checksum of its content, 0 in a folder."""

    bytes: int
    mark: int


@dataclass(frozen=True)
class Tree:
    """The files below `root` ("" for all) of `path`, which is a folder or a zip."""

    path: str
    root: str = ""

    @property
    def is_zip(self) -> bool:
        return os.path.isfile(self.path)

    def __str__(self) -> str:
        return f"{self.path}{'!' if self.is_zip else ''}{f'/{self.root}' if self.root else ''}"

    def inside(self, folder: str) -> "Tree":
        """A folder of this one."""
        return Tree(self.path, f"{self.root}/{folder}".strip("/"))

    def files(self) -> dict[str, Stat]:
        """All files, by name below `root`, sorted; hidden ones are left out. Raises DenseSourceError."""
        found = _zip_files(self) if self.is_zip else dict(_folder_files(os.path.join(self.path, self.root), ""))
        parts = {name: name.split("/") for name in found}
        shown = [name for name in found if not any(part.startswith(".") or part in HIDDEN for part in parts[name])]
        return {name: found[name] for name in sorted(shown)}

    def has_folder(self, folder: str) -> bool:
        """Whether there is a folder of that name with anything in it."""
        if not self.is_zip:
            path = Path(self.path, self.root, folder)
            return path.is_dir() and any(path.iterdir())
        prefix = f"{self.root}/{folder}/".lstrip("/")
        return any(name.startswith(prefix) for name in _zip_names(self.path))

    @contextmanager
    def opened(self) -> Iterator["Reader"]:
        """Read files of it."""
        if not self.is_zip:
            yield Reader(self, None)
            return
        with _zip(self.path) as archive:
            yield Reader(self, archive)


class Reader:
    """Reads files of a tree by their names in `Tree.files`."""

    def __init__(self, tree: Tree, archive: zipfile.ZipFile | None):
        self.tree, self._archive = tree, archive

    def read(self, name: str, most: int = MAX_FILE_BYTES) -> bytes:
        """All bytes of a file. Raises UnreadableFile where it cannot be read, or has more than `most` bytes."""
        inner = f"{self.tree.root}/{name}".lstrip("/")
        try:
            if self._archive is None:
                path = Path(self.tree.path, inner)
                size = path.stat().st_size
            else:
                member = self._archive.getinfo(inner)
                size = member.file_size
            if size > most:
                raise UnreadableFile(f"{size} bytes, more than {most}")
            return path.read_bytes() if self._archive is None else self._archive.read(member)
        except (
            OSError,
            KeyError,
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            # RuntimeError is of an encrypted member, NotImplementedError of an unknown compression.
            text = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableFile(text) from None


def _folder_files(folder: str, prefix: str) -> Iterator[tuple[str, Stat]]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DenseSourceError(
            f"{folder} cannot be listed ({error.strerror}): see to its place and permissions"
        ) from None
    for entry in entries:
        name = os.fsencode(f"{prefix}{entry.name}").decode("utf-8", "backslashreplace")
        if entry.is_dir():
            yield from _folder_files(entry.path, f"{name}/")
        elif entry.is_file():
            yield name, Stat(entry.stat().st_size, 0)


def _zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DenseSourceError(f"{path} is not a whole zip ({error}): fetch it again") from None


def _zip_names(path: str) -> list[str]:
    with _zip(path) as archive:
        return archive.namelist()


def _zip_files(tree: Tree) -> dict[str, Stat]:
    prefix = f"{tree.root}/".lstrip("/")
    with _zip(tree.path) as archive:
        return {
            member.filename.removeprefix(prefix): Stat(member.file_size, member.CRC)
            for member in archive.infolist()
            if not member.is_dir() and member.filename.startswith(prefix)
        }
