"""WebDataset tars that somebody else wrote become a data set where they lie.

Each tar's index is written when the tar has been read (`tar.py`), with what its samples say of their classes,
so that the same command goes on after an interruption; `dataset.json` is last.
"""

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.credentials import without_credentials
from data_prep.foreign.scan import ForeignError, Scan
from data_prep.foreign.splits import DEFAULT_SPLITS, promised_samples, split_tars, why_no_tar
from data_prep.foreign.tar import NOTHING, Accepted, is_indexed, scan_tar, tars_elsewhere
from data_prep.manifest import MANIFEST_NAME, Manifest, ShardEntry, Split, dataset_folder, index_path
from data_prep.progress import Progress
from data_prep.shards.info import INFO_NAME
from data_prep.storage import Folder, refuse_unwritable
from data_prep.writer import BUILD_FOLDER, BUILD_RECORD, BusyError, sole_writer

LOCAL_THREADS, REMOTE_THREADS = 4, 16  # one stream of an object store gives 50 to 100 MB/s; each takes 8 MB here


@dataclass(frozen=True)
class Indexing:
    """What is indexed, and how. at: where indexes and manifest go, else beside the tars; splits: glob patterns by
    split; classes: WordNet ids in the order of the class numbers, needed where samples have only numbers; only: take
    just the samples of these classes; accepted: what may be less than whole.
    """

    folder: Folder
    at: Folder
    splits: Mapping[str, Sequence[str]] = field(default_factory=lambda: DEFAULT_SPLITS)
    classes: Sequence[str] | None = None
    only: bool = False
    accepted: Accepted = NOTHING

    @property
    def wanted(self) -> Sequence[str] | None:
        """The classes outside of which samples are skipped."""
        return self.classes if self.only else None

    def taken(self, scan: Scan, name: str) -> Scan:
        """Of a tar's samples those that are wanted."""
        return scan if self.wanted is None else scan.only(self.folder.join(name), self.wanted)


def index_tars(task: Indexing, *, replace: bool = False) -> Manifest:
    """Index the tars of a folder and write its manifest. With `replace` in place of another that this command wrote.
    Raises ForeignError; BusyError where another process is at it.
    """
    if task.classes is not None and len(set(task.classes)) < len(task.classes):
        raise ForeignError("--classes lists a WordNet id twice: give each class once")
    if task.folder.is_local and not Path(task.folder.url).exists():
        raise ForeignError(f"{task.folder.url} does not exist: check the path")
    sizes = task.folder.sizes()
    tars = split_tars(task.folder, sizes, task.splits)
    promised = promised_samples(task.folder, sizes, all_of_them=task.splits is DEFAULT_SPLITS)
    names = [name for found in tars.values() for name in found]
    if tars_elsewhere(task.folder, task.at) and without_credentials(task.folder.url) != task.folder.url:
        raise ForeignError(
            f"{without_credentials(task.folder.url)}: with --index-folder its address is kept in {MANIFEST_NAME}, and "
            f"it holds a password: give it without (fsspec's own configuration files hold it for all commands)"
        )
    refuse_unwritable(task.at, _elsewhere(task.folder))
    with sole_writer(task.at):
        # Under the lock: another run may have come before.
        refuse_present(task.at, replace)
        if task.at.folder(BUILD_FOLDER).exists(BUILD_RECORD):
            raise ForeignError(
                f"{task.at.url} holds an unfinished build: finish it by the `shard` command that began it"
            )
        _scan_all(task, {name: sizes[name] or 0 for name in names}, promised)
        return _finish(task, tars)


def refuse_present(folder: Folder, replace: bool) -> None:
    """Raise ForeignError where there is a manifest that is not to be replaced."""
    if folder.exists(MANIFEST_NAME):
        by_us = Manifest.load(folder.url).settings.get("indexed")
        if not by_us or not replace:
            again = ": --force makes another" if by_us else ", built by `shard`: there is nothing to do"
            raise ForeignError(f"{folder.url} has a {MANIFEST_NAME} already{again}")


def _elsewhere(folder: Folder) -> str:
    return f"run `python -m data_prep index {folder.url} --index-folder DIR`, and train with data.path=DIR"


def _scan_all(task: Indexing, sizes: Mapping[str, int], promised: Mapping[str, int]) -> None:
    folder = task.folder
    kept = {name for name, size in sizes.items() if is_indexed(folder, name, size, task.accepted, task.at, task.wanted)}
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
            scan = scan_tar(folder, name, task.accepted, advance)
            held = len(scan.index) + scan.about["left_out"]
            if held < promised.get(name, 0):
                raise ForeignError(
                    f"{folder.join(name)} holds {held:,} samples, {INFO_NAME} says {promised[name]:,}: copy it again, "
                    f"or remove {INFO_NAME} where that is wrong"
                )
            if elsewhere := tars_elsewhere(folder, task.at):
                scan.about["tars"] = elsewhere
            scan = task.taken(scan, name)
            _write(task.at, str(index_path(name)), scan.to_bytes(scan.labels(folder.join(name), task.classes)))
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


def _finish(task: Indexing, tars: Mapping[str, Sequence[str]]) -> Manifest:
    """Labels in the order of all classes, then the manifest."""
    folder, at, classes = task.folder, task.at, task.classes

    def load(name: str) -> Scan:
        return Scan.from_bytes(at.read(str(index_path(name))))

    files = [name for names in tars.values() for name in names]
    synsets = list(classes) if classes is not None else sorted({wnid for name in files for wnid in load(name).wnids})
    digest, left_out, others = hashlib.sha256("\n".join(synsets).encode()), 0, 0
    splits: dict[str, Split] = {}
    for split, names in tars.items():
        counts, entries = np.zeros(len(synsets), np.int64), []
        for name in names:
            before = load(name)
            scan = task.taken(before, name)
            labels = scan.labels(folder.join(name), synsets)
            data = scan.to_bytes(labels)
            if len(scan.index) < len(before.index) or np.any(labels != scan.index.labels):
                _write(at, str(index_path(name)), data)
            left_out += scan.about["left_out"]
            others += scan.about.get("others", 0)
            if task.only and not len(labels):
                continue  # a tar of other classes only is none of this data set
            counts += np.bincount(labels, minlength=len(synsets))
            digest.update(f"\n{split} {name} {hashlib.sha256(_own(data)).hexdigest()}".encode())
            size, sha256 = scan.about["bytes"], scan.about["sha256"]
            entries.append(ShardEntry(file=name, samples=len(labels), bytes=size, sha256=sha256))
        splits[split] = Split(samples=int(counts.sum()), class_counts=counts.tolist(), shards=entries)
    if not any(split.samples for split in splits.values()):
        which = " of the classes given" if task.only else ""
        raise ForeignError(
            f"the tars of {folder.url} hold no sample{which}: an image and its class, by WebDataset's names"
        )
    settings: dict[str, Any] = {"indexed": True, "left_out": left_out}
    settings |= {"others": others} if task.only else {}
    settings |= {"tars": folder.url} if tars_elsewhere(folder, at) else {}
    manifest = Manifest(
        format_version=1,  # what came with 2 is not of theirs
        name=without_credentials(folder.url).rpartition("/")[2] or "tars",
        dataset_id=digest.hexdigest()[:32],
        synsets=synsets,
        splits=splits,
        settings=settings,
    )
    _write(at, MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _own(index: bytes) -> bytes:
    """An index file as it is beside the tars: where it is kept does not make another data set."""
    scan = Scan.from_bytes(index)
    if scan.about.pop("tars", None) is None:
        return index
    return scan.to_bytes(scan.index.labels)


def _write(folder: Folder, name: str, data: bytes) -> None:
    try:
        folder.write(name, data)
    except Exception as error:  # each store has its own
        if folder.is_local:
            raise
        text = " ".join(str(error).split())
        raise ForeignError(
            f"{folder.join(name)} cannot be written ({text}): keep the indexes elsewhere, with --index-folder"
        ) from None


def ensure_indexed(path: str | Path) -> None:
    """Index a folder of tars that has no manifest yet; others, and unfinished builds, are left as they are.

    Runs that come at the same time wait for the first. Raises ForeignError for a URL, where nothing tells them apart,
    and where the tars are compressed or in folders of their own; StorageError where the folder cannot be written to.
    """
    folder = Folder(dataset_folder(path))
    if folder.exists(MANIFEST_NAME) or folder.folder(BUILD_FOLDER).exists(BUILD_RECORD):
        return
    if not folder.names("*.tar"):
        if folder.is_local and Path(folder.url).is_dir() and (why := why_no_tar(folder, folder.names())):
            raise ForeignError(why)
        return
    if not folder.is_local:
        raise ForeignError(f"{path} has to be indexed first, once: `python -m data_prep index {path}`")
    refuse_unwritable(folder, f"its tars have no {MANIFEST_NAME} yet, {_elsewhere(folder)}")
    print(
        f"{path} holds tars and no {MANIFEST_NAME}: reading them once, as `python -m data_prep index {path}` does",
        flush=True,
    )
    while not folder.exists(MANIFEST_NAME):
        try:
            index_tars(Indexing(folder, folder))
        except BusyError:
            time.sleep(1.0)  # the other one may also fail: then the lock is free, and the fault is met here
        except ForeignError:
            if not folder.exists(MANIFEST_NAME):  # else another run was first
                raise
