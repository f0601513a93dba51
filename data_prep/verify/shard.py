"""One shard of a data set against its index and the manifest: every tar member is found by a pass of `tarfile` that
does not use the index, and every image is decoded.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton.file import RAW, BetonError
from data_prep.beton.sample import BetonSettings, plan_sample, store_sample
from data_prep.beton.write import rows_that_differ
from data_prep.images.jpeg import jpeg_frame
from data_prep.images.pixels import check_image
from data_prep.images.rejection import ImageRejected
from data_prep.manifest import ManifestError, ShardEntry, ShardIndex, index_path
from data_prep.storage import Folder, StorageError
from data_prep.verify.problems import Problem, Problems, check_file, local_copy

READ_BYTES = 8 << 20
CLASS_DIGITS = 12  # more are none of a class number
MODES = {1: "gray", 3: "RGB", 4: "CMYK"}  # by components
RAW_TOLERANCE = 16  # of 255: another version of the decoder may round otherwise, a flipped high bit gives 128


@dataclass(frozen=True)
class BetonRows:
    """FFCV's table rows for the samples of one shard, of which the first is sample `start` of the split."""

    path: Path
    settings: BetonSettings
    start: int
    metadata: np.ndarray
    allocations: np.ndarray


@dataclass(frozen=True)
class ShardTask:
    """`folder` has the index, `shards` the tar. `synsets` (classes,) S9. `fast`: sizes and index only. `foreign`: a tar
    of somebody else's, under our index. `with_classes`: each sample must have its `.cls`.
    """

    folder: Folder
    shards: Folder
    split: str
    shard: ShardEntry
    synsets: np.ndarray
    fast: bool
    beton: BetonRows | None = None
    foreign: bool = False
    with_classes: bool = True

    def __str__(self) -> str:
        return self.shard.file


@dataclass
class ShardResult:
    """key_hashes uint64 (samples,); label_counts int64 (classes,), None where the samples could not be counted."""

    problems: list[Problem]
    samples: int = 0
    key_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    label_counts: np.ndarray | None = None


def key_hashes(keys: Any) -> np.ndarray:
    """64 bits of each key: among 14 million keys two meet by chance once in 200,000 data sets."""
    joined = b"".join(hashlib.blake2b(str(key).encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(joined, np.uint64)


def check_shard(task: ShardTask) -> ShardResult:
    """Find everything that is wrong with a shard."""
    problems, name = Problems(), task.shard.file
    index = _checked_index(task, problems)
    result = ShardResult([])
    if task.shards.size(name) is None or task.fast:
        check_file(task.shards, task.shard, problems, None)
        if task.fast and index is not None:
            _count_index(task, index, result)
    else:
        try:
            with local_copy(task.shards, name) as path:
                check_file(task.shards, task.shard, problems, path)
                if task.foreign and index is not None:
                    _check_foreign(task, path, index, problems)
                    _count_index(task, index, result)
                elif not task.foreign:
                    _check_samples(task, path, index, problems, result)
        except (OSError, StorageError) as error:
            problems.add(name, f"cannot be read: {error}")
    result.problems = problems.listed()
    return result


def _count_index(task: ShardTask, index: ShardIndex, result: ShardResult) -> None:
    result.samples = len(index)
    # Keys of foreign tars are unique within a tar.
    result.key_hashes = key_hashes(f"{task.shard.file}/{key}" if task.foreign else key for key in index.keys)
    result.label_counts = np.bincount(index.labels, minlength=len(task.synsets))


def _check_foreign(task: ShardTask, path: Path, index: ShardIndex, problems: Problems) -> None:
    """Every image that the index lists decodes; what else such a tar holds is not ours to judge."""
    with open(path, "rb") as file:
        for key, offset, size in zip(index.keys, index.offsets, index.sizes, strict=True):
            try:
                _decoded(os.pread(file.fileno(), int(size), int(offset)), foreign=True)
            except ValueError as error:
                problems.add(task.shard.file, str(error), str(key))


def _checked_index(task: ShardTask, problems: Problems) -> ShardIndex | None:
    file = str(index_path(task.shard.file))
    try:
        index = ShardIndex.load(task.folder.join(file))
    except (ManifestError, OSError) as error:
        problems.add(file, "is missing" if task.folder.size(file) is None else str(error))
        return None
    if len(index) != task.shard.samples:
        problems.add(file, f"lists {len(index)} samples, dataset.json says {task.shard.samples}")
    if not len(index):
        return index
    if int((index.offsets + index.sizes).max()) > task.shard.bytes:
        problems.add(file, "points past the end of the shard")
    if not task.foreign and np.any(index.offsets[1:] < (index.offsets + index.sizes)[:-1]):  # links may go anywhere
        problems.add(file, "lists images that overlap, or not in the order of the shard")
    if int(index.labels.max()) >= len(task.synsets):
        problems.add(file, f"has label {int(index.labels.max())}, there are {len(task.synsets)} classes")
        return None
    return index


def _check_samples(
    task: ShardTask, path: Path, index: ShardIndex | None, problems: Problems, result: ShardResult
) -> None:
    """The samples of the tar, each against its `.cls`, its JSON, the index and the `.beton`."""
    name, index_file = task.shard.file, str(index_path(task.shard.file))
    keys: list[str] = []
    labels: list[int] = []
    row_of = {} if index is None else {str(key): row for row, key in enumerate(index.keys)}
    beton = task.beton
    if beton is not None and (index is None or len(beton.metadata) != len(index)):
        beton = None  # which row is which sample is not known: the shard's or index's own problem is told
    if beton is not None and index is not None:
        for what in rows_that_differ(beton.metadata, beton.allocations, index, beton.start, beton.settings):
            problems.add(beton.path.name, f"does not fit {name} in {what}")
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        beton_file = None if beton is None else stack.enter_context(open(beton.path, "rb"))
        for key, image, number, described in _samples(path, name, problems):
            jpeg = os.pread(file.fileno(), image.size, image.offset_data)
            label = _check_json(
                os.pread(file.fileno(), described.size, described.offset_data), jpeg, key, task, problems
            )
            if number is not None:
                said = os.pread(file.fileno(), min(number.size, CLASS_DIGITS), number.offset_data)
                if label >= 0 and said != b"%d" % label:
                    problems.add(name, f"says {said.decode('ascii', 'replace')!r}, its JSON {label}", f"{key}.cls")
            elif task.with_classes:
                problems.add(name, "has no .cls after its image", key)
            keys.append(key)
            labels.append(label)
            row = row_of.pop(key, None)
            if index is None:
                continue
            if row is None:
                problems.add(name, "is not in the index", key)
                continue
            if (int(index.offsets[row]), int(index.sizes[row])) != (image.offset_data, image.size):
                problems.add(index_file, "lies elsewhere in the shard than listed", key)
            if label >= 0 and int(index.labels[row]) != label:
                problems.add(index_file, f"has label {index.labels[row]}, its JSON says {label}", key)
            if beton is not None and beton_file is not None:
                size, pointer = int(beton.allocations[row]["size"]), int(beton.metadata[row]["f0"]["data_ptr"])
                stored = os.pread(beton_file.fileno(), size, pointer)
                _check_in_beton(beton, row, key, jpeg, stored, problems)
    if index is not None and sorted(keys) == sorted(index.keys.tolist()) and keys != index.keys.tolist():
        problems.add(index_file, "lists the samples in another order than the shard")
    for key in row_of:
        problems.add(index_file, "is listed, but not in the shard", key)
    if len(keys) != task.shard.samples:
        problems.add(name, f"holds {len(keys)} whole samples, dataset.json says {task.shard.samples}")
    result.samples, result.key_hashes = len(keys), key_hashes(keys)
    known = np.array([label for label in labels if label >= 0], np.int64)
    result.label_counts = np.bincount(known, minlength=len(task.synsets)) if len(known) == len(labels) else None


def _samples(
    path: Path, name: str, problems: Problems
) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarInfo | None, tarfile.TarInfo]]:
    """(key, `.jpg`, `.cls` if any, `.json`) of each sample; members that do not belong together are problems."""
    image: tarfile.TarInfo | None = None
    number: tarfile.TarInfo | None = None
    for member in members(path, name, problems):
        key, _, extension = member.name.partition(".")
        ours = image is not None and image.name == f"{key}.jpg"
        if extension == "cls" and ours and number is None:
            number = member
            continue
        if extension == "json" and ours and image is not None:
            yield key, image, number, member
            image = number = None
            continue
        if image is not None:
            problems.add(name, "has no JSON after it", image.name)
            image = number = None
        if extension == "jpg":
            image = member
        else:
            sample = extension in ("cls", "json")
            problems.add(name, "stands without its image" if sample else "is no sample's", member.name)
    if image is not None:
        problems.add(name, "has no JSON after it", image.name)


def members(path: Path, name: str, problems: Problems) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, also those after a damaged header; what lies between them is a problem."""
    size, end = path.stat().st_size, 0
    try:
        # Left to itself tarfile takes a damaged header for the end of the archive.
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # they would all be kept
                if member.offset != end:
                    problems.add(name, f"has a damaged tar header at byte {end}")
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if end > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member
    except tarfile.TarError as error:
        problems.add(name, f"is not a whole tar: {error}, after byte {min(end, size)}")
        return
    with open(path, "rb") as file:
        file.seek(end)
        if size - end < 2 * tarfile.BLOCKSIZE:
            problems.add(name, "ends without the end mark of a tar")
        while block := file.read(READ_BYTES):
            if block.strip(b"\0"):
                problems.add(name, f"has a damaged tar header at byte {end}, the rest is no tar")
                break


def _decoded(data: bytes, foreign: bool = False) -> tuple[tuple[int, int], str]:
    """((width, height), mode) of an image, decoded to its end; a JPEG unless `foreign`. Raises ValueError."""
    frame = jpeg_frame(data)
    if frame is None and not foreign:
        raise ValueError(f"cannot be decoded: is no JPEG, begins {data[:8]!r}")
    try:
        size = check_image(data)
    except ImageRejected as error:
        raise ValueError(f"cannot be decoded: {error.detail}") from None
    return size, MODES.get(frame.components, "of unknown colours") if frame else ""


def _check_json(data: bytes, jpeg: bytes, key: str, task: ShardTask, problems: Problems) -> int:
    """Compare what the JSON says with the decoded image; returns the label, -1 where it is not a class."""
    name = task.shard.file
    size: tuple[int, int] | None = None
    try:
        size, mode = _decoded(jpeg)
        if mode != "RGB":
            problems.add(name, f"is {mode}, not RGB", f"{key}.jpg")
    except ValueError as error:
        problems.add(name, str(error), f"{key}.jpg")
    try:
        described = json.loads(data)
        label, wnid = int(described["label"]), str(described["wnid"])
        said = (int(described["width"]), int(described["height"]))
        size_bytes = int(described["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        problems.add(name, f"is not a sample's JSON: {type(error).__name__} {error}", f"{key}.json")
        return -1
    if not 0 <= label < len(task.synsets):
        problems.add(name, f"has label {label}, there are {len(task.synsets)} classes", f"{key}.json")
        return -1
    if wnid != task.synsets[label].decode():
        problems.add(name, f"has wnid {wnid}, label {label} is {task.synsets[label].decode()}", f"{key}.json")
    if size is not None and said != size:
        problems.add(name, f"says {said[0]} x {said[1]} pixels, the image has {size[0]} x {size[1]}", f"{key}.json")
    if size_bytes != len(jpeg):
        problems.add(name, f"says {size_bytes} bytes, the image has {len(jpeg)}", f"{key}.json")
    return label


def _check_in_beton(beton: BetonRows, row: int, key: str, jpeg: bytes, data: bytes, problems: Problems) -> None:
    name, image = beton.path.name, beton.metadata[row]["f0"]
    try:
        plan = plan_sample(jpeg, key, name, beton.settings)
        if tuple(int(image[part]) for part in ("mode", "width", "height")) != plan[:3]:
            problems.add(name, "is stored in another mode or size than the settings give", key)
        elif plan.copied:
            if data != jpeg:
                problems.add(name, "has other bytes than in the shard", key)
        elif plan.mode == RAW:
            wanted = np.frombuffer(store_sample(jpeg, key, name, beton.settings).data, np.uint8).astype(np.int16)
            found = np.frombuffer(data, np.uint8)
            if len(found) != len(wanted) or int(np.abs(found - wanted).max(initial=0)) > RAW_TOLERANCE:
                problems.add(name, "has other pixels than in the shard", key)
        elif _decoded(data) != ((plan.width, plan.height), "RGB"):
            problems.add(name, "is not the RGB image of its size", key)
    except BetonError:
        pass  # the shard's image is damaged, which is told
    except ValueError as error:
        problems.add(name, str(error), key)
