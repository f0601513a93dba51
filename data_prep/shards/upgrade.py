"""`index --upgrade`: a data set of ours of a former format, or one that lost an index, gets what it lacks, in place.

No image is touched: a shard is read once, checked against its checksum, and written again with a `KEY.cls` beside each
image; it takes the old one's name when it is whole. What is done is noted in OUTPUT/.data_prep/upgrade, so that a
killed upgrade goes on; until its end `dataset.json` says that one is under way, for a run would find shards and
indexes that do not fit. The data set keeps its `dataset_id`: it holds the same samples in the same order, and the runs
that began on it go on. In all else the files are those that a build of today writes.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data_prep.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, ShardEntry, index_path
from data_prep.progress import Progress
from data_prep.shards.info import INFO_NAME, info_bytes
from data_prep.shards.tar import CLASS_BYTES, ShardTar, ShardTarError, ShardTarReader, class_of
from data_prep.storage import DataPrepError, Folder, open_binary, refuse_unwritable
from data_prep.writer import BUILD_FOLDER, clear_unfinished, sole_writer

FORMER_VERSION = 1
RECORDS = "upgrade"  # in the folder of unfinished work: the new entry of each shard that is done
THREADS = 4  # a disk, or the stores' streams, are what is waited for; each may write a shard


class UpgradeError(DataPrepError):
    """The data set cannot be upgraded, or not there."""


class ShardUpgrade(NamedTuple):
    """One shard: `entry` is what is known of it, of before or after; `synsets`: WordNet ids by label; `record`: where
    the new entry is noted.
    """

    folder: Folder
    entry: ShardEntry
    synsets: tuple[str, ...]
    record: Folder

    def __str__(self) -> str:
        return self.entry.file


def upgrade_dataset(folder: Folder) -> tuple[Manifest, int]:
    """Add what the data set in `folder` lacks; returns its manifest and how many shards were not whole before.

    Raises UpgradeError or ShardTarError; what is done by then stays, and so does a data set that can be read.
    """
    before = Manifest.load(folder.url, unfinished=True)
    if before.settings.get("indexed"):
        raise UpgradeError(
            f"{folder.url} is made of tars of others, which stay as they are: leave out --upgrade, and give --force to "
            "index them anew"
        )
    refuse_unwritable(folder, "copy the data set to where it can be written to")
    with sole_writer(folder):
        before = Manifest.load(folder.url, unfinished=True)  # another run may have come before
        if folder.is_local:
            clear_unfinished(Path(folder.url))
        work = folder.folder(BUILD_FOLDER)
        done = _done(folder, work.folder(RECORDS), before)
        shards = [entry for split in before.splits.values() for entry in split.shards]
        todo = [entry for entry in shards if entry.file not in done]
        if todo:
            _refuse_small_disk(folder, todo)
            _write(folder, MANIFEST_NAME, _under_way(before).to_bytes())
            try:
                _upgrade_all(folder, before, todo, done)
            except BaseException:
                # Shards of both formats are a data set of the former one.
                former = before.upgrading or before.format_version < FORMAT_VERSION
                version = FORMER_VERSION if former else FORMAT_VERSION
                part = before.model_copy(update={"upgrading": False, "format_version": version})
                _write(folder, MANIFEST_NAME, _with_entries(part, done).to_bytes())
                raise
        update = {"format_version": FORMAT_VERSION, "upgrading": False}
        after = _with_entries(before, done).model_copy(update=update)
        for name, data in ((INFO_NAME, info_bytes(after)), (MANIFEST_NAME, after.to_bytes())):
            if not folder.exists(name) or folder.read(name) != data:
                _write(folder, name, data)
        work.folder(RECORDS).remove_all()
        if work.is_local:
            with suppress(OSError):  # a build's work may be in there, too
                os.rmdir(work.url)
    return after, len(todo)


def upgrade_shard(task: ShardUpgrade) -> ShardEntry:
    """Write a shard with the class numbers that it lacks, its index, and the record that both are there.

    One that has them all only gets its index. Raises ShardTarError where it is not the shard that `entry` describes.
    """
    folder, name = task.folder, task.entry.file
    if folder.size(name) is None:
        raise ShardTarError(f"{folder.join(name)} is missing: copy it there again")
    if _has_classes(folder, name):
        tar = ShardTar(None)
        _copy(task, tar)
        _note_index(task, tar)
    else:
        with folder.writing(name) as temp:
            with open(temp, "wb") as file:
                tar = ShardTar(file)
                _copy(task, tar)
            # Before the shard gets its name, as in a build.
            _note_index(task, tar)
    entry = tar.entry(name)
    task.record.write(f"{name}.json", entry.model_dump_json().encode())
    return entry


def _copy(task: ShardUpgrade, tar: ShardTar) -> None:
    """All samples into `tar`, after which it is finished; the shard that was read is the one that is meant."""
    # What a shard with class numbers was before it had them, by which that is known after a kill.
    plain = ShardTar(None, with_classes=False)
    with open_binary(task.folder.join(task.entry.file)) as file:
        reader = ShardTarReader(file, task.folder.join(task.entry.file))
        has_classes = False
        for sample in reader:
            try:
                label, wnid = class_of(sample.described)
            except ValueError as error:
                raise reader.fault(f"{sample.key}: {error}") from None
            if not 0 <= label < len(task.synsets) or task.synsets[label] != wnid or sample.label not in (None, label):
                raise reader.fault(f"{sample.key} has another class in its JSON than in its .cls or {MANIFEST_NAME}")
            tar.add(sample.key, sample.jpeg, label, sample.described)
            has_classes |= sample.label is not None
            if has_classes:
                plain.add(sample.key, sample.jpeg, label, sample.described)
    tar.finish()
    read, wanted = reader.digest.hexdigest(), task.entry.sha256
    if has_classes:
        plain.finish()
        whole = read == tar.digest.hexdigest() and wanted in (read, plain.digest.hexdigest())
    else:
        whole = read == wanted
    if not whole:
        raise reader.fault(f"it differs from the sha256 in {MANIFEST_NAME}")


def _has_classes(folder: Folder, name: str) -> bool:
    with open_binary(folder.join(name)) as file:
        sample = next(iter(ShardTarReader(file, folder.join(name))), None)
    return sample is None or sample.label is not None


def _note_index(task: ShardUpgrade, tar: ShardTar) -> None:
    _write(task.folder, str(index_path(task.entry.file)), tar.index().to_bytes())


def _done(folder: Folder, records: Folder, manifest: Manifest) -> dict[str, ShardEntry]:
    """The entries of shards that lack nothing."""
    done = {}
    for name in records.names("*.json"):
        entry = ShardEntry.model_validate_json(records.read(name))
        done[entry.file] = entry
    if manifest.format_version >= FORMAT_VERSION and not manifest.upgrading:
        done |= {entry.file: entry for split in manifest.splits.values() for entry in split.shards}
    there = folder.sizes()
    return {
        name: entry
        for name, entry in done.items()
        if there.get(name, -1) in (None, entry.bytes) and str(index_path(name)) in there
    }


def _upgrade_all(folder: Folder, manifest: Manifest, todo: list[ShardEntry], done: dict[str, ShardEntry]) -> None:
    """Every shard of `todo`; its new entry goes into `done`. After a failure, those under way are finished."""
    stop = threading.Event()
    synsets, records = tuple(manifest.synsets), folder.folder(BUILD_FOLDER).folder(RECORDS)

    def work(entry: ShardEntry) -> ShardEntry:
        if not stop.is_set():
            done[entry.file] = upgrade_shard(ShardUpgrade(folder, entry, synsets, records))
        return entry

    with Progress("shards", sum(entry.bytes for entry in (*todo, *done.values()))) as progress:
        for entry in list(done.values()):
            progress.advance(entry.bytes, resumed=True)
        with ThreadPoolExecutor(THREADS) as threads:
            futures = [threads.submit(work, entry) for entry in todo]
            try:
                for future in as_completed(futures):
                    entry = future.result()
                    progress.advance(entry.bytes, images=entry.samples)
            except BaseException:
                stop.set()
                raise


def _under_way(manifest: Manifest) -> Manifest:
    """The manifest of before, which no reader takes: a former version's, for it is told of a newer one."""
    return manifest.model_copy(update={"format_version": FORMAT_VERSION, "upgrading": True})


def _with_entries(manifest: Manifest, entries: Mapping[str, ShardEntry]) -> Manifest:
    splits = {
        name: split.model_copy(update={"shards": [entries.get(entry.file, entry) for entry in split.shards]})
        for name, split in manifest.splits.items()
    }
    return manifest.model_copy(update={"splits": splits})


def _refuse_small_disk(folder: Folder, todo: list[ShardEntry]) -> None:
    """Shards grow a little, and each thread writes one beside the old."""
    largest = max(entry.bytes + CLASS_BYTES * entry.samples for entry in todo)
    needed = largest * min(THREADS, len(todo))
    needed += sum(CLASS_BYTES * entry.samples for entry in todo) if folder.is_local else 0
    place = folder.url if folder.is_local else tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UpgradeError(
            f"{place} has {free / 1e9:.2f} GB free, and the upgrade needs {needed / 1e9:.2f} GB: make room there"
        )


def _write(folder: Folder, name: str, data: bytes) -> None:
    try:
        folder.write(name, data)
    except Exception as error:  # each store has its own
        if folder.is_local:
            raise
        raise UpgradeError(f"{folder.join(name)} cannot be written ({' '.join(str(error).split())})") from None
