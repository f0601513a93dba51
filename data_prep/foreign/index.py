"""The `index` command: WebDataset tars that somebody else wrote become a data set where they lie.

Each tar's index is written when the tar has been read (`tar.py`), with what its samples say of their classes,
so that the same command goes on after an interruption; `dataset.json` is last.
"""

import argparse
import fnmatch
import hashlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from data_prep.foreign.tar import ForeignError, Scan, is_indexed, scan_tar
from data_prep.labels.spaces import label_space
from data_prep.manifest import MANIFEST_NAME, Manifest, ShardEntry, Split, index_path
from data_prep.progress import Progress
from data_prep.storage import Folder, is_url
from data_prep.writer import BUILD_FOLDER, BUILD_RECORD, BusyError, sole_writer

DESCRIPTION = """\
Make a data set of plain WebDataset tars: an index beside each, and dataset.json. The tars stay as they are.

The class of a sample is that of the WordNet id (n01440764) in its JSON ("wnid", "synset" or "filename") or at the
beginning of its key or folder; else the number in its .cls, or its JSON's "label": then --classes has to say which
class each number is. Every tar is read to its end once; the same command goes on after an interruption."""

DEFAULT_SPLITS = {"train": ["train*.tar"], "val": ["val*.tar"]}
LOCAL_THREADS, REMOTE_THREADS = 4, 16  # one stream of an object store gives 50 to 100 MB/s; each takes 8 MB here


def index_tars(
    folder: Folder,
    splits: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] | None = None,
    skip_unlabelled: bool = False,
) -> Manifest:
    """Index the tars of a folder and write its manifest. `splits`: glob patterns by split; `classes`: WordNet ids in
    the order of the class numbers, needed where samples have only numbers. Raises ForeignError.
    """
    if classes is not None and len(set(classes)) < len(classes):
        raise ForeignError("--classes lists a WordNet id twice: give each class once")
    sizes = folder.sizes()
    tars = _split_tars(folder, sizes, splits or DEFAULT_SPLITS)
    names = [name for found in tars.values() for name in found]
    if folder.folder(BUILD_FOLDER).exists(BUILD_RECORD):
        raise ForeignError(f"{folder.url} holds an unfinished build: finish it by the `shard` command that began it")
    with sole_writer(folder):
        _scan_all(folder, {name: sizes[name] or 0 for name in names}, classes, skip_unlabelled)
        return _finish(folder, tars, classes)


def _scan_all(folder: Folder, sizes: Mapping[str, int], classes: Sequence[str] | None, skip: bool) -> None:
    kept = {name for name, size in sizes.items() if is_indexed(folder, name, size, skip)}
    stop, lock = threading.Event(), threading.Lock()
    with Progress("tars", sum(sizes.values())) as progress:
        for name in kept:
            progress.advance(sizes[name], resumed=True)

        def advance(amount: int) -> None:
            if stop.is_set():
                raise ForeignError("another tar has failed")
            with lock:
                progress.advance(amount, images=0)

        def work(name: str) -> None:
            scan = scan_tar(folder, name, skip, advance)
            _write(folder, str(index_path(name)), scan.to_bytes(scan.labels(folder.join(name), classes)))
            with lock:
                progress.advance(0, images=len(scan.index), rejected=scan.about["left_out"])

        with ThreadPoolExecutor(LOCAL_THREADS if folder.is_local else REMOTE_THREADS) as threads:
            try:
                for done in as_completed([threads.submit(work, name) for name in sizes if name not in kept]):
                    done.result()
            except BaseException:
                stop.set()
                threads.shutdown(cancel_futures=True)
                raise


def _finish(folder: Folder, tars: Mapping[str, Sequence[str]], classes: Sequence[str] | None) -> Manifest:
    """Labels in the order of all classes, then the manifest."""

    def load(name: str) -> Scan:
        return Scan.from_bytes(folder.read(str(index_path(name))))

    files = [name for names in tars.values() for name in names]
    synsets = list(classes) if classes is not None else sorted({wnid for name in files for wnid in load(name).wnids})
    digest, left_out = hashlib.sha256("\n".join(synsets).encode()), 0
    splits: dict[str, Split] = {}
    for split, names in tars.items():
        counts, entries = np.zeros(len(synsets), np.int64), []
        for name in names:
            scan = load(name)
            labels = scan.labels(folder.join(name), synsets)
            data = scan.to_bytes(labels)
            if np.any(labels != scan.index.labels):
                _write(folder, str(index_path(name)), data)
            counts += np.bincount(labels, minlength=len(synsets))
            left_out += scan.about["left_out"]
            digest.update(f"\n{split} {name} {hashlib.sha256(data).hexdigest()}".encode())
            size, sha256 = scan.about["bytes"], scan.about["sha256"]
            entries.append(ShardEntry(file=name, samples=len(labels), bytes=size, sha256=sha256))
        splits[split] = Split(samples=int(counts.sum()), class_counts=counts.tolist(), shards=entries)
    if not any(split.samples for split in splits.values()):
        raise ForeignError(f"the tars of {folder.url} hold no sample: an image and its class, by WebDataset's names")
    manifest = Manifest(
        name=folder.url.rpartition("/")[2] or "tars",
        dataset_id=digest.hexdigest()[:32],
        synsets=synsets,
        splits=splits,
        settings={"indexed": True, "left_out": left_out},
    )
    _write(folder, MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _split_tars(folder: Folder, names: Iterable[str], splits: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    tars = sorted(name for name in names if name.endswith(".tar"))
    found: dict[str, list[str]] = {}
    for split, globs in splits.items():
        patterns = [pattern for glob in globs for pattern in braceexpand(glob)]
        mine = [name for name in tars if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if mine:
            found[split] = mine
    taken = [name for mine in found.values() for name in mine]
    twice = sorted({name for name in taken if taken.count(name) > 1}) if len(set(taken)) < len(taken) else []
    if twice:
        raise ForeignError(f"{folder.join(twice[0])} belongs to two splits: give --split patterns that keep them apart")
    if not found:
        there = f"its tars are {tars[0]}, ..." if tars else "it holds no .tar (compressed ones have to be unpacked)"
        asked = ", ".join(f"{split}={glob}" for split, globs in splits.items() for glob in globs)
        raise ForeignError(f"{folder.url} has no tar of {asked}; {there}: say which are which with --split train=GLOB")
    return found


def _write(folder: Folder, name: str, data: bytes) -> None:
    try:
        folder.write(name, data)
    except Exception as error:  # each store has its own
        if folder.is_local:
            raise
        text = " ".join(str(error).split())
        raise ForeignError(f"{folder.join(name)} cannot be written ({text}): copy the tars to where it can") from None


def ensure_indexed(path: str | Path) -> None:
    """Index a folder of tars that has no manifest yet; others, and unfinished builds, are left as they are.

    Hosts that come at the same time wait for the first. Raises ForeignError for a URL, where nothing tells them apart.
    """
    folder = Folder(path)
    if folder.exists(MANIFEST_NAME) or folder.folder(BUILD_FOLDER).exists(BUILD_RECORD) or not folder.names("*.tar"):
        return
    print(f"{path} holds tars and no {MANIFEST_NAME}: reading them once, as `python -m data_prep index {path}` does")
    if not folder.is_local:
        raise ForeignError(f"{path} has to be indexed first, once: `python -m data_prep index {path}`")
    while not folder.exists(MANIFEST_NAME):
        try:
            index_tars(folder)
        except BusyError:
            time.sleep(1.0)  # the other one may also fail: then the lock is free, and the fault is met here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `index`."""
    add = parser.add_argument
    add("data", metavar="DIR", help="folder of the tars, or its URL; the indexes are written beside them")
    add(
        "--split",
        action="append",
        default=[],
        metavar="NAME=GLOB",
        help="tars of a split, such as val='val-{00..63}.tar'; may be repeated (train='train*.tar', val='val*.tar')",
    )
    add("--classes", metavar="SPACE", help="label space of class numbers: a known name, a data set, or a text file")
    add("--skip-unlabelled", action="store_true", help="leave out samples without an image or a class")
    add("--force", action="store_true", help="write another dataset.json in place of one that this command wrote")


def run(args: argparse.Namespace) -> int:
    """Index, print what there is now."""
    folder = Folder(args.data if is_url(args.data) else Path(args.data).absolute())
    if folder.exists(MANIFEST_NAME):
        by_us = Manifest.load(folder.url).settings.get("indexed")
        if not by_us or not args.force:
            again = ": --force makes another" if by_us else ", built by `shard`: there is nothing to do"
            raise ForeignError(f"{args.data} has a {MANIFEST_NAME} already{again}")
    splits: dict[str, list[str]] = {}
    for text in args.split:
        name, equals, pattern = text.partition("=")
        if not (name and equals and pattern):
            raise ForeignError(f"--split {text!r} is not of the form NAME=GLOB, such as train='part-*.tar'")
        splits.setdefault(name, []).append(pattern)
    classes = label_space(args.classes) if args.classes else None
    manifest = index_tars(folder, splits, classes, args.skip_unlabelled)
    parts = ", ".join(f"{s.samples:,} {name} in {len(s.shards):,} tars" for name, s in manifest.splits.items())
    left_out = f"; {manifest.settings['left_out']:,} samples left out" if manifest.settings["left_out"] else ""
    print(f"{args.data}: {parts}; {manifest.num_classes:,} classes{left_out}")
    return 0
