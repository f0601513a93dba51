"""Sources that are one tar, plain or compressed, and what they share; here the tar of synset tars."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from data_prep.sources.chunking import Census, Source, first_images, spread
from data_prep.sources.inflate import Inflated, compression_of, open_reader
from data_prep.sources.items import Damage, Event, Item, Met, Record, Stray
from data_prep.sources.layout import (
    class_in_name,
    clean_name,
    reason_to_skip,
    synset_of_tar,
    tar_stem,
    wnid_of_image,
)
from data_prep.sources.reading import Piece, read_pieces, tar_items
from data_prep.sources.starts import Start
from data_prep.sources.streams import Bounded, FileRange, Reader
from data_prep.sources.tar import Gap, Member, Tar
from data_prep.storage import is_url
from data_prep.tar_header import BLOCK

# A header, and on average half a block behind the data.
TAR_OVERHEAD_BYTES = BLOCK + BLOCK // 2
SAMPLED_PLACES = 64
SAMPLE_PLACE_IMAGES = 8  # images from one place: fewer would spend the time on seeking, more see less of the source


class Archive(Source):
    """What the kinds of one tar share."""

    words = ""

    def __init__(self, path: str, split: str, rename: bool = False):
        super().__init__(path, split)
        self.rename = rename
        self.compression = compression_of(path)
        with FileRange(path, jumping=True) as file:
            self.total_bytes = file.end
        self.seekable = self.compression is None and self.total_bytes is not None
        self._reader: Reader | None = None
        self._met_at = self._since_met = 0  # the member met last, and events since
        self._restore({})

    @property
    def description(self) -> str:
        size = "" if self.total_bytes is None else f", {self.total_bytes / 1e6:,.1f} MB"
        packed = f", {self.compression} (read front to back, by one process)" if self.compression else ""
        return f"{self.path}: {self.words}{packed}{size}"

    def fingerprint(self) -> str:
        return self._file_fingerprint()

    def census(self) -> Census:
        # Images hardly compress, and headers hardly count once compressed.
        overhead = 0 if self.compression else TAR_OVERHEAD_BYTES
        return Census(None, self.total_bytes or 0, overhead, exact=False)

    def _unmarked(self, tar: Tar, reader: Reader, told: bool) -> Gap | None:
        """What is to be said of a tar that was read to its end and has no mark of it; `told`: of a cut, already."""
        if tar.end_marked or told or reader.error is not None or reader.cut:
            return None
        at = reader.position
        return Gap(at, at, "it ends without the zeros that end a tar: cut short between two files, or written so")

    def _damage(self, gap: Gap) -> Piece:
        start, stop = gap.start, gap.stop
        return Piece(self.path, start, stop - start, "damage", "", "", self.split, str(gap))

    def events(self, start: Start | None = None) -> Iterator[Event]:
        self._restore(start.state if start else {})
        with open_reader(self.path, self.compression, start=start.place if start else None) as reader:
            self._reader, self._met_at, self._since_met = reader, 0, 0
            if start:
                reader.skip(start.position - reader.position)
            events = chain(self._read(reader), self._after(reader))
            for number, event in enumerate(events):
                self._since_met += 1
                if start is None or number >= start.passed:
                    yield event
        self._at_end()

    def _read(self, reader: Reader) -> Iterator[Event]:
        """The events of the members from where the reader stands; calls `_meet` at each."""
        raise NotImplementedError

    def _meet(self, member: Member) -> None:
        """From here, and with the state at this time, reading can begin again."""
        self._met_at, self._since_met = member.offset, 0

    def _state(self) -> dict[str, Any]:
        """What has to be known at the member met last, as JSON holds it, and `_restore` to take it."""
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        pass

    def _after(self, reader: Reader) -> Iterator[Damage]:
        """What is to be said when reading has ended."""
        if reader.error is not None:
            yield Damage(self.split, self.name, reader.error)

    def _at_end(self) -> None:
        """Raises SourceError where what was read cannot be all."""

    def start(self) -> Start | None:
        place = self._reader.place if isinstance(self._reader, Inflated) else None
        if place is None or place.position > self._met_at:
            return None
        return Start(place, self._met_at, self._since_met - 1, self._state())


class TarOfTars(Archive):
    """winter21_whole.tar.gz, fall11_whole.tar, ILSVRC2012_img_train.tar."""

    kind = "tar-of-tars"
    words = "a tar of per-synset tars"
    wanted = "per-synset tar (n01440764.tar, ...)"
    _outside = _outside_before = ""  # class of the last image outside of a tar, now and at the member met last

    def __init__(self, path: str, split: str, *, rename: bool = False):
        super().__init__(path, split, rename)
        self._outline: list[Piece] | None = None

    def _class_of(self, entry: Member) -> str | None:
        """The class of a member that is a tar of images; '' where that only looks like a class: its images are lost,
        and counted. None for another member.
        """
        if entry.kind != "file" or (stem := tar_stem(entry.name)) is None:
            return None
        wnid = synset_of_tar(entry.name, rename=self.rename)
        return "" if wnid is None and class_in_name(stem) is not None else wnid

    def _is_class(self, name: str) -> bool:
        return synset_of_tar(name, rename=self.rename) is not None

    def outline(self) -> Iterator[Piece]:
        """One piece for each inner tar, from the outer headers alone."""
        if self._outline is not None:
            yield from self._outline
            return
        found: list[Piece] = []
        outside = ""
        with FileRange(self.path, jumping=True) as reader:
            tar, told = Tar(reader, resume_at=self._is_class), False
            for entry in tar:
                told |= isinstance(entry, Gap) and entry.cut
                pieces = list(self._outer_pieces(entry, reader.end or 0))
                if pieces and pieces[0].kind == "range" and pieces[0].wnid != outside:
                    outside = pieces[0].wnid
                    pieces.insert(0, self._damage(_lost_header(entry)))
                for piece in pieces:
                    found.append(piece)
                    yield piece
            if reader.error is not None:
                yield Piece(self.path, 0, 0, "damage", "", "", self.split, reader.error)
                return
            if gap := self._unmarked(tar, reader, told or any(piece.cut for piece in found)):
                found.append(self._damage(gap))
                yield found[-1]
        self._outline = found

    def _outer_pieces(self, entry: Member | Gap, end: int) -> Iterator[Piece]:
        if isinstance(entry, Gap):
            yield self._damage(entry)
            if not entry.cut:  # a lost header leaves the images of its class, which tell it by their names
                size = entry.stop - entry.start
                yield Piece(self.path, entry.start, size, "salvage", "", "", self.split)
            return
        wnid = self._class_of(entry)
        if wnid is not None:
            room = end - entry.data_offset
            size, cut = min(entry.size, room), room < entry.size
            yield Piece(self.path, entry.data_offset, size, "tar", wnid, entry.name, self.split, cut=cut)
        elif entry.kind == "file" and (wnid := wnid_of_image(entry.name)):
            if entry.data_offset + entry.size <= end:
                name = clean_name(entry.name)
                yield Piece(self.path, entry.data_offset, entry.size, "range", wnid, name, self.split)
        elif entry.kind != "folder":
            reason = reason_to_skip(entry.name, entry.kind, 0) or "no_class"
            yield Piece(self.path, entry.data_offset, entry.size, "stray", "", entry.name, self.split, reason)

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        for piece in self.outline():
            if piece.kind == "tar" and piece.length > max_bytes:
                yield from split_tar(piece, max_bytes, max_images)
            else:
                yield piece

    def _read(self, reader: Reader) -> Iterator[Event]:
        tar, told = Tar(reader), False
        for entry in tar:
            if isinstance(entry, Gap):
                told |= entry.cut
                if not (entry.cut and reader.cut):
                    yield Damage(self.split, self.name, str(entry))
                continue
            self._meet(entry)
            self._outside_before = self._outside
            wnid = self._class_of(entry)
            if wnid is not None:
                if wnid:
                    yield Met(self.split, wnid)
                inner = Bounded(reader, entry.size)
                yield from tar_items(inner, self.split, wnid, f"{self.name}: {entry.name}")
            elif entry.kind == "file" and (wnid := wnid_of_image(entry.name)):
                if wnid != self._outside:
                    self._outside = wnid
                    yield Damage(self.split, self.name, str(_lost_header(entry)))
                data = tar.data()
                if data is not None:
                    yield Record(self.split, wnid, clean_name(entry.name), data)
            elif entry.kind != "folder":
                reason = reason_to_skip(entry.name, entry.kind, 0) or "no_class"
                yield Stray(self.split, entry.name, entry.size, reason)
        if gap := self._unmarked(tar, reader, told):
            yield Damage(self.split, self.name, str(gap))

    def _state(self) -> dict[str, Any]:
        return {"outside": self._outside_before}

    def _restore(self, state: dict[str, Any]) -> None:
        self._outside = self._outside_before = state.get("outside", "")

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        tars = [piece for piece in self.outline() if piece.kind == "tar"]
        places = list(spread(len(tars), max(SAMPLED_PLACES, images // SAMPLE_PLACE_IMAGES), seed))
        for place in places:
            yield first_images(read_pieces((tars[place],)), -(-images // len(places)))

    def census(self) -> Census:
        if not self.seekable:
            return super().census()
        tars = [piece for piece in self.outline() if piece.kind == "tar"]
        classes = len({piece.wnid for piece in tars} - {""})
        return Census(classes, sum(piece.length for piece in tars), TAR_OVERHEAD_BYTES, exact=True)


def _lost_header(image: Member | Gap) -> Gap:
    # The members of an inner tar whose outer header is lost come as if they were outer ones.
    start = image.start if isinstance(image, Gap) else image.offset
    return Gap(start, start, "images outside of their class's tar, whose header is lost")


def split_tar(piece: Piece, max_bytes: int, max_images: int) -> Iterator[Piece]:
    """Parts of an inner tar, cut where members begin."""

    def part(start: int, stop: int, cut: bool = False) -> Piece:
        return Piece(piece.path, start, stop - start, "tar", piece.wnid, piece.name, piece.split, cut=cut)

    start, images, sound = piece.offset, 0, True
    # Remote: requests for single headers would take longer than reading it all.
    with FileRange(piece.path, piece.offset, piece.length, jumping=not is_url(piece.path)) as reader:
        for entry in Tar(reader):
            if isinstance(entry, Gap):
                sound = False  # what lies behind a gap stays with it, so that the gap is told
                continue
            stop = entry.data_offset + entry.size + -entry.size % BLOCK
            if sound and entry.offset > start and (stop - start > max_bytes or images >= max_images):
                yield part(start, entry.offset)
                start, images = entry.offset, 0
            images, sound = images + 1, True
    yield part(start, piece.offset + piece.length, piece.cut)
