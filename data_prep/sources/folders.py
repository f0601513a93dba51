"""Sources that are a folder: of synset tars, or of class folders."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

from data_prep.sources.archives import SAMPLE_PLACE_IMAGES, SAMPLED_PLACES, TAR_OVERHEAD_BYTES, split_tar
from data_prep.sources.chunking import (
    FINGERPRINT_BLOCK_BYTES,
    FINGERPRINT_BLOCKS,
    Census,
    LostImages,
    Source,
    first_images,
    spread,
)
from data_prep.sources.inflate import compression_of
from data_prep.sources.items import Item
from data_prep.sources.layout import (
    base_name,
    class_in_name,
    class_of_name,
    is_lost_image,
    place_in_tree,
    reason_to_skip,
    synset_of_tar,
    tar_stem,
)
from data_prep.sources.listing import Entry, list_each, list_files, list_folder
from data_prep.sources.reading import Piece, read_pieces
from data_prep.sources.streams import FileRange


class FolderSource(Source):
    """What the kinds of a folder share."""

    words = ""

    @property
    def description(self) -> str:
        return f"{self.path}: {self.words}"

    def _join(self, *names: str) -> str:
        return "/".join((self.path.rstrip("/"), *names))

    def outside_pieces(self) -> Iterator[Piece]:
        """A stray for every file that lies in no class."""
        raise NotImplementedError

    def _strays(self, entries: Iterable[Entry], root: str = "", split: str = "") -> Iterator[Piece]:
        """Of entries that are no class's: the files, and all files below the folders."""
        for entry in entries:
            if entry.kind == "folder":
                below = f"{root}/{entry.name}" if root else entry.name
                for file in list_files(self._join(below)):
                    yield self._stray(file, below, split)
            else:
                yield self._stray(entry, root, split)

    def _stray(self, entry: Entry, root: str = "", split: str = "") -> Piece:
        name = f"{root}/{entry.name}" if root else entry.name
        reason = place_in_tree(name, entry.kind, entry.size, "").reason or "no_class"
        return Piece(self._join(name), 0, entry.size, "stray", "", name, split or self.split, reason)

    def lost_images(self) -> LostImages:
        names = [piece.name for piece in self.outside_pieces() if is_lost_image(piece.name, piece.detail)]
        return LostImages(len(names), len(names) + self._files_in_classes() if names else 0, names)

    def _files_in_classes(self) -> int:
        """All files that are read as images."""
        raise NotImplementedError

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

    def __init__(self, path: str, split: str, *, rename: bool = False):
        super().__init__(path, split)
        self.rename = rename
        self._entries = list_folder(path)
        self.total_bytes = sum(entry.size for entry in self._entries)

    def _class_of(self, entry: Entry) -> str | None:
        return synset_of_tar(entry.name, compressed=True, rename=self.rename) if entry.kind == "file" else None

    def _whole(self) -> Iterator[Piece]:
        """A piece for each tar of a class, or of something that looks like one: its images are lost, and counted."""
        for entry in self._entries:
            stem = tar_stem(entry.name, compressed=True) if entry.kind == "file" else None
            wnid = self._class_of(entry)
            if wnid is not None or (stem is not None and class_in_name(stem) is not None):
                yield Piece(self._join(entry.name), 0, entry.size, "tar", wnid or "", entry.name, self.split)
            else:
                yield from self._beside(entry)

    def _beside(self, entry: Entry) -> Iterator[Piece]:
        tars = {self._class_of(other) for other in self._entries}
        in_tar = entry.kind == "folder" and class_of_name(entry.name, self.rename) in tars - {None}
        for piece in self._strays([entry]):
            yield replace(piece, detail="class_in_tar") if in_tar and piece.detail == "no_class" else piece

    def outside_pieces(self) -> Iterator[Piece]:
        return (piece for piece in self._whole() if piece.kind == "stray")

    def _files_in_classes(self) -> int:
        return 0  # only reading tells

    def known_classes(self, split: str) -> set[str]:
        return {wnid for entry in self._entries if (wnid := self._class_of(entry))} if split == self.split else set()

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
        return Census(
            len({piece.wnid for piece in tars} - {""}), sum(piece.length for piece in tars), overhead, exact=True
        )

    def fingerprint(self) -> str:
        return self._listing_fingerprint(self._entries)


class ClassFolders(FolderSource):
    """A folder per class, as torchvision's ImageFolder; images at any depth below."""

    kind = "class-folders"
    words = "a folder per class"
    wanted = "folder of a class (n01440764/...)"

    def __init__(self, path: str, split: str, *, rename: bool = False):
        super().__init__(path, split)
        self.rename = rename

    def roots(self) -> list[tuple[str, str, bool]]:
        """(folder below the source, split, whether its classes are left out) of each folder of class folders."""
        return [("", self.split, False)]

    def outside(self) -> list[Entry]:
        """What lies beside these folders."""
        return []

    def _listed(self, root: str) -> tuple[list[tuple[str, str]], list[Entry]]:
        """((path, WordNet id) of each class's folder, other entries) of a folder of class folders."""
        classes, others = [], []
        for entry in list_folder(self._join(root) if root else self.path):
            wnid = class_of_name(entry.name, self.rename) if entry.kind == "folder" else None
            if wnid is None:
                others.append(entry)
            else:
                classes.append((self._join(root, entry.name) if root else self._join(entry.name), wnid))
        return classes, others

    def known_classes(self, split: str) -> set[str]:
        roots = [root for root, of, left_out in self.roots() if of == split and not left_out]
        return {wnid for root in roots for _, wnid in self._listed(root)[0]}

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        for root, split, left_out in self.roots():
            classes, _ = self._listed(root)
            listed = list_each([folder for folder, _ in classes])
            for (_, wnid), (folder, entries) in zip(classes, listed, strict=True):
                if not left_out:
                    yield Piece(folder, 0, 0, "class", wnid, "", split)
                for entry in entries:
                    yield self._piece(folder, wnid, entry, split, left_out)
            yield from self._outside_of(root, split)
        yield from self._strays(self.outside())

    def outside_pieces(self) -> Iterator[Piece]:
        for root, split, _ in self.roots():
            yield from (piece for piece in self._outside_of(root, split) if piece.kind == "stray")
        yield from self._strays(self.outside())

    def _outside_of(self, root: str, split: str) -> Iterator[Piece]:
        return self._strays(self._listed(root)[1], root, split)

    def _files_in_classes(self) -> int:
        folders = [folder for root, _, out in self.roots() if not out for folder, _ in self._listed(root)[0]]
        return sum(len(entries) for _, entries in list_each(folders))

    def _piece(self, folder: str, wnid: str, entry: Entry, split: str, left_out: bool) -> Piece:
        path = f"{folder}/{entry.name}"
        reason = "small_class" if left_out else reason_to_skip(entry.name, entry.kind, entry.size)
        if reason is None:
            return Piece(path, 0, entry.size, "file", wnid, entry.name, split)
        return Piece(path, 0, entry.size, "stray", "", f"{base_name(folder)}/{entry.name}", split, reason)

    def _some_classes(self, wanted: int, seed: int) -> tuple[int, Iterator[tuple[str, str, str, list[Entry]]]]:
        # (number of classes, iterator of (split, wnid, folder, entries) of some of them)
        classes = [
            (split, wnid, folder)
            for root, split, left_out in self.roots()
            if not left_out
            for folder, wnid in self._listed(root)[0]
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
        classes = len({wnid for root, _, left_out in self.roots() if not left_out for _, wnid in self._listed(root)[0]})
        return Census(classes, total, 0, exact=len(sizes) == count)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.kind.encode())
        digest.update(_lines("", self.outside()))
        for root, _, _ in self.roots():
            classes, others = self._listed(root)
            digest.update(_lines(f"{root}/", others))
            folders = [folder for folder, _ in classes]
            looked_at = set(spread(len(folders), FINGERPRINT_BLOCKS, seed=0))
            for index, (folder, entries) in enumerate(list_each(folders)):
                digest.update(_lines(f"{base_name(folder)}/", entries))
                file = next((entry for entry in entries if entry.kind == "file" and entry.size), None)
                if index in looked_at and file is not None:
                    digest.update(_first_block(f"{folder}/{file.name}"))
        return digest.hexdigest()[:32]
