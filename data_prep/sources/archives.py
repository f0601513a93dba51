"""Sources that are one tar, plain or compressed: of synset tars, of class folders, or ILSVRC's flat validation set."""

from collections.abc import Iterator

from data_prep.sources.chunking import Census, Event, Met, Source, first_images, spread
from data_prep.sources.items import Damage, Item, Record, Stray
from data_prep.sources.layout import (
    Place,
    clean_name,
    place_in_tree,
    reason_to_skip,
    synset_of_tar,
    wnid_of_image,
)
from data_prep.sources.reading import Piece, read_pieces, tar_items
from data_prep.sources.streams import Bounded, FileRange, Reader, compression_of, open_reader
from data_prep.sources.tar import BLOCK, Gap, Member, Tar
from data_prep.sources.val_labels import ValLabels
from data_prep.storage import is_url

# A header, and on average half a block behind the data.
TAR_OVERHEAD_BYTES = BLOCK + BLOCK // 2
SAMPLED_PLACES = 64
SAMPLE_PLACE_IMAGES = 8  # images from one place: fewer would spend the time on seeking, more see less of the source


class Archive(Source):
    """What the kinds of one tar share."""

    words = ""

    def __init__(self, path: str, split: str):
        super().__init__(path, split)
        self.compression = compression_of(path)
        with FileRange(path, jumping=True) as file:
            self.total_bytes = file.end
        self.seekable = self.compression is None and self.total_bytes is not None

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

    def _damage(self, gap: Gap) -> Piece:
        start, stop = gap.start, gap.stop
        return Piece(self.path, start, stop - start, "damage", "", "", self.split, str(gap))

    def _after(self, reader: Reader) -> Iterator[Damage]:
        """What is to be said when reading has ended."""
        if reader.error is not None:
            yield Damage(self.split, self.name, reader.error)


class TarOfTars(Archive):
    """winter21_whole.tar.gz, fall11_whole.tar, ILSVRC2012_img_train.tar."""

    kind = "tar-of-tars"
    words = "a tar of per-synset tars"
    wanted = "per-synset tar (n01440764.tar, ...)"

    def __init__(self, path: str, split: str):
        super().__init__(path, split)
        self._outline: list[Piece] | None = None

    def outline(self) -> Iterator[Piece]:
        """One piece for each inner tar, from the outer headers alone."""
        if self._outline is not None:
            yield from self._outline
            return
        found: list[Piece] = []
        outside = ""
        with FileRange(self.path, jumping=True) as reader:
            for entry in Tar(reader, resume_at=lambda name: synset_of_tar(name) is not None):
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
        self._outline = found

    def _outer_pieces(self, entry: Member | Gap, end: int) -> Iterator[Piece]:
        if isinstance(entry, Gap):
            yield self._damage(entry)
            if not entry.cut:  # a lost header leaves the images of its class, which tell it by their names
                size = entry.stop - entry.start
                yield Piece(self.path, entry.start, size, "salvage", "", "", self.split)
            return
        wnid = synset_of_tar(entry.name) if entry.kind == "file" else None
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

    def events(self) -> Iterator[Event]:
        outside = ""
        with open_reader(self.path, self.compression) as reader:
            tar = Tar(reader)
            for entry in tar:
                if isinstance(entry, Gap):
                    if not (entry.cut and reader.cut):
                        yield Damage(self.split, self.name, str(entry))
                    continue
                wnid = synset_of_tar(entry.name) if entry.kind == "file" else None
                if wnid is not None:
                    yield Met(self.split, wnid)
                    inner = Bounded(reader, entry.size)
                    yield from tar_items(inner, self.split, wnid, f"{self.name}: {entry.name}")
                elif entry.kind == "file" and (wnid := wnid_of_image(entry.name)):
                    if wnid != outside:
                        outside = wnid
                        yield Damage(self.split, self.name, str(_lost_header(entry)))
                    data = tar.data()
                    if data is not None:
                        yield Record(self.split, wnid, clean_name(entry.name), data)
                elif entry.kind != "folder":
                    reason = reason_to_skip(entry.name, entry.kind, 0) or "no_class"
                    yield Stray(self.split, entry.name, entry.size, reason)
            yield from self._after(reader)

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        tars = [piece for piece in self.outline() if piece.kind == "tar"]
        places = list(spread(len(tars), max(SAMPLED_PLACES, images // SAMPLE_PLACE_IMAGES), seed))
        for place in places:
            yield first_images(read_pieces((tars[place],)), -(-images // len(places)))

    def census(self) -> Census:
        if not self.seekable:
            return super().census()
        tars = [piece for piece in self.outline() if piece.kind == "tar"]
        classes = len({piece.wnid for piece in tars})
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


class FileArchive(Archive):
    """A tar whose members are the images: of a seekable one, each is a piece."""

    def place(self, member: Member) -> Place:
        """Where a member belongs."""
        raise NotImplementedError

    def at_end(self, damaged: bool) -> None:
        """Raise SourceError where something is missing."""

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        damaged = False
        # As in split_tar.
        with FileRange(self.path, jumping=not is_url(self.path)) as reader:
            for entry in Tar(reader):
                if isinstance(entry, Gap):
                    damaged = True
                    yield self._damage(entry)
                    continue
                place = self.place(entry)
                if entry.kind == "folder":
                    if place.wnid:
                        yield Piece(self.path, entry.offset, 0, "class", place.wnid, "", place.split)
                elif place.reason:
                    yield self._piece(entry, "stray", place)
                elif entry.data_offset + entry.size <= (reader.end or 0):  # else a gap comes next
                    yield self._piece(entry, "range", place)
            if reader.error is not None:
                yield Piece(self.path, 0, 0, "damage", "", "", self.split, reader.error)
        self.at_end(damaged or reader.error is not None)

    def _piece(self, entry: Member, kind: str, place: Place) -> Piece:
        return Piece(self.path, entry.data_offset, entry.size, kind, place.wnid, place.name, place.split, place.reason)

    def events(self) -> Iterator[Event]:
        damaged = False
        with open_reader(self.path, self.compression) as reader:
            for event in self._read(reader, salvage=False):
                damaged |= isinstance(event, Damage)
                yield event
            yield from self._after(reader)
        self.at_end(damaged or reader.error is not None)

    def _read(self, reader: Reader, *, salvage: bool) -> Iterator[Event]:
        tar = Tar(reader, salvage=salvage)
        for entry in tar:
            if isinstance(entry, Gap):
                if not (entry.cut and reader.cut):
                    yield Damage(self.split, self.name, str(entry))
                continue
            place = self.place(entry)
            if entry.kind == "folder":
                if place.wnid:
                    yield Met(place.split, place.wnid)
            elif place.reason:
                yield Stray(place.split, place.name, entry.size, place.reason)
            elif (data := tar.data()) is not None:
                yield Record(place.split, place.wnid, place.name, data)

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        assert self.total_bytes is not None, "of a seekable file"
        places = max(1, min(SAMPLED_PLACES, images // SAMPLE_PLACE_IMAGES))
        if self.total_bytes < places * 8 * SAMPLE_PLACE_IMAGES * BLOCK:
            places = 1
        for block in spread(self.total_bytes // BLOCK, places, seed):
            yield first_images(self._from_block(block if places > 1 else 0), -(-images // places))

    def _from_block(self, block: int) -> Iterator[Item]:
        with FileRange(self.path) as reader:
            reader.move(block * BLOCK)
            for event in self._read(reader, salvage=block > 0):
                if not isinstance(event, Met):
                    yield event


class TarOfClassFolders(FileArchive):
    """imagenet21k_resized.tar.gz, or any tree with a folder per class, with or without folders for splits."""

    kind = "tar-of-class-folders"
    words = "a tar of class folders"
    wanted = "folder of a class (n01440764/...)"

    def __init__(self, path: str, split: str, *, has_splits: bool):
        super().__init__(path, split)
        if has_splits:
            self.splits = ("train", "val")

    def place(self, member: Member) -> Place:
        if member.kind == "folder":
            return place_in_tree(f"{member.name}/x", "file", 0, self.split)
        return place_in_tree(member.name, member.kind, member.size, self.split)


class ValTar(FileArchive):
    """ILSVRC2012_img_val.tar."""

    kind = "ilsvrc-val"
    words = "ILSVRC's validation images"
    wanted = "validation image (ILSVRC2012_val_00000001.JPEG, ...)"

    def __init__(self, path: str, labels: ValLabels):
        super().__init__(path, "val")
        self.labels = labels

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        self._images = 0
        yield from super().pieces(max_bytes, max_images)

    def events(self) -> Iterator[Event]:
        self._images = 0
        yield from super().events()

    def place(self, member: Member) -> Place:
        place = self.labels.place(member.name, member.kind, member.size)
        self._images += not place[2]
        return Place("val", *place)

    def at_end(self, damaged: bool) -> None:
        if not damaged:
            self.labels.check_count(self._images, self.path)

    def fingerprint(self) -> str:
        return self._file_fingerprint(self.labels.fingerprint())
