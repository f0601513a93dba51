"""Shards -> one FFCV `.beton` per split. Sample i of the `.beton` is sample i of the concatenated shards, so a run
reads the same samples from either format.

FFCV's `DatasetWriter` starts workers and waits for them for ever when one of them raises, and takes some 300 bytes of
memory a sample. So the file is laid out here (`file.py`): an error is an error, the same shards give the same
bytes whatever the number of workers, and memory does not grow with the data set.

Where pixels have to be decoded, workers do it: a task is a range of samples of one shard, its result a temporary file
beside the `.beton`; these parts are appended in the order of the samples.
"""

import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.beton.file import RAW, TABLE_BYTES, BetonError, BetonFile, open_reader, page_size, require_ffcv
from data_prep.beton.sample import BetonSettings, Stored, plan_sample, store_sample
from data_prep.cluster import Cluster, InProcess
from data_prep.manifest import (
    MANIFEST_NAME,
    BetonEntry,
    Manifest,
    ShardEntry,
    ShardIndex,
    Split,
    file_sha256,
    index_path,
)
from data_prep.storage import Folder, atomic_path, refuse_unwritable
from data_prep.writer import clear_unfinished, sole_writer

DEFAULTS = BetonSettings()
RANGE_SAMPLES = 32  # some 30 MB of pixels: tenths of a second of work, against a millisecond of Dask's
RANGES_PER_SLOT = 16  # parts that may wait on disk for a slow one before them
CHECKED_SAMPLES = 200


def add_betons(
    directory: str | Path,
    manifest: Manifest,
    settings: BetonSettings = DEFAULTS,
    cluster: Cluster | None = None,
) -> Manifest:
    """Write the `.beton` of every split that has none with these settings; returns the manifest that lists them, and
    saves it. Raises BetonError.
    """
    if re.match(r"[A-Za-z][\w+.-]*:/", str(directory)):  # a Path made of a URL has lost one of its slashes
        raise BetonError(
            f"{directory} is not a local folder, and FFCV maps its files into memory: give --format webdataset, or a "
            "local folder"
        )
    directory = Path(directory)
    if not _without(directory, manifest, settings):
        return manifest
    require_ffcv()
    refuse_unwritable(Folder(directory), "copy the data set to where the .beton can be written beside it")
    with sole_writer(Folder(directory)):
        manifest = _newest(directory, manifest)
        clear_unfinished(directory)
        for name in _without(directory, manifest, settings, tell=True):
            entry = write_beton(directory, manifest, name, settings, cluster)
            split = manifest.splits[name].model_copy(update={"betons": [entry]})
            manifest = manifest.model_copy(update={"splits": {**manifest.splits, name: split}})
            manifest.save(directory)
    return manifest


def _newest(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest with what another run has added since `manifest` was read. Raises BetonError for another set."""
    if not (directory / MANIFEST_NAME).is_file():
        return manifest
    there = Manifest.load(directory)
    if there.dataset_id != manifest.dataset_id:
        raise BetonError(f"{directory} was built anew meanwhile by another run: give the same command again")
    betons = {name: {"betons": split.betons} for name, split in there.splits.items()}
    splits = {name: split.model_copy(update=betons.get(name, {})) for name, split in manifest.splits.items()}
    return manifest.model_copy(update={"splits": splits})


def _without(directory: Path, manifest: Manifest, settings: BetonSettings, *, tell: bool = False) -> list[str]:
    """The splits that have no `.beton` with these settings."""
    todo = []
    for name, split in manifest.splits.items():
        there = [entry for entry in split.betons if _is_there(directory, entry)]
        if not split.samples or [BetonSettings.of(e).described() for e in there] == [settings.described()]:
            continue
        todo.append(name)
        if there and tell:
            was, now = (
                " ".join(f"{k}={v}" for k, v in s.described().items()) for s in (BetonSettings.of(there[0]), settings)
            )
            print(f"{there[0].file} has {was}: it is written anew with {now}", file=sys.stderr)
    return todo


def _is_there(directory: Path, entry: BetonEntry) -> bool:
    path = directory / entry.file
    return path.is_file() and path.stat().st_size == entry.bytes


def write_beton(
    directory: Path,
    manifest: Manifest,
    split_name: str,
    settings: BetonSettings = DEFAULTS,
    cluster: Cluster | None = None,
) -> BetonEntry:
    """Write `SPLIT.beton` from the shards of a split and check it. Raises BetonError, leaving no file, when a shard
    differs from the manifest or holds an image that FFCV cannot hold, or the disk is too small.
    """
    cluster = cluster or InProcess()
    directory = directory.absolute()  # workers may stand elsewhere
    split = manifest.split(split_name)
    path = directory / f"{split_name}.beton"
    largest, total = _measure(directory, split, settings, cluster, path.name)
    page_bytes = page_size(largest)
    _check_disk(path, split.samples, total, page_bytes, 0 if settings.copies else cluster.slots())
    with atomic_path(path) as temp:
        with (
            BetonFile(temp, split.samples, page_bytes) as file,
            tqdm(total=split.samples, desc=path.name, unit="image", disable=None) as progress,
        ):
            for label, stored in _samples_in_order(directory, manifest, split, settings, cluster, temp):
                file.add(*stored, label)
                progress.update()
            file.finish()
            width, height = file.max_width, file.max_height
        _check_beton(temp, directory, manifest, split, settings)
        return BetonEntry(
            file=path.name,
            samples=split.samples,
            bytes=temp.stat().st_size,
            sha256=file_sha256(temp),
            write_mode=settings.mode,
            settings=settings.described(),
            page_size_bytes=page_bytes,
            max_height=height,
            max_width=width,
        )


def _measure(directory: Path, split: Split, settings: BetonSettings, cluster: Cluster, name: str) -> tuple[int, int]:
    """Check all shards against the manifest; upper bounds of the bytes of (the largest image, all images)."""
    largest, total = 0, 0
    tasks = [(directory, shard, settings) for shard in split.shards]
    with tqdm(total=split.samples, desc=f"shards for {name}", unit="image", disable=None) as progress:
        for (_, shard, _), (largest_here, total_here) in cluster.run(_measure_shard, tasks):
            largest, total = max(largest, largest_here), total + total_here
            progress.update(shard.samples)
    return largest, total


def _measure_shard(task: tuple[Path, ShardEntry, BetonSettings]) -> tuple[int, int]:
    directory, shard, settings = task
    path = directory / shard.file
    if not path.is_file():
        raise BetonError(f"shard {path} is missing: rebuild the dataset with --force")
    if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
        raise BetonError(f"shard {path} is not the file dataset.json describes (size or sha256): rebuild with --force")
    largest, total = 0, 0
    for key, _, jpeg in _read(path, ShardIndex.load(index_path(path))):
        plan = plan_sample(jpeg, key, shard.file, settings)
        pixels = 3 * plan.width * plan.height
        # What is encoded anew is hardly ever larger than the larger original, and never than its pixels.
        largest = max(largest, len(jpeg) if plan.copied else pixels)
        total += pixels if plan.mode == RAW else len(jpeg)
    return largest, total


def _check_disk(path: Path, samples: int, payload: int, page_bytes: int, slots: int) -> None:
    """Raise BetonError where the disk has no room for the file, and for the parts that wait to be appended."""
    mean = payload / max(1, samples)
    needed = payload / (1 - min(0.5, mean / 2 / page_bytes))  # on average half an image is lost at the end of a page
    needed += 2 * page_bytes + TABLE_BYTES * samples
    needed += min(payload, slots * RANGES_PER_SLOT * RANGE_SAMPLES * mean)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise BetonError(
            f"{path.name} needs about {needed / 1e9:.2f} GB, {path.parent} has {free / 1e9:.2f} GB free: make room, or "
            "choose the write mode jpg or a smaller maximum resolution"
        )


def _read(path: Path, index: ShardIndex) -> Iterator[tuple[str, int, bytes]]:
    """(key, label, JPEG) of the samples of an index."""
    with open(path, "rb") as file:
        for key, label, offset, size in zip(index.keys, index.labels, index.offsets, index.sizes, strict=True):
            yield str(key), int(label), os.pread(file.fileno(), int(size), int(offset))


@dataclass(frozen=True)
class _Range:
    """A range of the samples of a shard, to be stored into the file `part`."""

    number: int
    shard: Path
    index: ShardIndex
    settings: BetonSettings
    part: Path


def _store_range(task: _Range) -> list[tuple[int, int, int, int]]:
    """Write the samples' data into the part; returns (mode, width, height, bytes) of each."""
    rows = []
    # A task may run twice, when its first worker seems to be gone: each writes a file of its own.
    own = task.part.with_name(f"{task.part.name}-{socket.gethostname()}-{os.getpid()}")
    with open(own, "wb") as file:
        for key, _, jpeg in _read(task.shard, task.index):
            stored = store_sample(jpeg, key, task.shard.name, task.settings)
            rows.append((stored.mode, stored.width, stored.height, len(stored.data)))
            file.write(stored.data)
    os.replace(own, task.part)
    return rows


def _samples_in_order(
    directory: Path, manifest: Manifest, split: Split, settings: BetonSettings, cluster: Cluster, temp: Path
) -> Iterator[tuple[int, Stored]]:
    """(label, stored sample) of the whole split."""
    if settings.copies:  # nothing to compute: only bytes to copy
        for shard in split.shards:
            for key, label, jpeg in _read(directory / shard.file, manifest.load_index(directory, shard)):
                yield label, store_sample(jpeg, key, shard.file, settings)
        return
    ranges = iter(_ranges(directory, manifest, split, settings, temp))
    try:
        # Group by group, so that no more than a group waits on disk for a part that is late.
        while group := list(islice(ranges, cluster.slots() * RANGES_PER_SLOT)):
            yield from _group_in_order(group, cluster)
    finally:
        for left in temp.parent.glob(_part(temp, "*")):
            left.unlink(missing_ok=True)


def _part(temp: Path, number: int | str) -> str:
    return f"{temp.name}-part-{number}"


def _ranges(directory: Path, manifest: Manifest, split: Split, settings: BetonSettings, temp: Path) -> Iterator[_Range]:
    number = 0
    for shard in split.shards:
        index = manifest.load_index(directory, shard)
        for start in range(0, len(index), RANGE_SAMPLES):
            cut = slice(start, start + RANGE_SAMPLES)
            piece = ShardIndex(index.keys[cut], index.offsets[cut], index.sizes[cut], index.labels[cut])
            yield _Range(number, directory / shard.file, piece, settings, temp.with_name(_part(temp, number)))
            number += 1


def _group_in_order(group: list[_Range], cluster: Cluster) -> Iterator[tuple[int, Stored]]:
    done: dict[int, list[tuple[int, int, int, int]]] = {}
    waiting = iter(group)
    task = next(waiting, None)
    for finished, rows in cluster.run(_store_range, group):
        done[finished.number] = rows
        while task is not None and task.number in done:
            with open(task.part, "rb") as file:
                for label, row in zip(task.index.labels, done.pop(task.number), strict=True):
                    mode, width, height, size = row
                    yield int(label), Stored(mode, width, height, file.read(size))
            task.part.unlink()
            task = next(waiting, None)


def _check_beton(temp: Path, directory: Path, manifest: Manifest, split: Split, settings: BetonSettings) -> None:
    """Read the file back with FFCV's reader: count, labels, ids and sizes of all samples, bytes of some."""
    reader = open_reader(temp)
    failed = [] if int(reader.num_samples) == len(reader.alloc_table) == split.samples else ["count"]
    chosen = np.unique(np.linspace(0, split.samples - 1, CHECKED_SAMPLES).astype(int))  # the last too
    start = 0
    for shard in [] if failed else split.shards:
        index = manifest.load_index(directory, shard)
        here = slice(start, start + len(index))
        failed += rows_that_differ(reader.metadata[here], reader.alloc_table[here], index, start, settings)
        picked = chosen[(chosen >= start) & (chosen < start + len(index))] - start
        piece = ShardIndex(index.keys[picked], index.offsets[picked], index.sizes[picked], index.labels[picked])
        with open(temp, "rb") as file:
            for row, (key, _, jpeg) in zip(picked + start, _read(directory / shard.file, piece), strict=True):
                wanted = store_sample(jpeg, key, shard.file, settings)
                size, pointer = (int(reader.alloc_table[row][name]) for name in ("size", "ptr"))
                image = reader.metadata[row]["f0"]
                if tuple(int(image[name]) for name in ("mode", "width", "height")) != wanted[:3]:
                    failed.append(f"size in pixels of sample {row}")
                if os.pread(file.fileno(), size, pointer) != wanted.data:
                    failed.append(f"bytes of sample {row}")
        if failed:
            break
        start += len(index)
    if failed:
        raise BetonError(f"the FFCV file does not read back as written ({', '.join(failed)}): is the disk full?")


def rows_that_differ(
    metadata: np.ndarray, allocations: np.ndarray, index: ShardIndex, start: int, settings: BetonSettings
) -> list[str]:
    """Which of FFCV's table rows for the samples of a shard, from sample `start` on, do not fit its index."""
    image = metadata["f0"]
    raw = 3 * image["width"].astype(np.int64) * image["height"]
    checks = {
        "labels": np.array_equal(metadata["f1"], index.labels),
        "sample ids": np.array_equal(metadata["f2"], np.arange(start, start + len(index))),
        "samples of the allocations": np.array_equal(allocations["sample_id"], metadata["f2"]),
        "addresses": np.array_equal(allocations["ptr"], image["data_ptr"]),
        "bytes of raw images": np.array_equal(allocations["size"][image["mode"] == RAW], raw[image["mode"] == RAW]),
        "image bytes": not settings.copies or np.array_equal(allocations["size"], index.sizes),
    }
    return [name for name, passed in checks.items() if not passed]
