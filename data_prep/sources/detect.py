"""Which kind of source a path holds: begin with `open_source`.

Nothing is unpacked: plain archives and folders are read in place by any number of workers (`reading.py`), compressed
archives front to back, through a spool of bounded size (`spool.py`). A path may be an fsspec URL (s3://...). Class
names must be WordNet ids: they are what ties a class to other label spaces.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_prep.sources.archives import TarOfTars
from data_prep.sources.chunking import Source
from data_prep.sources.file_archives import TarOfClassFolders, ValTar
from data_prep.sources.folders import ClassFolders, FolderOfTars
from data_prep.sources.inflate import compression_of, open_reader
from data_prep.sources.layout import (
    base_name,
    class_of_name,
    clean_name,
    is_hidden,
    is_lost_image,
    lookalikes,
    offer_to_rename,
    place_in_tree,
    split_of_folder,
    synset_of_tar,
    wnid_of_image,
)
from data_prep.sources.listing import Entry, list_files, list_folder
from data_prep.sources.refusal import MAX_STRAYS_BEFORE_CLASS
from data_prep.sources.split_folders import SplitFolders, ValFolder
from data_prep.sources.streams import FileRange, SourceError, unreachable
from data_prep.sources.tar import Member, Tar
from data_prep.sources.val_labels import WHAT_TO_GIVE, ValLabels, load_val_labels, val_number
from data_prep.storage import file_system, is_url

ARCHIVE_KINDS = ("tar-of-tars", "tar-of-class-folders", "ilsvrc-val")
FOLDER_KINDS = ("folder-of-tars", "class-folders", "split-folders", "ilsvrc-val")
KINDS = tuple(dict.fromkeys(ARCHIVE_KINDS + FOLDER_KINDS))
WHAT_SOURCES_ARE = (
    "give a tar of per-synset tars (n01440764.tar, ...), a folder of such tars, or a folder with one folder per class"
)
Labels = Callable[[], ValLabels]
OTHER_ARCHIVES = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar"}
LISTED_BELOW, LEVELS_BELOW = 20, 3  # where classes are looked for, when there are none at the top
MAX_SCAN_BYTES = 64 << 20  # for a first header, before a file is taken for something else than a damaged tar


def open_source(
    path: str | Path,
    *,
    split: str = "train",
    kind: str | None = None,
    labels: str | Path | None = None,
    rename: bool = False,
) -> Source:
    """The source at a path or URL; its kind is found out unless given.

    split: of records that do not say theirs by a folder train/ or val/; labels: the classes of validation images that
    lie in no class; rename: take n01440764 for the class of n01440764_tench or N01440764. Raises SourceError when there
    is nothing, or nothing that is a source of images.
    """
    path = _plain_path(str(path))
    if kind is not None and kind not in KINDS:
        raise SourceError(f"there is no kind of source {kind!r}: take one of {', '.join(KINDS)}")
    # Read where they are needed: where they are not, that is what is to be said.
    found = None if labels is None else partial(load_val_labels, _plain_path(str(labels)))
    opened = _open_folder if _is_folder(path) else _open_archive
    source = opened(path, split, kind, found, rename)
    if labels is not None and getattr(source, "labels", None) is None:
        raise SourceError(
            f"{path} is {source.kind}, whose classes are known: leave out the labels {labels}; --val-labels "
            "belongs to a --val-source, or to a folder val/ of --source, whose images lie in no class"
        )
    return source


def _plain_path(path: str) -> str:
    for scheme in ("file://", "local://"):
        path = path.removeprefix(scheme)
    return path if is_url(path) else os.path.normpath(path)


def _is_folder(path: str) -> bool:
    if not is_url(path):
        if not os.path.exists(path):
            raise SourceError(f"source {path} does not exist: check the path")
        if not os.path.isdir(path) and not os.path.isfile(path):
            raise SourceError(f"source {path} is neither a file nor a folder: {WHAT_SOURCES_ARE}")
        return os.path.isdir(path)
    system, inner = file_system(path)
    try:
        return bool(system.info(inner)["type"] == "directory")
    except Exception as error:  # each remote file system has its own
        raise unreachable(f"source {path}", error) from None


def _needed(path: str, labels: Labels | None) -> ValLabels:
    if labels is None:
        raise SourceError(f"{path} holds ILSVRC's validation images, whose names do not tell the class: {WHAT_TO_GIVE}")
    return labels()


def _open_archive(path: str, split: str, kind: str | None, labels: Labels | None, rename: bool) -> Source:
    if kind is not None and kind not in ARCHIVE_KINDS:
        raise SourceError(f"{path} is a file, but {kind} is a folder: take one of {', '.join(ARCHIVE_KINDS)}")
    found, example = _sniff(path, kind, labels if split == "val" else None, rename)
    if found == "tar-of-tars":
        return TarOfTars(path, split, rename=rename)
    if found == "ilsvrc-val":
        return ValTar(path, _needed(path, labels))
    parts = clean_name(example).split("/")
    has_splits = any(split_of_folder(part) for part in parts)
    return TarOfClassFolders(
        path, split, has_splits=has_splits, labels=labels() if has_splits and labels else None, rename=rename
    )


def _sniff(path: str, kind: str | None, labels: Labels | None, rename: bool) -> tuple[str, str]:
    """(kind, a member's name that shows it) of an archive, by its first members."""
    strays: list[str] = []
    any_member = False
    first_gap: int | None = None
    with FileRange(path, jumping=True) as file:
        start = file.read(8)
    if packed := next((name for magic, name in OTHER_ARCHIVES.items() if start.startswith(magic)), None):
        raise SourceError(f"source {path} is a {packed} file, which cannot be read in place: unpack it first")
    with open_reader(path, compression_of(path), jumping=True) as reader:
        for entry in Tar(reader, max_scan_bytes=MAX_SCAN_BYTES):
            if not isinstance(entry, Member):
                first_gap = entry.start if first_gap is None else first_gap
                continue
            any_member = True
            found = _kind_by_member(entry, rename)
            if found is not None and kind in (None, found):
                return found, entry.name
            if entry.kind != "folder":
                strays.append(entry.name)
            if len(strays) > MAX_STRAYS_BEFORE_CLASS:
                break
    if reader.error is not None and not any_member:
        raise SourceError(f"{path} is damaged or cut short: {reader.error}: fetch it again")
    if not any_member and first_gap is not None:
        raise SourceError(f"source {path} is not a tar archive: {WHAT_SOURCES_ARE}")
    if not strays:
        raise SourceError(f"{path} is an empty archive: no images found")
    if kind is not None:
        return kind, strays[0]  # as told; the source itself refuses what it cannot be
    if labels is not None and any(is_lost_image(name, "no_class") for name in strays):
        return "ilsvrc-val", strays[0]
    offer = offer_to_rename(lookalikes(strays))
    hint = f": {offer}" if offer else ""
    if not offer and _is_webdataset(strays):
        folder = path.rpartition("/")[0] or "."
        hint = f": it is a WebDataset shard, which stays as it is: `python -m data_prep index {folder}`"
    elif not offer and (wnid := wnid_of_image(strays[0])):
        hint = f": if it is the tar of one class, name it {wnid}.tar and give its folder"
    raise SourceError(
        f"{path} holds no per-synset tar (n01440764.tar, ...), folder of a class or ILSVRC validation image; "
        f"it holds {strays[0]}{hint}"
    )


def _is_webdataset(names: list[str]) -> bool:
    """Whether an image lies beside what a file of the same key says of it."""
    told = {name.rpartition(".")[0] for name in names if name.endswith((".cls", ".json"))}
    return any(is_lost_image(name, "no_class") and name.rpartition(".")[0] in told for name in names)


def _kind_by_member(member: Member, rename: bool) -> str | None:
    if member.kind == "folder":
        place = place_in_tree(f"{member.name}/x", "file", 0, "", rename)
        return "tar-of-class-folders" if place.wnid else None
    if member.kind == "file" and synset_of_tar(member.name, rename=rename):
        return "tar-of-tars"
    place = place_in_tree(member.name, member.kind, member.size, "", rename)
    if place.wnid or place.reason == "small_class":
        return "tar-of-class-folders"
    return "ilsvrc-val" if val_number(member.name) is not None and not is_hidden(member.name) else None


def _open_folder(path: str, split: str, kind: str | None, labels: Labels | None, rename: bool) -> Source:
    if kind is not None and kind not in FOLDER_KINDS:
        raise SourceError(f"{path} is a folder, but {kind} is a file: take one of {', '.join(FOLDER_KINDS)}")
    found = kind or _kind_of_folder(path, labels if split == "val" else None, rename)
    if found == "folder-of-tars":
        return FolderOfTars(path, split, rename=rename)
    if found == "class-folders":
        return ClassFolders(path, split, rename=rename)
    if found == "split-folders":
        return SplitFolders(path, split, labels and labels(), rename=rename)
    return ValFolder(path, _needed(path, labels))


def _kind_of_folder(path: str, labels: Labels | None, rename: bool) -> str:
    entries = [entry for entry in list_folder(path) if not is_hidden(entry.name)]
    found = _kind_by_entries(entries, rename)
    _refuse_dangling(path, entries, rename)
    if found is not None:
        return found
    folders = [entry.name for entry in entries if entry.kind == "folder"]
    splits = [name for name in folders if split_of_folder(name) is not None]
    inside = {name: _kind_by_entries(list_folder(f"{path}/{name}"), rename) for name in (splits or folders[:3])}
    for name in splits:
        _refuse_dangling(f"{path}/{name}", list_folder(f"{path}/{name}"), rename)
    if splits and "class-folders" in inside.values():
        return "split-folders"
    if not entries:
        raise SourceError(f"source {path} is an empty folder: no images found")
    if labels is not None and any(is_lost_image(name, "no_class") for name, *_ in list_files(path)):
        return "ilsvrc-val"
    if not folders and class_of_name(base_name(path), rename) and any(is_lost_image(e.name, "") for e in entries):
        raise SourceError(f"source {path} is the folder of one class: give the folder that it lies in")
    there = [entry.name for entry in entries]
    there += [entry.name for name in splits for entry in list_folder(f"{path}/{name}")]
    offer = offer_to_rename(lookalikes(there))
    first = (folders or [entry.name for entry in entries])[:3]
    raise SourceError(
        f"source {path} holds no class named by a WordNet id, such as n01440764 or n01440764.tar; "
        f"it holds {', '.join(first)}: {offer or _advice(path, entries, inside, rename)}"
    )


def _refuse_dangling(path: str, entries: list[Entry], rename: bool) -> None:
    links = [e.name for e in entries if e.kind == "link" and class_of_name(e.name.partition(".")[0], rename)]
    if links:
        raise SourceError(
            f"source {path} holds {len(links):,} links of classes that lead nowhere, such as {links[0]}: point them to "
            "what they stand for, or remove them"
        )


def _advice(path: str, entries: list[Entry], inside: dict[str, str | None], rename: bool) -> str:
    hint = _hint(path, entries, inside)
    if not hint and (below := _sources_below(path, rename)):
        hint = f" (try --source {below})"
    return f"rename the classes{hint}" if not hint else f"give the folder of the classes{hint}, or rename them"


def _sources_below(path: str, rename: bool) -> str | None:
    """The first folder some levels below that is a source."""
    waiting, listed = [(path, 0)], 0
    while waiting and listed < LISTED_BELOW:
        place, level = waiting.pop(0)
        listed += 1
        entries = [entry for entry in list_folder(place) if not is_hidden(entry.name)]
        if _kind_by_entries(entries, rename) in ("class-folders", "folder-of-tars"):
            # Of a folder for a split, the one that has them all.
            return os.path.dirname(place) if level and split_of_folder(base_name(place)) else place
        if level < LEVELS_BELOW:
            waiting += [(f"{place}/{entry.name}", level + 1) for entry in entries if entry.kind == "folder"]
    return None


def _hint(path: str, entries: list[Entry], inside: dict[str, str | None]) -> str:
    folders = {entry.name for entry in entries if entry.kind == "folder"}
    if {"train", "val"} & folders:
        return f" (try --source {path}/train --val-source {path}/val)"
    hint = next((f" (try --source {path}/{name})" for name, there in inside.items() if there), "")
    archive = next((entry.name for entry in entries if ".tar" in entry.name and entry.kind == "file"), None)
    if sum(entry.name.endswith(".tar") for entry in entries) > 1 and not hint:
        return f" (try --source {path}/{archive}; or, of WebDataset shards, `python -m data_prep index {path}`)"
    return f" (try --source {path}/{archive})" if not hint and archive is not None else hint


def _kind_by_entries(entries: list[Entry], rename: bool) -> str | None:
    if any(entry.kind == "file" and synset_of_tar(entry.name, compressed=True, rename=rename) for entry in entries):
        return "folder-of-tars"
    if any(entry.kind == "folder" and class_of_name(entry.name, rename) for entry in entries):
        return "class-folders"
    return "ilsvrc-val" if any(val_number(entry.name) is not None for entry in entries) else None
