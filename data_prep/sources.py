"""Raw archives as one stream of images: a tar of per-synset tars, a folder of such tars, or a folder per
class.

Archives are read front to back and never unpacked to disk, so compressed ones (.tar.gz) work too and memory
does not grow with their size. Class names must be WordNet ids: they are what ties a class to other label
spaces.
"""

import hashlib
import heapq
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, NamedTuple

from data_prep.manifest import SYNSET_PATTERN, DataPrepError

READ_BLOCK_BYTES = 1 << 20
FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_BYTES = 1 << 16
MAX_STRAYS_BEFORE_CLASS = 20  # an archive of something else is noticed here, not after a terabyte

KIND_TAR = "tar of synset tars"
KIND_TAR_FOLDER = "folder of synset tars"
KIND_CLASS_FOLDER = "folder per class"

# What a damaged compressed or plain tar raises, depending on where the damage is.
_ARCHIVE_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


class SourceError(DataPrepError):
    """The source is missing, is not what it should be, or is damaged."""


class Record(NamedTuple):
    """One image as it lies in the source; `name` is its path inside its class."""

    wnid: str
    name: str
    data: bytes


class _DamagedTar(Exception):
    """Not a TarError: tarfile would take one raised inside it for the end of the archive."""


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header in mid-archive for its end, and the rest is lost without a word."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zero block that ends a tar
            raise
        except tarfile.HeaderError as error:
            if tar.offset == 0:
                raise
            raise _DamagedTar(f"{error} at byte {tar.offset}") from None


class Source:
    """A source of images. Iterate it to read every image once; then `classes` and `strays` are complete.

    classes: WordNet ids in the order met (also those without images); strays: files that belong to no class.
    Raises SourceError when the path is missing or is none of the three kinds.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.classes: list[str] = []
        self.strays: list[str] = []
        self.kind = self._detect_kind()

    def _detect_kind(self) -> str:
        if not self.path.exists():
            raise SourceError(f"source {self.path} does not exist: check the path")
        if self.path.is_file():
            if not tarfile.is_tarfile(self.path):
                raise SourceError(
                    f"source {self.path} is not a tar archive: give a tar of per-synset tars "
                    "(n01440764.tar, ...), a folder of such tars, or a folder with one folder per class"
                )
            return KIND_TAR
        entries = sorted(os.listdir(self.path))
        tars = [e for e in entries if e.endswith(".tar")]
        folders = [e for e in entries if (self.path / e).is_dir()]
        if any(_synset_of_tar(e) for e in tars):
            return KIND_TAR_FOLDER
        if any(SYNSET_PATTERN.fullmatch(e) for e in folders):
            return KIND_CLASS_FOLDER
        if not entries:
            raise SourceError(f"source {self.path} is an empty folder: no images found")
        hint = ""
        if {"train", "val"} & set(folders):
            hint = f" (try --source {self.path / 'train'} --val-source {self.path / 'val'})"
        raise SourceError(
            f"source {self.path} holds no class named by a WordNet id, such as n01440764 or n01440764.tar; "
            f"it holds {', '.join((folders or tars or entries)[:3])}: rename the classes{hint}"
        )

    def __iter__(self) -> Iterator[Record]:
        self.classes.clear()
        self.strays.clear()
        if self.kind == KIND_TAR:
            yield from self._read_tar_of_tars()
        elif self.kind == KIND_TAR_FOLDER:
            yield from self._read_folder_of_tars()
        else:
            yield from self._read_class_folders()
        if not self.classes:
            raise SourceError(
                f"{self.path} holds no per-synset tar (n01440764.tar, ...); it holds {self.strays[0]}"
                if self.strays
                else f"{self.path} is an empty archive: no images found"
            )

    def _read_tar_of_tars(self) -> Iterator[Record]:
        try:
            with tarfile.open(self.path, "r|*", tarinfo=_StrictTarInfo, bufsize=READ_BLOCK_BYTES) as outer:
                for member in outer:
                    if not member.isfile():
                        continue
                    wnid = _synset_of_tar(member.name)
                    if wnid is None:
                        self.strays.append(member.name)
                        if not self.classes and len(self.strays) > MAX_STRAYS_BEFORE_CLASS:
                            break
                        continue
                    file = outer.extractfile(member)
                    assert file is not None, "a regular member has content"
                    yield from self._read_synset_tar(wnid, file, f"{self.path}: {member.name}")
        except _DamagedTar as error:
            raise SourceError(f"{self.path} is damaged: {error}: fetch it again") from None
        except _ARCHIVE_ERRORS as error:
            raise SourceError(f"{self.path} is damaged or cut short: {error}: fetch it again") from None

    def _read_folder_of_tars(self) -> Iterator[Record]:
        for name in sorted(os.listdir(self.path)):
            wnid = _synset_of_tar(name)
            if wnid is None:
                self.strays.append(name)
                continue
            with open(self.path / name, "rb") as file:
                yield from self._read_synset_tar(wnid, file, str(self.path / name))

    def _read_synset_tar(self, wnid: str, file: IO[bytes], where: str) -> Iterator[Record]:
        if wnid not in self.classes[-1:]:
            self.classes.append(wnid)
        try:
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo, bufsize=READ_BLOCK_BYTES) as inner:
                for member in inner:
                    if member.isfile():
                        content = inner.extractfile(member)
                        assert content is not None, "a regular member has content"
                        yield Record(wnid, member.name.removeprefix("./"), content.read())
        except (_DamagedTar, *_ARCHIVE_ERRORS) as error:
            raise SourceError(f"{where} is damaged or cut short: {error}: fetch the archive again") from None

    def _read_class_folders(self) -> Iterator[Record]:
        for wnid in sorted(os.listdir(self.path)):
            folder = self.path / wnid
            if not SYNSET_PATTERN.fullmatch(wnid) or not folder.is_dir():
                self.strays.append(wnid)
                continue
            self.classes.append(wnid)
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                yield Record(wnid, str(file.relative_to(folder)), file.read_bytes())

    def fingerprint(self) -> str:
        """A hash that tells whether this is the source of an earlier build, without reading all of it.

        Of an archive: its size and 64 blocks spread over it (tar headers, with names and times, among them);
        of a folder: names and sizes of all files. Moving or copying the source does not change it.
        """
        digest = hashlib.sha256(self.kind.encode())
        if self.path.is_file():
            size_bytes = self.path.stat().st_size
            digest.update(str(size_bytes).encode())
            last = max(0, size_bytes - FINGERPRINT_BLOCK_BYTES)
            with open(self.path, "rb") as file:
                for block in range(FINGERPRINT_BLOCKS):
                    file.seek(last * block // (FINGERPRINT_BLOCKS - 1))
                    digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
        else:
            for file_path in sorted(p for p in self.path.rglob("*") if p.is_file()):
                line = f"{file_path.relative_to(self.path)}\0{file_path.stat().st_size}\n"
                digest.update(os.fsencode(line))
        return digest.hexdigest()[:32]


def _synset_of_tar(name: str) -> str | None:
    stem, extension = os.path.splitext(os.path.basename(name))
    return stem if extension == ".tar" and SYNSET_PATTERN.fullmatch(stem) else None


def name_hash(salt: str, wnid: str, name: str) -> int:
    """64 uniform bits that depend only on the arguments: the source of every random choice in data prep."""
    text = "\0".join((salt, wnid, name))
    # surrogateescape: file names need not be valid UTF-8.
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def limit_per_class(records: Iterable[Record], max_images: int) -> Iterator[Record]:
    """Keep `max_images` of each class, chosen by a hash of the name; holds so many images in memory, not
    more.

    Counts images before decoding: rejected ones are not replaced.
    """
    for _, group in groupby(records, key=lambda record: record.wnid):
        # A heap of the smallest hashes needs the largest on top: hence the minus; position settles ties.
        kept: list[tuple[int, int, Record]] = []
        for position, record in enumerate(group):
            item = (-name_hash("limit", record.wnid, record.name), -position, record)
            if len(kept) < max_images:
                heapq.heappush(kept, item)
            else:
                heapq.heappushpop(kept, item)
        for _, _, record in sorted(kept, key=lambda item: -item[1]):
            yield record
