"""Sources that are a folder: of synset tars, of class folders (with or without splits), or of validation images."""

import hashlib
import os
from collections.abc import Iterator

from data_prep.manifest import SYNSET_PATTERN
from data_prep.sources.archives import SAMPLE_PLACE_IMAGES, SAMPLED_PLACES, TAR_OVERHEAD_BYTES, split_tar
from data_prep.sources.chunking import FINGERPRINT_BLOCK_BYTES, FINGERPRINT_BLOCKS, Census, Source, first_images, spread
from data_prep.sources.items import Item
from data_prep.sources.layout import reason_to_skip, split_of_folder, synset_of_tar
from data_prep.sources.listing import Entry, list_each, list_folder
from data_prep.sources.reading import Piece, read_pieces
from data_prep.sources.streams import FileRange, compression_of
from data_prep.sources.val_labels import ValLabels

SPLIT_ORDER = ("train", "val", "small_classes")


class FolderSource(Source):
    """What the kinds of a folder share."""

    words = ""

    @property
    def description(self) -> str:
        return f"{self.path}: {self.words}"

    def _join(self, *names: str) -> str:
        return "/".join((self.path.rstrip("/"), *names))

    def _stray(self, entry: Entry, root: str = "", split: str = "") -> Piece:
        name = f"{root}/{entry.name}" if root else entry.name
        reason = None if entry.kind == "folder" else reason_to_skip(entry.name, entry.kind, 0)
        return Piece(self._join(name), 0, entry.size, "stray", "", name, split or self.split, reason or "no_class")

    def _listing_fingerprint(self, entries: list[Entry], *more: str) -> str:
        digest = hashlib.sha256("\0".join((self.kind, *more)).encode())
        digest.update(_lines("", entries))
        files = [entry for entry in entries if entry.kind == "file" and entry.size]
        for index in spread(len(files), FINGERPRINT_BLOCKS, seed=0):
            digest.update(_first_block(self._join(files[index].name)))
        return digest.hexdigest()[:32]


def _lines(folder: str, entries: list[Entry]) -> bytes:
    return os.fsencode("".join(f"{folder}{entry.name}\0{entry.size}\n" for entry in entries))


def _first_block(path: str) -> bytes:
    with FileRange(path, jumping=True) as file:
        return file.read(FINGERPRINT_BLOCK_BYTES)


class FolderOfTars(FolderSource):
    """A folder with n01440764.tar, n01443537.tar.gz, ..."""

    kind = "folder-of-tars"
    words = "a folder of per-synset tars"
    wanted = "per-synset tar (n01440764.tar, ...)"

    def __init__(self, path: str, split: str):
        super().__init__(path, split)
        self._entries = list_folder(path)
        self.total_bytes = sum(entry.size for entry in self._entries)

    def _whole(self) -> Iterator[Piece]:
        for entry in self._entries:
            wnid = synset_of_tar(entry.name, compressed=True) if entry.kind == "file" else None
            if wnid is None:
                yield self._stray(entry)
            else:
                yield Piece(self._join(entry.name), 0, entry.size, "tar", wnid, entry.name, self.split)

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        for piece in self._whole():
            if piece.kind == "tar" and piece.length > max_bytes and compression_of(piece.path) is None:
                yield from split_tar(piece, max_bytes, max_images)
            else:
                yield piece

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        tars = [piece for piece in self._whole() if piece.kind == "tar"]
        places = list(spread(len(tars), max(SAMPLED_PLACES, images // SAMPLE_PLACE_IMAGES), seed))
        for place in places:
            yield first_images(read_pieces((tars[place],)), -(-images // len(places)))

    def census(self) -> Census:
        tars = [piece for piece in self._whole() if piece.kind == "tar"]
        compressed = bool(tars) and compression_of(tars[0].path) is not None
        overhead = 0 if compressed else TAR_OVERHEAD_BYTES
        return Census(len({piece.wnid for piece in tars}), sum(piece.length for piece in tars), overhead, exact=True)

    def fingerprint(self) -> str:
        return self._listing_fingerprint(self._entries)


class ClassFolders(FolderSource):
    """A folder per class, as torchvision's ImageFolder; images at any depth below."""

    kind = "class-folders"
    words = "a folder per class"
    wanted = "folder of a class (n01440764/...)"

    def roots(self) -> list[tuple[str, str, bool]]:
        """(folder below the source, split, whether its classes are left out) of each folder of class folders."""
        return [("", self.split, False)]

    def outside(self) -> list[Entry]:
        """What lies beside these folders."""
        return []

    def _listed(self, root: str) -> tuple[list[str], list[Entry]]:
        entries = list_folder(self._join(root) if root else self.path)
        classes = [entry.name for entry in entries if entry.kind == "folder" and SYNSET_PATTERN.fullmatch(entry.name)]
        others = [entry for entry in entries if entry.name not in set(classes)]
        return classes, others

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        for root, split, left_out in self.roots():
            classes, others = self._listed(root)
            folders = [self._join(root, wnid) if root else self._join(wnid) for wnid in classes]
            for wnid, (folder, entries) in zip(classes, list_each(folders), strict=True):
                if not left_out:
                    yield Piece(folder, 0, 0, "class", wnid, "", split)
                for entry in entries:
                    yield self._piece(folder, wnid, entry, split, left_out)
            yield from (self._stray(entry, root, split) for entry in others)
        yield from (self._stray(entry) for entry in self.outside())

    def _piece(self, folder: str, wnid: str, entry: Entry, split: str, left_out: bool) -> Piece:
        path = f"{folder}/{entry.name}"
        reason = "small_class" if left_out else reason_to_skip(entry.name, entry.kind, entry.size)
        if reason is None:
            return Piece(path, 0, entry.size, "file", wnid, entry.name, split)
        return Piece(path, 0, entry.size, "stray", "", f"{wnid}/{entry.name}", split, reason)

    def _some_classes(self, wanted: int, seed: int) -> tuple[int, Iterator[tuple[str, str, str, list[Entry]]]]:
        # (number of classes, iterator of (split, wnid, folder, entries) of some of them)
        classes = [
            (split, wnid, self._join(root, wnid) if root else self._join(wnid))
            for root, split, left_out in self.roots()
            if not left_out
            for wnid in self._listed(root)[0]
        ]
        some = [classes[index] for index in spread(len(classes), wanted, seed)]
        listed = list_each([folder for _, _, folder in some])
        return len(classes), ((*about, entries) for about, (_, entries) in zip(some, listed, strict=True))

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        wanted = max(SAMPLED_PLACES, images // SAMPLE_PLACE_IMAGES)
        count, listed = self._some_classes(wanted, seed)
        per_class = -(-images // max(1, min(count, wanted)))
        for split, wnid, folder, entries in listed:
            pieces = [self._piece(folder, wnid, entry, split, False) for entry in entries]
            yield read_pieces(tuple(pieces[index] for index in spread(len(pieces), per_class, seed)))

    def census(self) -> Census:
        count, listed = self._some_classes(4 * SAMPLED_PLACES, seed=0)
        sizes = [sum(entry.size for entry in entries) for *_, entries in listed]
        total = round(sum(sizes) * count / len(sizes)) if sizes else 0
        classes = len({wnid for root, _, left_out in self.roots() if not left_out for wnid in self._listed(root)[0]})
        return Census(classes, total, 0, exact=len(sizes) == count)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.kind.encode())
        digest.update(_lines("", self.outside()))
        for root, _, _ in self.roots():
            classes, others = self._listed(root)
            digest.update(_lines(f"{root}/", others))
            folders = [self._join(root, wnid) if root else self._join(wnid) for wnid in classes]
            looked_at = set(spread(len(folders), FINGERPRINT_BLOCKS, seed=0))
            for index, (folder, entries) in enumerate(list_each(folders)):
                digest.update(_lines(f"{classes[index]}/", entries))
                file = next((entry for entry in entries if entry.kind == "file" and entry.size), None)
                if index in looked_at and file is not None:
                    digest.update(_first_block(f"{folder}/{file.name}"))
        return digest.hexdigest()[:32]


class SplitFolders(ClassFolders):
    """train/ and val/, or the folders of ImageNet-21K-P, each with class folders."""

    kind = "split-folders"
    words = "class folders in folders for splits"

    def __init__(self, path: str, split: str):
        super().__init__(path, split)
        known: list[tuple[int, str]] = []
        self._others: list[Entry] = []
        for entry in list_folder(path):
            found = split_of_folder(entry.name) if entry.kind == "folder" else None
            if found is None:
                self._others.append(entry)
            else:
                known.append((SPLIT_ORDER.index(found), entry.name))
        self._folders = [(SPLIT_ORDER[order], name) for order, name in sorted(known)]
        self.splits = tuple(dict.fromkeys(split for split, _ in self._folders if split != "small_classes"))

    @property
    def description(self) -> str:
        return f"{super().description} ({', '.join(name for _, name in self._folders)})"

    def roots(self) -> list[tuple[str, str, bool]]:
        return [
            (name, "train" if split == "small_classes" else split, split == "small_classes")
            for split, name in self._folders
        ]

    def outside(self) -> list[Entry]:
        return self._others


class ValFolder(FolderSource):
    """A flat folder of ILSVRC2012_val_00000001.JPEG, ..."""

    kind = "ilsvrc-val"
    words = "ILSVRC's validation images"
    wanted = "validation image (ILSVRC2012_val_00000001.JPEG, ...)"

    def __init__(self, path: str, labels: ValLabels):
        super().__init__(path, "val")
        self.labels = labels
        self._entries = list_folder(path)
        self.total_bytes = sum(entry.size for entry in self._entries)

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        places = [(entry, self.labels.place(entry.name, entry.kind, entry.size)) for entry in self._entries]
        self.labels.check_count(sum(not reason for _, (_, _, reason) in places), self.path)
        for entry, (wnid, name, reason) in places:
            if reason:
                yield self._stray(entry)
            else:
                yield Piece(self._join(entry.name), 0, entry.size, "file", wnid, name, self.split)

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        pieces = [piece for piece in self.pieces(0, 0) if piece.kind == "file"]
        yield read_pieces(tuple(pieces[index] for index in spread(len(pieces), images, seed)))

    def census(self) -> Census:
        return Census(len(set(self.labels.wnids)), self.total_bytes or 0, 0, exact=True)

    def fingerprint(self) -> str:
        return self._listing_fingerprint(self._entries, self.labels.fingerprint())
