"""The `verify` command: is a data set whole? Every file against the manifest, every sample decoded."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.beton.file import BetonError, open_reader, require_ffcv
from data_prep.beton.sample import BetonSettings
from data_prep.cluster import Cluster, add_cluster_arguments, open_cluster
from data_prep.ledger import LEDGER_NAME
from data_prep.manifest import (
    DENSE,
    MANIFEST_NAME,
    BetonEntry,
    Manifest,
    ManifestError,
    ShardIndex,
    dataset_folder,
    index_path,
    kind_of,
    read_manifest,
)
from data_prep.shards.info import INFO_NAME, info_bytes
from data_prep.storage import Folder, is_url, open_binary, user_path
from data_prep.verify.dense import verify_dense
from data_prep.verify.problems import Problem, Problems, check_file, local_copy
from data_prep.verify.shard import BetonRows, ShardResult, ShardTask, check_shard, key_hashes

STORED_ACTIONS = ("kept", "repaired", "held_out")
NAMED_KEYS = 20  # keys found twice that are named, of however many


@dataclass
class Report:
    """What was looked at, and what is wrong with it. `notes`: what could not be checked."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    splits: int = 0
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    betons: int = 0


@dataclass(frozen=True)
class BetonTask:
    """The checksum of one `.beton`."""

    folder: Folder
    beton: BetonEntry

    def __str__(self) -> str:
        return self.beton.file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.description = (
        "Decode every sample of a data set and check all of its files: against dataset.json (sizes, sha256, counts), "
        "the shards against their indexes and JSONs, the ledger and the FFCV files against the shards. Lists all "
        "problems; the exit code is 1 where there are any. Of a data set of masks or boxes: also masks and boxes."
    )
    parser.add_argument("data", type=user_path, metavar="DIR", help="folder of the data set, or its URL")
    parser.add_argument("--fast", action="store_true", help="sizes, indexes, counts and manifest only: decode nothing")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check, print what was found; 0 when the data set is whole, 1 when not."""
    started = time.monotonic()
    with open_cluster(args) as cluster:
        # Workers may run in another folder.
        data = dataset_folder(args.data)
        folder = Folder(data if is_url(data) else os.path.abspath(data))
        report = _verify_any(folder, cluster, args.fast)
    for problem in report.problems:
        print(f"{problem.file}: {problem.text}")
    for note in report.notes:
        print(f"note: {note}")
    seen = (
        f"{report.splits} splits, {report.shards:,} shards, {report.samples:,} samples "
        f"({'not decoded' if args.fast else 'decoded'}), {report.bytes / 1e6:,.1f} MB, {report.betons} FFCV files, "
        f"{time.monotonic() - started:,.0f} s"
    )
    if report.problems:
        files = len({problem.file for problem in report.problems})
        print(f"{args.data} is NOT whole: {len(report.problems)} problem(s) in {files} file(s); looked at {seen}")
        return 1
    print(f"{args.data} is whole: {seen}")
    return 0


def _verify_any(folder: Folder, cluster: Cluster, fast: bool) -> Report:
    """A data set of either kind."""
    try:
        dense = kind_of(read_manifest(folder.url)[1]) == DENSE
    except ManifestError:
        dense = False  # told below
    if not dense:
        return verify_dataset(folder, cluster, fast=fast)
    found = verify_dense(folder, cluster, fast=fast)
    return Report(found.problems, [], found.splits, found.shards, found.samples, found.bytes)


def verify_dataset(folder: Folder | str | Path, cluster: Cluster, fast: bool = False) -> Report:
    """Check a data set, local or remote; `fast` reads neither images nor checksums.

    Memory here: 16 bytes a sample; in a worker: one image, and the members of one shard.
    """
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    try:
        manifest = Manifest.load(folder.url)
    except ManifestError as error:
        return Report([Problem(MANIFEST_NAME, str(error))])
    report, problems = Report(splits=len(manifest.splits)), Problems()
    _check_strays(folder, manifest, problems)
    _check_info(folder, manifest, problems)
    _check_ledger(folder, manifest, problems, report.notes)
    readers = _open_betons(folder, manifest, fast, problems, report)
    counts = {name: np.zeros(manifest.num_classes, np.int64) for name in manifest.splits}
    uncounted: set[str] = set()  # splits of which some samples could not be read
    hashes: list[np.ndarray] = []
    found = [("", problem) for problem in problems.listed()]  # with the task that found it
    with tqdm(
        total=sum(split.samples for split in manifest.splits.values()),
        unit="image",
        desc="verify",
        mininterval=0.5 if sys.stderr.isatty() else 15,  # a log file is not a terminal
    ) as progress:
        for task, result in cluster.run(_check, _tasks(folder, manifest, readers, fast)):
            found += [(str(task), problem) for problem in result.problems]
            if isinstance(task, ShardTask):
                report.shards += 1
                report.samples += result.samples
                report.bytes += task.shard.bytes
                hashes.append(result.key_hashes)
                if result.label_counts is None:
                    uncounted.add(task.split)
                else:
                    counts[task.split] += result.label_counts
            progress.set_postfix(problems=len(found), refresh=False)
            progress.update(result.samples)
    problems = Problems()
    for name, split in manifest.splits.items():
        if name in uncounted:
            report.notes.append(f"class_counts of {name} were not checked: some of its samples cannot be read")
            continue
        for label in np.flatnonzero(counts[name] != split.class_counts).tolist():
            problems.add(
                MANIFEST_NAME,
                f"in class_counts of {name}, which the shards do not hold",
                f"{manifest.synsets[label]} has {split.class_counts[label]} ({int(counts[name][label])} in the shards)",
            )
    _check_keys(folder, manifest, hashes, problems)
    found += [("", problem) for problem in problems.listed()]
    # Results come in the order of completion; the list of problems does not.
    report.problems = [problem for _, problem in sorted(found, key=lambda pair: (pair[1].file, pair[0]))]
    return report


def _check(task: ShardTask | BetonTask) -> ShardResult:
    if isinstance(task, ShardTask):
        return check_shard(task)
    problems = Problems()
    try:
        with local_copy(task.folder, task.beton.file) as path:
            check_file(task.folder, task.beton, problems, path)
    except OSError as error:
        problems.add(task.beton.file, f"cannot be read: {error}")
    return ShardResult(problems.listed())


def _tasks(folder: Folder, manifest: Manifest, readers: dict[str, Any], fast: bool) -> Iterator[ShardTask | BetonTask]:
    for split in manifest.splits.values():  # first: each is one long task
        for beton in split.betons:
            if folder.exists(beton.file) and not fast:
                yield BetonTask(folder, beton)
    synsets = np.array([synset.encode() for synset in manifest.synsets], "S9")
    shards = Folder(manifest.shards_folder(folder.url))
    for name, split in manifest.splits.items():
        start = 0
        for shard in split.shards:
            rows = None
            if name in readers:
                (beton,), reader, here = split.betons, readers[name], slice(start, start + shard.samples)
                rows = BetonRows(
                    Path(folder.join(beton.file)),
                    BetonSettings.of(beton),
                    start,
                    np.array(reader.metadata[here]),
                    np.array(reader.alloc_table[here]),
                )
            foreign, with_classes = bool(manifest.settings.get("indexed")), manifest.format_version > 1
            yield ShardTask(folder, shards, name, shard, synsets, fast, rows, foreign, with_classes)
            start += shard.samples


def _open_betons(folder: Folder, manifest: Manifest, fast: bool, problems: Problems, report: Report) -> dict[str, Any]:
    """FFCV's reader of each split whose samples can be compared; checks that the files are there."""
    readers: dict[str, Any] = {}
    for name, split in manifest.splits.items():
        for beton in split.betons:
            report.betons += 1
            if fast or not folder.exists(beton.file):
                check_file(folder, beton, problems, None)
                continue
            if not folder.is_local or len(split.betons) != 1 or not _has_ffcv():
                report.notes.append(
                    f"{beton.file}: only its checksum was compared; its samples are where FFCV is installed, and the "
                    "data set is a local one with one .beton for each split"
                )
                continue
            try:
                BetonSettings.of(beton)
                reader = open_reader(Path(folder.join(beton.file)))
            except BetonError as error:
                problems.add(beton.file, str(error))
                continue
            if not int(reader.num_samples) == len(reader.alloc_table) == split.samples:
                problems.add(beton.file, f"holds {int(reader.num_samples)} samples, the shards {split.samples}")
                continue
            readers[name] = reader
    return readers


def _has_ffcv() -> bool:
    try:
        require_ffcv()
    except BetonError:
        return False
    return True


def _check_strays(folder: Folder, manifest: Manifest, problems: Problems) -> None:
    listed = set()
    for split in manifest.splits.values():
        listed |= {entry.file for entry in [*split.shards, *split.betons]}
        listed |= {str(index_path(shard.file)) for shard in split.shards}
    # Where somebody else's tars lie, there may be more of them, and indexes from when the splits were others.
    ours = (".beton",) if manifest.settings.get("indexed") else (".tar", ".index.npz", ".beton")
    for name in folder.names():
        if name.endswith(ours) and name not in listed:
            problems.add(name, f"is not listed in {MANIFEST_NAME}: it belongs to another build")


def _check_info(folder: Folder, manifest: Manifest, problems: Problems) -> None:
    if manifest.settings.get("indexed") or manifest.format_version == 1:
        return
    there = folder.exists(INFO_NAME)
    if not there or folder.read(INFO_NAME) != info_bytes(manifest):
        text = f"does not say what {MANIFEST_NAME} does" if there else "is missing"
        problems.add(INFO_NAME, f"{text}: `python -m data_prep index --upgrade {folder.url}` writes it")


def _check_ledger(folder: Folder, manifest: Manifest, problems: Problems, notes: list[str]) -> None:
    """Rows of stored images must be as many, for each shard, as it has samples, and in its split."""
    if manifest.settings.get("indexed"):  # nothing became of anybody else's images
        return
    if not folder.exists(LEDGER_NAME):
        notes.append(f"there is no {LEDGER_NAME}: the data set is from before there was one")
        return
    rows: Counter[tuple[str, str, str]] = Counter()  # shard, split, action
    try:
        with open_binary(folder.join(LEDGER_NAME)) as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=["shard", "split", "action"]):
                grouped = pa.table(batch).group_by(["shard", "split", "action"]).aggregate([([], "count_all")])
                for row in grouped.to_pylist():
                    rows[row["shard"], row["split"], row["action"]] += row["count_all"]
    except (OSError, pa.ArrowException) as error:
        problems.add(LEDGER_NAME, f"cannot be read: {' '.join(str(error).split())}")
        return
    stored: Counter[str] = Counter()
    split_of = {shard.file: name for name, split in manifest.splits.items() for shard in split.shards}
    for (shard, split_name, action), count in rows.items():
        if (action in STORED_ACTIONS) != bool(shard):
            problems.add(LEDGER_NAME, f"has {count:,} rows with action {action!r} and shard {shard!r}")
        elif shard:
            stored[shard] += count
            if split_of.get(shard, split_name) != split_name:
                problems.add(LEDGER_NAME, f"has {count:,} rows with split {split_name!r} and shard {shard}")
    samples = {shard.file: shard.samples for split in manifest.splits.values() for shard in split.shards}
    for shard in sorted(stored.keys() | samples.keys()):
        if shard not in samples:
            problems.add(LEDGER_NAME, f"has {stored[shard]:,} rows for {shard}, which {MANIFEST_NAME} does not list")
        elif stored[shard] != samples[shard]:
            problems.add(
                LEDGER_NAME, f"has {stored[shard]:,} rows for {shard}, {MANIFEST_NAME} says {samples[shard]:,} samples"
            )


def _check_keys(folder: Folder, manifest: Manifest, parts: list[np.ndarray], problems: Problems) -> None:
    """No key may stand twice in the data set, in whatever split. Empties `parts`, to hold the hashes only once more."""
    hashes = np.concatenate([*parts, np.zeros(0, np.uint64)])
    parts.clear()
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(twice):
        return
    named = twice[:NAMED_KEYS]
    places: dict[str, list[str]] = {}
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        try:
            keys = ShardIndex.load(folder.join(str(index_path(shard.file)))).keys
        except ManifestError:  # told already
            continue
        for key in keys[np.isin(key_hashes(keys), named)]:
            places.setdefault(str(key), []).append(shard.file)
    for key, files in places.items():
        problems.add(files[0], f"key {key} stands in {' and '.join(files)}")
    if len(twice) > len(places):
        problems.add(MANIFEST_NAME, f"{len(twice) - len(places):,} more keys stand twice in the data set")
