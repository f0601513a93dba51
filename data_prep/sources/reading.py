"""What a worker reads: the images of one chunk of a source, and what else it meets there.

Workers read their chunk of a plain archive or a folder by themselves; of a compressed archive, which only one process
can read, they get a spool file (`spool.py`). Damaged content is an item of its own, never an exception.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.sources.inflate import Inflated, compression_of
from data_prep.sources.items import Damage, Item, Record, Stray
from data_prep.sources.layout import base_name, clean_name, reason_to_skip, synset_of_tar, wnid_of_image
from data_prep.sources.spool import read_spool
from data_prep.sources.streams import Bounded, FileRange, Reader, unreachable
from data_prep.sources.tar import Gap, Member, Tar
from data_prep.storage import Folder, file_system, is_url, open_binary
from data_prep.tar_header import BLOCK

REMOTE_BATCH_FILES, REMOTE_BATCH_BYTES = 64, 32 << 20  # fetched together: single requests would wait for each other


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a chunk. Bytes [offset, offset + length) of the file `path` are, by `kind`:

    tar: members, all images of class `wnid` (all of the file, where that is compressed)
    range: one image
    file: one image, the whole file
    salvage: what is left of a damaged archive, class by the images' names
    stray, damage, class: nothing to be read: a file left out, a part that is damaged, a class that may be empty

    name: of the image inside its class, else of the archive's member; detail: a stray's reason, a damage's words;
    cut: the archive ends before the member does.
    """

    path: str
    offset: int
    length: int
    kind: str
    wnid: str
    name: str
    split: str
    detail: str = ""
    cut: bool = False

    @property
    def read_bytes(self) -> int:
        """Bytes that reading this piece takes."""
        return 0 if self.kind in ("stray", "damage", "class") else self.length

    @property
    def images(self) -> int:
        """Known files in it; 0 for a tar, whose files are not counted beforehand."""
        return int(self.kind in ("range", "file", "stray"))

    @property
    def where(self) -> str:
        """For people: the archive's name, and the member's where it is inside one."""
        archive = base_name(self.path)
        return archive if self.name in ("", archive) else f"{archive}: {self.name}"


@dataclass(frozen=True)
class Chunk:
    """A part of a source of bounded size; `items()` reads it, in any process that reaches the source.

    bytes: of its content; classes: WordNet ids it touches, also those without images; spool: name of its file in
    `spool_folder`, None where the source is read directly (or where the chunk is done, and `pieces` is empty).
    """

    number: int
    split: str
    pieces: tuple[Piece, ...]
    bytes: int
    classes: tuple[str, ...]
    spool: str | None
    label: str
    spool_folder: Folder | None = None

    def __str__(self) -> str:
        return self.label

    def items(self) -> Iterator[Item]:
        """Its images, strays and damages, always in the same order. Raises SourceError when the source is gone."""
        if self.spool is not None:
            assert self.spool_folder is not None
            yield from read_spool(self.spool_folder.join(self.spool))
        else:
            yield from read_pieces(self.pieces)


def tar_items(reader: Reader, split: str, wnid: str, where: str) -> Iterator[Item]:
    """Items of the tar of one class; with `wnid` '' of a tar that is no class's: its images belong to none."""
    tar, start, met = Tar(reader), reader.position, False
    for entry in tar:
        met = True
        if isinstance(entry, Gap):
            if not (entry.cut and reader.cut):
                yield Damage(split, where, str(entry))
        elif entry.kind == "file" and (other := synset_of_tar(entry.name)) is not None:
            # Bytes are missing before, so the next class has moved into this one.
            yield Damage(split, where, f"bytes are missing before byte {entry.offset}, where {entry.name} begins")
            yield from tar_items(Bounded(reader, entry.size), split, other, where)
        elif entry.kind != "folder":
            yield from _item(tar, entry, split, wnid, where)
    if not met and reader.position - start < 2 * BLOCK and not reader.cut:
        size = reader.position - start
        yield Damage(split, where, f"the tar has {size} bytes and no end mark: it was cut short, or never written")


def salvage_items(reader: Reader, split: str, where: str) -> Iterator[Item]:
    """Items of a piece of an archive that begins nowhere in particular; the class is told by the images' names."""
    tar = Tar(reader, salvage=True)
    for entry in tar:
        if isinstance(entry, Gap):
            yield Damage(split, where, str(entry))
        elif entry.kind != "folder":
            wnid = wnid_of_image(entry.name)
            if wnid is None:
                yield Stray(split, entry.name, entry.size, "no_class")
            else:
                yield from _item(tar, entry, split, wnid, where)


def _item(tar: Tar, member: Member, split: str, wnid: str, where: str) -> Iterator[Item]:
    name = clean_name(member.name)
    reason = reason_to_skip(name, member.kind, member.size) or ("" if wnid else "no_class")
    if reason:
        yield Stray(split, f"{wnid or where.rpartition(': ')[2]}/{name}", member.size, reason)
        return
    data = tar.data()
    if data is not None:  # else the tar gives a Gap next
        yield Record(split, wnid, name, data)


def read_pieces(pieces: tuple[Piece, ...]) -> Iterator[Item]:
    """Items of all pieces, in their order."""
    opened: FileRange | None = None
    at = 0
    try:
        while at < len(pieces):
            piece = pieces[at]
            if piece.kind == "file":
                batch = _batch(pieces, at)
                yield from _read_files(batch)
                at += len(batch)
                continue
            at += 1
            if piece.kind == "stray":
                yield Stray(piece.split, piece.name, piece.length, piece.detail)
            elif piece.kind == "damage":
                yield Damage(piece.split, piece.where, piece.detail)
            elif piece.kind != "class":
                if opened is None or opened.path != piece.path:
                    if opened is not None:
                        opened.close()
                    opened = FileRange(piece.path, piece.offset, piece.length)
                opened.move(piece.offset, piece.length, cut=piece.cut)
                yield from _read_range(opened, piece)
    finally:
        if opened is not None:
            opened.close()


def _read_range(reader: FileRange, piece: Piece) -> Iterator[Item]:
    if piece.kind == "range":
        data = reader.read(piece.length)
        if len(data) == piece.length:
            yield Record(piece.split, piece.wnid, piece.name, data)
        elif reader.error is None:
            yield Damage(piece.split, piece.where, f"the archive ends before byte {piece.offset + piece.length}")
    elif piece.kind == "salvage":
        yield from salvage_items(reader, piece.split, piece.where)
    else:
        compression = compression_of(piece.path) if piece.offset == 0 else None
        if compression is not None:
            with Inflated(FileRange(piece.path), compression) as inflated:
                yield from tar_items(inflated, piece.split, piece.wnid, piece.where)
                if inflated.error is not None:
                    yield Damage(piece.split, piece.where, inflated.error)
        else:
            yield from tar_items(reader, piece.split, piece.wnid, piece.where)
    if reader.error is not None:
        yield Damage(piece.split, piece.where, reader.error)


def _batch(pieces: tuple[Piece, ...], start: int) -> tuple[Piece, ...]:
    stop, size = start + 1, pieces[start].length
    while (
        is_url(pieces[start].path)
        and stop < min(len(pieces), start + REMOTE_BATCH_FILES)
        and pieces[stop].kind == "file"
        and size + pieces[stop].length <= REMOTE_BATCH_BYTES
    ):
        size += pieces[stop].length
        stop += 1
    return pieces[start:stop]


def _read_files(pieces: tuple[Piece, ...]) -> Iterator[Item]:
    if is_url(pieces[0].path):
        found = _fetch([piece for piece in pieces if piece.length])
    for piece in pieces:
        try:
            if is_url(piece.path):
                data = found[piece.path] if piece.length else b""
            else:
                with open_binary(piece.path) as file:
                    data = file.read()
        except (FileNotFoundError, PermissionError) as error:
            raise unreachable(piece.path, error) from None
        except OSError as error:
            yield Damage(piece.split, f"{piece.wnid}/{piece.name}", f"the file cannot be read: {error}")
        else:
            yield Record(piece.split, piece.wnid, piece.name, data)


def _fetch(pieces: list[Piece]) -> dict[str, bytes]:
    if not pieces:
        return {}
    system = file_system(pieces[0].path)[0]
    # By ranges, not cat(): that one takes brackets in a name for a pattern.
    paths = [file_system(piece.path)[1] for piece in pieces]
    found: list[Any] = system.cat_ranges(paths, [0] * len(paths), [piece.length for piece in pieces], on_error="return")
    for piece, data in zip(pieces, found, strict=True):
        if isinstance(data, Exception):
            raise unreachable(piece.path, data)
    return dict(zip((piece.path for piece in pieces), found, strict=True))
