"""Sources that are one tar whose members are the images: of class folders, or ILSVRC's flat validation set."""

from collections.abc import Iterator
from typing import Any

from data_prep.sources.archives import SAMPLE_PLACE_IMAGES, SAMPLED_PLACES, Archive
from data_prep.sources.chunking import first_images, spread
from data_prep.sources.items import Damage, Event, Item, Met, Record, Stray
from data_prep.sources.layout import Place, place_in_tree, split_of_folder, way_to_class
from data_prep.sources.reading import Piece
from data_prep.sources.streams import FileRange, Reader, SourceError
from data_prep.sources.tar import Gap, Member, Tar
from data_prep.sources.val_labels import ValLabels
from data_prep.storage import is_url
from data_prep.tar_header import BLOCK


class FileArchive(Archive):
    """A tar whose members are the images: of a seekable one, each is a piece. `labels`: of validation images that lie
    in no class.
    """

    labels: ValLabels | None = None
    _labelled_images = _labelled_before = 0  # images that have a class by them, now and at the member met last
    _damaged = False

    def place(self, member: Member) -> Place:
        """Where a member belongs."""
        raise NotImplementedError

    def _labelled(self, member: Member, split: str) -> Place:
        assert self.labels is not None
        place = self.labels.place(member.name, member.kind, member.size)
        self._labelled_images += not place[2]
        return Place(split, *place)

    def _at_end(self) -> None:
        if self.labels is not None and not self._damaged:
            self.labels.check_count(self._labelled_images, self.path)

    def fingerprint(self) -> str:
        return self._file_fingerprint(*([] if self.labels is None else [self.labels.fingerprint()]))

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        self._restore({})
        # As in split_tar.
        with FileRange(self.path, jumping=not is_url(self.path)) as reader:
            tar, told = Tar(reader), False
            for entry in tar:
                if isinstance(entry, Gap):
                    told |= entry.cut
                    self._damaged = True
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
                self._damaged = True
                yield Piece(self.path, 0, 0, "damage", "", "", self.split, reader.error)
            if gap := self._unmarked(tar, reader, told):
                self._damaged = True
                yield self._damage(gap)
        self._at_end()

    def _piece(self, entry: Member, kind: str, place: Place) -> Piece:
        return Piece(self.path, entry.data_offset, entry.size, kind, place.wnid, place.name, place.split, place.reason)

    def _read(self, reader: Reader, *, salvage: bool = False) -> Iterator[Event]:
        tar, told = Tar(reader, salvage=salvage), False
        for entry in tar:
            if isinstance(entry, Gap):
                told |= entry.cut
                if not (entry.cut and reader.cut):
                    self._damaged = True
                    yield Damage(self.split, self.name, str(entry))
                continue
            self._meet(entry)
            self._labelled_before = self._labelled_images
            place = self.place(entry)
            if entry.kind == "folder":
                if place.wnid:
                    yield Met(place.split, place.wnid)
            elif place.reason:
                yield Stray(place.split, place.name, entry.size, place.reason)
            elif (data := tar.data()) is not None:
                yield Record(place.split, place.wnid, place.name, data)
        if gap := self._unmarked(tar, reader, told):
            self._damaged = True
            yield Damage(self.split, self.name, str(gap))

    def _after(self, reader: Reader) -> Iterator[Damage]:
        self._damaged |= reader.error is not None
        yield from super()._after(reader)

    def _state(self) -> dict[str, Any]:
        return {"labelled_images": self._labelled_before, "damaged": self._damaged}

    def _restore(self, state: dict[str, Any]) -> None:
        self._labelled_images = self._labelled_before = state.get("labelled_images", 0)
        self._damaged = state.get("damaged", False)

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        assert self.total_bytes is not None, "of a seekable file"
        places = max(1, min(SAMPLED_PLACES, images // SAMPLE_PLACE_IMAGES))
        if self.total_bytes < places * 8 * SAMPLE_PLACE_IMAGES * BLOCK:
            places = 1
        for block in spread(self.total_bytes // BLOCK, places, seed):
            yield first_images(self._from_block(block if places > 1 else 0), -(-images // places))

    def _from_block(self, block: int) -> Iterator[Item]:
        self._restore({})
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

    def __init__(
        self, path: str, split: str, *, has_splits: bool, labels: ValLabels | None = None, rename: bool = False
    ):
        super().__init__(path, split, rename)
        self.labels = labels
        if has_splits:
            self.splits = ("train", "val")

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "beside": self._beside, "has_split": sorted(self._has_split)}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        # folder: one in it that is no split, and has folders of classes below
        self._beside: dict[str, str] = dict(state.get("beside", {}))
        self._has_split: set[str] = set(state.get("has_split", ()))
        self._last = ""

    def place(self, member: Member) -> Place:
        if member.kind == "folder":
            return place_in_tree(f"{member.name}/x", "file", 0, self.split, self.rename)
        self._refuse_lost_split(member.name)
        place = place_in_tree(member.name, member.kind, member.size, self.split, self.rename)
        if self.labels is not None and place.split == "val" and place.reason == "no_class":
            return self._labelled(member, "val")
        return place

    def _refuse_lost_split(self, name: str) -> None:
        """Raise SourceError where folders of classes lie in a folder beside the splits: it may be one."""
        folder = name.rpartition("/")[0]
        if folder == self._last:  # images of a class come together
            return
        self._last = folder
        way = way_to_class(name, self.rename) or []
        splits = [i for i, part in enumerate(way) if split_of_folder(part) is not None]
        if splits:
            self._has_split.add("/".join(way[: splits[-1]]))
        else:
            self._beside |= {"/".join(way[:i]): part for i, part in enumerate(way)}
        if found := self._has_split & self._beside.keys():
            where = min(found)
            inside = f"{where}/{self._beside[where]}".lstrip("/")
            raise SourceError(
                f"{self.path}: {inside} holds class folders, and is no split by its name, beside folders that are: "
                "unpack it, rename that folder to val (or remove it), and give the folder"
            )


class ValTar(FileArchive):
    """ILSVRC2012_img_val.tar."""

    kind = "ilsvrc-val"
    words = "ILSVRC's validation images"
    wanted = "validation image (ILSVRC2012_val_00000001.JPEG, ...)"

    def __init__(self, path: str, labels: ValLabels):
        super().__init__(path, "val")
        self.labels = labels

    def known_classes(self, split: str) -> set[str]:
        return self.labels.classes if self.labels is not None and split == "val" else set()

    def place(self, member: Member) -> Place:
        return self._labelled(member, "val")
