"""Sources that are a folder of folders for splits, and the flat folder of validation images."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace

from data_prep.sources.chunking import Census, spread
from data_prep.sources.folders import ClassFolders, FolderSource
from data_prep.sources.items import Item
from data_prep.sources.layout import split_of_folder
from data_prep.sources.listing import Entry, list_files, list_folder
from data_prep.sources.reading import Piece, read_pieces
from data_prep.sources.refusal import refuse_split
from data_prep.sources.val_labels import ValLabels

SPLIT_ORDER = ("train", "val", "small_classes")


class SplitFolders(ClassFolders):
    """train/ and val/, or the folders of ImageNet-21K-P, each with class folders."""

    kind = "split-folders"
    words = "class folders in folders for splits"

    def __init__(self, path: str, split: str, labels: ValLabels | None = None, *, rename: bool = False):
        """`labels`: of the images right in the folder of val. Raises SourceError for a split without a class."""
        super().__init__(path, split, rename=rename)
        self.labels = labels
        known: list[tuple[int, str]] = []
        self._others: list[Entry] = []
        for entry in list_folder(path):
            found = split_of_folder(entry.name) if entry.kind == "folder" else None
            if found not in SPLIT_ORDER:
                self._others.append(entry)
            else:
                known.append((SPLIT_ORDER.index(found), entry.name))
        self._folders = [(SPLIT_ORDER[order], name) for order, name in sorted(known)]
        self.splits = tuple(dict.fromkeys(split for split, _ in self._folders if split != "small_classes"))
        for found in self.splits:
            self._refuse_empty(found)

    def _refuse_empty(self, split: str) -> None:
        roots = [root for root, of, _ in self.roots() if of == split]
        there = [piece for root in roots for piece in self._outside_of(root, split)]
        if not any(piece.kind == "file" for piece in there) and not any(self._listed(root)[0] for root in roots):
            refuse_split(self._join(roots[0]), split, [piece.name for piece in there])

    def _outside_of(self, root: str, split: str) -> Iterator[Piece]:
        strays = super()._outside_of(root, split)
        if self.labels is None or split != "val":
            yield from strays
            return
        images = 0
        for piece in strays:
            wnid, name, _ = self.labels.place(piece.name.removeprefix(f"{root}/"), "file", piece.length)
            if wnid and piece.detail == "no_class":
                images += 1
                yield replace(piece, kind="file", wnid=wnid, name=name, detail="")
            else:
                yield piece
        self.labels.check_count(images, self._join(root))

    def _labelled(self) -> list[Piece]:
        roots = [root for root, split, _ in self.roots() if split == "val" and self.labels is not None]
        return [piece for root in roots for piece in self._outside_of(root, "val") if piece.kind == "file"]

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        labelled = self._labelled()
        if labelled:
            share = len(labelled) / (len(labelled) + self._files_in_classes())
            some = spread(len(labelled), round(images * share), seed)
            yield read_pieces(tuple(labelled[index] for index in some))
        yield from super().sample_pieces(images, seed)

    def census(self) -> Census:
        found = super().census()
        return replace(found, payload_bytes=found.payload_bytes + sum(piece.length for piece in self._labelled()))

    def fingerprint(self) -> str:
        if self.labels is None:
            return super().fingerprint()
        files = "\n".join(f"{piece.name}\0{piece.length}" for piece in self._labelled())
        return hashlib.sha256(os.fsencode(f"{super().fingerprint()}{self.labels.fingerprint()}{files}")).hexdigest()[
            :32
        ]

    @property
    def description(self) -> str:
        return f"{super().description} ({', '.join(name for _, name in self._folders)})"

    def roots(self) -> list[tuple[str, str, bool]]:
        return [
            (name, "train" if split == "small_classes" else split, split == "small_classes")
            for split, name in self._folders
        ]

    def known_classes(self, split: str) -> set[str]:
        labelled = self.labels.classes if self.labels is not None and split == "val" else set()
        return super().known_classes(split) | labelled

    def split_folders(self) -> list[str]:
        return [name for _, name in self._folders]

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
        self._entries = list_files(path)
        self.total_bytes = sum(entry.size for entry in self._entries)

    def pieces(self, max_bytes: int, max_images: int) -> Iterator[Piece]:
        places = [(entry, self.labels.place(entry.name, entry.kind, entry.size)) for entry in self._entries]
        self.labels.check_count(sum(not reason for _, (_, _, reason) in places), self.path)
        for entry, (wnid, name, reason) in places:
            if reason:
                yield self._stray(entry)
            else:
                yield Piece(self._join(entry.name), 0, entry.size, "file", wnid, name, self.split)

    def known_classes(self, split: str) -> set[str]:
        return self.labels.classes if split == "val" else set()

    def outside_pieces(self) -> Iterator[Piece]:
        return (piece for piece in self.pieces(0, 0) if piece.kind == "stray")

    def _files_in_classes(self) -> int:
        return len(self.labels)

    def sample_pieces(self, images: int, seed: int) -> Iterator[Iterator[Item]]:
        pieces = [piece for piece in self.pieces(0, 0) if piece.kind == "file"]
        yield read_pieces(tuple(pieces[index] for index in spread(len(pieces), images, seed)))

    def census(self) -> Census:
        return Census(len(self.labels.classes), self.total_bytes or 0, 0, exact=True)

    def fingerprint(self) -> str:
        return self._listing_fingerprint(self._entries, self.labels.fingerprint())
