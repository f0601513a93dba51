"""A source of images, and how it is cut into chunks: by its content alone, so that any number of workers, and any
number of restarts, get the same ones.
"""

import hashlib
from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from data_prep.sources.items import Damage, Item, Record, Stray
from data_prep.sources.layout import base_name, is_lost_image
from data_prep.sources.reading import Chunk, Piece
from data_prep.sources.refusal import Refusal
from data_prep.sources.spool import write_spool
from data_prep.sources.streams import FileRange, SourceError
from data_prep.storage import Folder

FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 64, 1 << 16


class Met(NamedTuple):
    """A class that is there, be it without images."""

    split: str
    wnid: str


Event = Item | Met


@dataclass(frozen=True)
class Census:
    """What is known without reading the images. classes: None where only reading tells; payload_bytes: of the images,
    or of the compressed file; overhead_bytes: beside each image in there; exact: else from a sample of the classes.
    """

    classes: int | None
    payload_bytes: int
    overhead_bytes: int
    exact: bool

    def estimate_images(self, images: int, data_bytes: int) -> int:
        """Images in all, from a sample of so many images of so many bytes together."""
        return round(self.payload_bytes / (data_bytes / images + self.overhead_bytes)) if images else 0


@dataclass(frozen=True)
class LostImages:
    """Images that belong to no class, of so many images; the paths of those. `of` 0: only reading tells."""

    count: int = 0
    of: int = 0
    names: Sequence[str] = ()


class Source:
    """A source of images; `open_source` makes one.

    path: as given; kind: one of KINDS; split: of records that do not say theirs; splits: those that records can have;
    seekable: workers read their chunks by themselves; total_bytes: of the file or files, None where unknown.
    """

    kind = ""
    wanted = "images"  # what it must hold, for messages
    splits: tuple[str, ...]
    seekable = True
    total_bytes: int | None = None

    def __init__(self, path: str, split: str):
        self.path = path
        self.split = split
        self.splits = (split,)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return base_name(self.path)

    @property
    def description(self) -> str:
        """One line for the user."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash that tells whether this is the source of an earlier build, without reading all of it.

        Of an archive: its size and 64 blocks spread over it; of a folder: names and sizes of all files and a block of
        64 of them. Moving or copying the source does not change it.
        """
        raise NotImplementedError

    def census(self) -> Census:
        """What is known of the source without reading it."""
        raise NotImplementedError

    def lost_images(self) -> LostImages:
        """What listing alone tells of images without a class, which a sample of the classes does not see."""
        return LostImages()

    def split_folders(self) -> list[str]:
        """Names of the folders of its splits, where listing tells them."""
        return []

    def known_classes(self, split: str) -> set[str]:
        """Classes of a split, as far as a listing or the labels tell; empty where only reading does."""
        return set()

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        """Of a seekable source: its parts in order, none longer than `max_bytes` where that can be."""
        raise NotImplementedError

    def events(self) -> Iterator[Event]:
        """Of a source that is not seekable: all of it, in order."""
        raise NotImplementedError

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        """Of a seekable source: some images each from places all over it."""
        raise NotImplementedError

    def sample(self, images: int, seed: int = 0) -> Iterator[Item]:
        """About `images` images, and what else is met, from all over the source; from its beginning where it is not
        seekable.
        """
        if self.seekable:
            for items in self.sample_pieces(images, seed):
                yield from items
            return
        seen = 0
        with closing(self.events()) as events:  # type: ignore[type-var]
            for event in events:
                if not isinstance(event, Met):
                    yield event
                    seen += is_image(event)
                if seen >= images:
                    return

    def chunks(
        self, max_bytes: int, max_images: int, spool: Folder | None, done: Container[int] = ()
    ) -> Iterator[Chunk]:
        """The chunks, in order, made one by one as they are taken.

        A chunk is closed where the next piece would take it over `max_bytes`, or over `max_images` as far as they can
        be counted beforehand. Where the source is not seekable, its items are put into a file of `spool` before the
        chunk is given, but for chunks in `done`, which are given without items.
        Raises SourceError when this is no such source after all.
        """
        if self.seekable:
            yield from self._packed(max_bytes, max_images)
        else:
            yield from self._spooled(max_bytes, max_images, spool, done)

    def _packed(self, max_bytes: int, max_images: int) -> Iterator[Chunk]:
        held: list[Piece] = []
        number = size = images = 0
        check = Refusal(self.path, self.wanted, self.split)
        for piece in self.pieces(max_bytes, max_images):
            stray = Stray(piece.split, piece.name, 0, piece.detail) if piece.kind == "stray" else None
            check.see(piece.split, piece.wnid, stray, damaged=piece.kind == "damage")
            full = size + piece.read_bytes > max_bytes or images + piece.images > max_images
            if held and (full or piece.split != held[0].split):
                yield self._chunk(number, held)
                number, held, size, images = number + 1, [], 0, 0
            held.append(piece)
            size += piece.read_bytes
            images += piece.images
        check.at_end()
        if held:
            yield self._chunk(number, held)

    def _chunk(self, number: int, pieces: list[Piece]) -> Chunk:
        return Chunk(
            number=number,
            split=pieces[0].split,
            pieces=tuple(pieces),
            bytes=sum(piece.read_bytes for piece in pieces),
            classes=tuple(dict.fromkeys(piece.wnid for piece in pieces if piece.wnid)),
            spool=None,
            label=self._label(_piece_label(pieces[0]), _piece_label(pieces[-1])),
        )

    def _label(self, first: str, last: str) -> str:
        return f"{first} .. {last} of {self.name}" if first != last else f"{first} of {self.name}"

    def _spooled(self, max_bytes: int, max_images: int, spool: Folder | None, done: Container[int]) -> Iterator[Chunk]:
        if spool is None:
            raise SourceError(f"{self.path} can only be read front to back: it needs a spool folder")
        with closing(self.events()) as events:  # type: ignore[type-var]
            cutter = _Cutter(events, Refusal(self.path, self.wanted, self.split), max_bytes, max_images)
            number = 0
            while cutter.more():
                name = None
                if number in done:
                    for _ in cutter.take():
                        pass
                else:
                    name = f"{self.split}-{number:06d}.spool"
                    write_spool(spool, name, cutter.take())
                yield Chunk(
                    number=number,
                    split=cutter.split,
                    pieces=(),
                    bytes=cutter.bytes,
                    classes=tuple(cutter.classes),
                    spool=name,
                    label=self._label(cutter.first, cutter.last),
                    spool_folder=spool if name else None,
                )
                number += 1

    def _file_fingerprint(self, *more: str) -> str:
        digest = hashlib.sha256("\0".join((self.kind, *more)).encode())
        with FileRange(self.path, jumping=True) as file:
            size_bytes = file.end or 0
            digest.update(str(size_bytes).encode())
            last = max(0, size_bytes - FINGERPRINT_BLOCK_BYTES)
            for block in range(FINGERPRINT_BLOCKS if file.end is not None else 1):
                file.move(last * block // (FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
        return digest.hexdigest()[:32]


class _Cutter:
    """Cuts events into chunks. Of the chunk taken last: its split, bytes, classes, names of first and last item."""

    def __init__(self, events: Iterator[Event], check: Refusal, max_bytes: int, max_images: int):
        self._events = events
        self._check = check
        self._max_bytes, self._max_images = max_bytes, max_images
        self._next = next(events, None)
        self.split = self.first = self.last = ""
        self.bytes = 0
        self.classes: dict[str, None] = {}

    def more(self) -> bool:
        if self._next is None:
            self._check.at_end()
        return self._next is not None

    def take(self) -> Iterator[Item]:
        """The items of the next chunk; to be read to the end."""
        images = 0
        self.bytes, self.classes, self.first = 0, {}, ""
        self.split = self._next.split if self._next is not None else ""
        while (event := self._next) is not None and event.split == self.split:
            size = len(event.data) if isinstance(event, Record) else 0
            if images and (self.bytes + size > self._max_bytes or images >= self._max_images):
                return
            if isinstance(event, Met | Record):
                self.classes[event.wnid] = None
                self.last = f"{event.wnid}/{event.name}" if isinstance(event, Record) else event.wnid
            else:
                self.last = event.where if isinstance(event, Damage) else event.name
            self.first = self.first or self.last
            self._check.see(
                event.split,
                event.wnid if isinstance(event, Met | Record) else "",
                event if isinstance(event, Stray) else None,
                damaged=isinstance(event, Damage),
            )
            if not isinstance(event, Met):
                images += 1
                self.bytes += size
                yield event
            self._next = next(self._events, None)


def _piece_label(piece: Piece) -> str:
    if piece.kind == "tar":
        return base_name(piece.name) if piece.name else base_name(piece.path)
    if piece.kind in ("range", "file"):
        return f"{piece.wnid}/{piece.name}"
    return piece.wnid or piece.name or base_name(piece.path)


def spread(count: int, wanted: int, seed: int) -> Iterator[int]:
    """At most `wanted` numbers below `count`, ascending: one, drawn by `seed`, of each of as many equal ranges."""
    wanted = min(count, wanted)
    for part in range(wanted):
        start, stop = part * count // wanted, (part + 1) * count // wanted
        digest = hashlib.blake2b(f"{seed}\0{part}".encode(), digest_size=8).digest()
        yield start + int.from_bytes(digest, "big") % (stop - start)


def is_image(item: Item) -> bool:
    """Whether it counts as an image, be it one that is left out."""
    return isinstance(item, Record) or (isinstance(item, Stray) and is_lost_image(item.name, item.reason))


def first_images(items: Iterator[Item], images: int) -> Iterator[Item]:
    """Items up to the image number `images`."""
    seen = 0
    for item in islice(items, 100 * images):  # a class of strays only must not be read to its end
        yield item
        seen += is_image(item)
        if seen >= images:
            return
