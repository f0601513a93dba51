"""A data set of masks or boxes checked: every file against the manifest, every image and mask decoded."""

import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.cluster import Cluster
from data_prep.dense.rle import BadSegmentation, finite_numbers, run_lengths
from data_prep.dense_set import IGNORED, DenseIndex, DenseManifest
from data_prep.images.pil import decode_png_labels
from data_prep.images.pixels import check_image
from data_prep.images.rejection import ImageRejected
from data_prep.ledger import LEDGER_NAME
from data_prep.manifest import MANIFEST_NAME, ManifestError, ShardEntry, index_path
from data_prep.storage import Folder, StorageError, open_binary
from data_prep.verify.problems import Problem, Problems, check_file, local_copy
from data_prep.verify.shard import members


@dataclass(frozen=True)
class DenseTask:
    """One shard; `fast`: sizes and index only."""

    folder: Folder
    manifest: DenseManifest
    split: str
    shard: ShardEntry
    fast: bool

    def __str__(self) -> str:
        return self.shard.file


@dataclass
class DenseShardResult:
    """`images` and `counts` (classes,) int64, None where the samples could not be counted."""

    problems: list[Problem]
    samples: int = 0
    keys: list[str] = field(default_factory=list)
    images: np.ndarray | None = None
    counts: np.ndarray | None = None


@dataclass
class DenseReport:
    """What was looked at, and what is wrong with it."""

    problems: list[Problem]
    splits: int = 0
    shards: int = 0
    samples: int = 0
    bytes: int = 0


def verify_dense(folder: Folder, cluster: Cluster, fast: bool = False) -> DenseReport:
    """Check a dense data set, local or remote; `fast` reads neither images nor checksums."""
    try:
        manifest = DenseManifest.load(folder.url)
    except ManifestError as error:
        return DenseReport([Problem(MANIFEST_NAME, str(error))])
    report, problems = DenseReport([], len(manifest.splits)), Problems()
    _check_strays(folder, manifest, problems)
    _check_ledger(folder, manifest, problems)
    results: dict[str, list[DenseShardResult]] = {name: [] for name in manifest.splits}
    tasks = [
        DenseTask(folder, manifest, name, shard, fast)
        for name, split in manifest.splits.items()
        for shard in split.shards
    ]
    found: list[Problem] = []
    total = sum(split.samples for split in manifest.splits.values())
    with tqdm(total=total, unit="image", desc="verify", mininterval=0.5 if sys.stderr.isatty() else 15) as progress:
        for task, result in cluster.run(check_dense_shard, tasks):
            results[task.split].append(result)
            found += result.problems
            report.shards, report.samples = report.shards + 1, report.samples + result.samples
            report.bytes += task.shard.bytes
            progress.update(result.samples)
    for name in manifest.splits:
        _check_split(manifest, name, results[name], problems, fast)
    report.problems = sorted([*found, *problems.listed()], key=lambda problem: problem.file)
    return report


def check_dense_shard(task: DenseTask) -> DenseShardResult:
    """Find everything that is wrong with a shard."""
    problems, name = Problems(), task.shard.file
    result = DenseShardResult([])
    index: DenseIndex | None = None
    try:
        index = task.manifest.load_index(task.folder.url, task.shard)
    except (ManifestError, OSError) as error:
        problems.add(str(index_path(name)), str(error))
    if task.fast or task.folder.size(name) is None:
        check_file(task.folder, task.shard, problems, None)
        if index is not None:
            result.samples, result.keys = len(index), index.keys.tolist()
    else:
        try:
            with local_copy(task.folder, name) as path:
                check_file(task.folder, task.shard, problems, path)
                _check_samples(task, path, index, problems, result)
        except (OSError, StorageError) as error:
            problems.add(name, f"cannot be read: {error}")
    result.problems = problems.listed()
    return result


def _check_samples(
    task: DenseTask, path: Path, index: DenseIndex | None, problems: Problems, result: DenseShardResult
) -> None:
    classes, name = task.manifest.num_classes, task.shard.file
    images, counts = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    with open(path, "rb") as file:
        for number, (key, parts) in enumerate(_samples(path, name, problems)):
            wanted = {"jpg", "json", *(["png"] if task.manifest.task == "semantic" else [])}
            if parts.keys() != wanted:
                problems.add(name, f"has {', '.join(sorted(parts))}, not {', '.join(sorted(wanted))}", key)
                continue
            data = {part: os.pread(file.fileno(), member.size, member.offset_data) for part, member in parts.items()}
            size = _size(data["jpg"], key, name, problems)
            told = _told(data["json"], key, size, name, problems)
            of_sample = _mask(data["png"], key, size, classes, name, problems) if "png" in data else None
            if of_sample is None and told is not None:
                of_sample = _annotations(told, key, size, classes, task, problems)
            if of_sample is not None:
                images += of_sample > 0
                counts += of_sample
            result.keys.append(key)
            if index is not None:
                _compare(index, number, key, parts, size, problems, str(index_path(name)))
    result.samples = len(result.keys)
    if result.samples != task.shard.samples:
        problems.add(name, f"holds {result.samples} whole samples, {MANIFEST_NAME} says {task.shard.samples}")
    result.images, result.counts = images, counts


def _samples(path: Path, name: str, problems: Problems) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    key, parts = "", dict[str, tarfile.TarInfo]()
    for member in members(path, name, problems):
        stem, _, extension = member.name.partition(".")
        if stem != key and parts:
            yield key, parts
            parts = {}
        key = stem
        parts[extension] = member
    if parts:
        yield key, parts


def _size(jpeg: bytes, key: str, name: str, problems: Problems) -> tuple[int, int] | None:
    try:
        return check_image(jpeg)
    except ImageRejected as error:
        problems.add(name, f"cannot be decoded: {error.detail}", f"{key}.jpg")
        return None


def _told(data: bytes, key: str, size: tuple[int, int] | None, name: str, problems: Problems) -> dict[str, Any] | None:
    try:
        told = json.loads(data)
        said = (int(told["width"]), int(told["height"]))
        str(told["file_name"]), int(told["image_id"])
    except (ValueError, KeyError, TypeError) as error:
        problems.add(name, f"is not a sample's JSON: {type(error).__name__} {error}", f"{key}.json")
        return None
    if size is not None and said != size:
        problems.add(name, f"says {said[0]} x {said[1]} pixels, the image has {size[0]} x {size[1]}", f"{key}.json")
    return told


def _mask(
    png: bytes, key: str, size: tuple[int, int] | None, classes: int, name: str, problems: Problems
) -> np.ndarray | None:
    try:
        labels = decode_png_labels(png)
    except ImageRejected as error:
        problems.add(name, f"cannot be decoded: {error.detail}", f"{key}.png")
        return None
    height, width = labels.shape
    if size is not None and (width, height) != size:
        problems.add(name, f"has {width} x {height} pixels, the image {size[0]} x {size[1]}", f"{key}.png")
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)
    if counts[classes:IGNORED].any():
        above = classes + int(np.flatnonzero(counts[classes:IGNORED])[0])
        problems.add(name, f"has the label {above}, there are {classes} classes", f"{key}.png")
    return counts[:classes]


def _annotations(
    told: dict[str, Any], key: str, size: tuple[int, int] | None, classes: int, task: DenseTask, problems: Problems
) -> np.ndarray:
    counts = np.zeros(classes, np.int64)
    annotations = told.get("annotations")
    if not isinstance(annotations, list) or not all(isinstance(annotation, dict) for annotation in annotations):
        problems.add(task.shard.file, "has no list of annotations", f"{key}.json")
        return counts
    for annotation in annotations:
        wrong = _wrong(annotation, size, classes, task.split)
        if wrong:
            problems.add(task.shard.file, f"{wrong}, in annotation {annotation.get('id')}", f"{key}.json")
        else:
            counts[annotation["label"]] += 1
    return counts


def _wrong(annotation: dict[str, Any], size: tuple[int, int] | None, classes: int, split: str) -> str:
    """What is wrong with an annotation, "" where nothing is."""
    label = annotation.get("label")
    if type(label) is not int or not 0 <= label < classes:
        return f"has label {label}, there are {classes} classes"
    box = finite_numbers(annotation.get("bbox"), 4)
    if box is None or annotation.get("iscrowd") not in (0, 1) or finite_numbers([annotation.get("area")], 1) is None:
        return "has no box, area or iscrowd"
    x, y, width, height = box
    if size is not None and split == "train" and not (x < size[0] and y < size[1] and x + width > 0 and y + height > 0):
        return f"has a box outside of the image ({x:g}, {y:g}, {width:g} x {height:g})"
    encoded = annotation.get("segmentation")
    if encoded is None:
        return ""
    try:
        runs = run_lengths(encoded["counts"])
        if size is not None and (encoded["size"] != [size[1], size[0]] or sum(runs) != size[0] * size[1]):
            return "has a mask that is not of the image's size"
    except (BadSegmentation, KeyError, TypeError) as error:
        return f"has a mask that cannot be read ({error})"
    return ""


def _compare(
    index: DenseIndex,
    number: int,
    key: str,
    parts: dict[str, tarfile.TarInfo],
    size: tuple[int, int] | None,
    problems: Problems,
    file: str,
) -> None:
    if number >= len(index) or index.keys[number] != key:
        problems.add(file, "is not at its place in the index", key)
        return
    for part, column in (("jpg", "image"), ("json", "json"), ("png", "mask")):
        there = (parts[part].offset_data, parts[part].size) if part in parts else (0, 0)
        if (getattr(index, f"{column}_offset")[number], getattr(index, f"{column}_bytes")[number]) != there:
            problems.add(file, "lies elsewhere in the shard than listed", f"{key}.{part}")
    if size is not None and (index.width[number], index.height[number]) != size:
        problems.add(file, f"is listed with {index.width[number]} x {index.height[number]} pixels", key)


def _check_split(
    manifest: DenseManifest, name: str, results: list[DenseShardResult], problems: Problems, fast: bool
) -> None:
    split = manifest.splits[name]
    twice = [key for key, times in Counter(key for result in results for key in result.keys).items() if times > 1]
    for key in twice[:20]:
        problems.add(MANIFEST_NAME, f"stands twice in {name}", key)
    if fast or any(result.counts is None for result in results):
        return
    counts = split.class_pixels if manifest.task == "semantic" else split.class_annotations
    for said, part in ((split.class_images, "images"), (counts, "counts")):
        found = sum((getattr(result, part) for result in results), np.zeros(manifest.num_classes, np.int64))
        for label in np.flatnonzero(found != np.array(said)).tolist():
            problems.add(
                MANIFEST_NAME,
                f"as the number of {part} of {manifest.classes[label]} in {name}; the shards hold {int(found[label])}",
                f"says {said[label]}",
            )


def _check_strays(folder: Folder, manifest: DenseManifest, problems: Problems) -> None:
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    listed |= {str(index_path(name)) for name in listed}
    for name in folder.names():
        if name.endswith((".tar", ".index.npz")) and name not in listed:
            problems.add(name, f"is not listed in {MANIFEST_NAME}: it belongs to another build")


def _check_ledger(folder: Folder, manifest: DenseManifest, problems: Problems) -> None:
    """Rows of stored images must be as many, for each shard, as it has samples."""
    try:
        with open_binary(folder.join(LEDGER_NAME)) as file:
            shards = pq.read_table(file, columns=["shard"])["shard"].value_counts().to_pylist()
    except (OSError, pa.ArrowException) as error:
        problems.add(LEDGER_NAME, f"cannot be read: {' '.join(str(error).split())}")
        return
    stored = {row["values"]: row["counts"] for row in shards if row["values"]}
    samples = {shard.file: shard.samples for split in manifest.splits.values() for shard in split.shards}
    for shard in sorted(stored.keys() | samples.keys()):
        rows, said = stored.get(shard, 0), samples.get(shard, 0)
        if rows != said:
            problems.add(LEDGER_NAME, f"has {rows:,} rows for {shard}, {MANIFEST_NAME} says {said:,} samples")
