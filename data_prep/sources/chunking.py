"""A source of images, and how it is cut into chunks: by its content alone, so that any number of workers, and any
number of restarts, get the same ones.
"""

import hashlib
from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

from data_prep.sources.cutter import Cutter
from data_prep.sources.items import Event, Item, Met, Record, Stray
from data_prep.sources.layout import base_name, is_lost_image
from data_prep.sources.reading import Chunk, Piece
from data_prep.sources.refusal import Refusal
from data_prep.sources.spool import write_spool
from data_prep.sources.starts import Given, Start, Starts
from data_prep.sources.streams import FileRange, SourceError
from data_prep.storage import Folder

FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 64, 1 << 16


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
    seekable: workers read their chunks by themselves; total_bytes: of the file or files, None where unknown;
    begun_at: where reading front to back began, in the content: not at 0 where an interrupted run left off later.
    """

    kind = ""
    wanted = "images"  # what it must hold, for messages
    splits: tuple[str, ...]
    seekable = True
    total_bytes: int | None = None
    begun_at = 0

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

    def events(self, start: Start | None = None) -> Iterator[Event]:
        """Of a source that is not seekable: all of it, in order, or what comes from `start` on."""
        raise NotImplementedError

    def start(self) -> Start | None:
        """Where `events` could begin again with the event that it gave last; None where it could not."""
        return None

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
        chunk is given, but for chunks in `done`, which are given without items, and not read again where that can be.
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
        check = Refusal(self.path, self.wanted, self.split)
        starts = Starts(spool, self.split, [max_bytes, max_images])
        if done and self.total_bytes is not None:  # else there is no seeking in it
            starts.load(done)
        for number, given in enumerate(starts.given):
            yield self._given(number, given)
        if starts.start is not None and starts.refusal is not None:
            self.begun_at = starts.start.place.position
            check.restore(starts.refusal)
        with closing(self.events(starts.start)) as events:  # type: ignore[type-var]
            cutter = Cutter(events, check, max_bytes, max_images)
            while cutter.more():
                number, name = len(starts.given), None
                if number in done:
                    for _ in cutter.take():
                        pass
                else:
                    name = f"{self.split}-{number:06d}.spool"
                    write_spool(spool, name, cutter.take())
                given = Given(cutter.split, cutter.bytes, list(cutter.classes), cutter.first, cutter.last)
                starts.add(given, self.start() if cutter.more() else None, check.state())
                chunk = self._given(number, given)
                yield replace(chunk, spool=name, spool_folder=spool) if name else chunk

    def _given(self, number: int, given: Given) -> Chunk:
        label = self._label(given.first, given.last)
        return Chunk(number, given.split, (), given.bytes, tuple(given.classes), None, label)

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
