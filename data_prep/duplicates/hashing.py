"""Hashes of the images of a data set: SHA-256 of the stored bytes, and a perceptual hash that survives re-encoding.

One task hashes one shard and leaves a file `hashes/SHARD-CHECKSUM.npz`, so that a killed run goes on where it was, and
a second run, or another data set to compare with, hashes nothing again.
"""

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_prep.images.pixels import gray_pixels
from data_prep.images.rejection import ImageRejected
from data_prep.manifest import Manifest, ShardEntry, ShardIndex, index_path
from data_prep.storage import DataPrepError, Folder, open_binary

# imagehash.phash shrinks to 32 x 32 pixels whatever it is given. libjpeg can decode at n/8 of the size and into gray,
# for a third of the time (photos of 375 to 512 pixels: 0.9 ms rather than 2.9 ms). Of 400 such photos the hash was then
# within 2 bits of that of the full decode for 94 %, within 4 for 99.8 %; at 32 pixels that was 72 % and 93 %, at 128
# hardly better than at 64. Both sides of a comparison are decoded this way, so only images of different size feel it.
DECODED_PX = 64
HASHED_PX = 32  # phash's own
# Standard deviation of the 32 x 32 gray levels (0..255) below which an image is taken for flat: its hash is that of its
# noise. Photos had 11 and more, drawings 4 and more; one colour with JPEG noise has less than 1.
FLAT_CONTRAST = 2.0

HASHES = "hashes"  # folder, inside the output
CACHE_VERSION = 2  # part of the names of its files: raised when their content changes


class DuplicateError(DataPrepError):
    """Duplicates cannot be looked for, or a shard cannot be read."""


class ImageHash(NamedTuple):
    """64-bit pHash of an image and of its mirror image; contrast in gray levels, NaN where it cannot be decoded."""

    plain: int
    mirrored: int
    contrast: float


class ImageRow(NamedTuple):
    """What is known of one image: `file`, `offset`, `size` say where its JPEG lies in the data set's folder."""

    key: str
    wnid: str
    name: str
    sha256: bytes
    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class HashTask:
    """Hash the shard `file` that lies in `dataset`; leave the hashes in the folder `cache` under `target`. `index`: of
    a tar of others, where its index is, and `synsets` the classes by label.
    """

    dataset: str
    file: str
    cache: str
    target: str
    samples: int
    index: str | None = None
    synsets: tuple[str, ...] = ()


def hash_image(jpeg: bytes) -> ImageHash:
    """Perceptual hashes of an image file; one that cannot be decoded counts as flat."""
    try:
        gray = gray_pixels(jpeg, DECODED_PX)
    except ImageRejected:
        return ImageHash(0, 0, math.nan)
    reduced = Image.fromarray(gray).resize((HASHED_PX, HASHED_PX), Image.Resampling.LANCZOS)
    # phash resizes to the size that these have already, which changes nothing.
    plain, mirrored = (_as_number(imagehash.phash(image)) for image in (reduced, ImageOps.mirror(reduced)))
    return ImageHash(plain, mirrored, float(np.asarray(reduced).std()))


def _as_number(found: imagehash.ImageHash) -> int:
    return int.from_bytes(np.packbits(found.hash).tobytes(), "big")


def hash_shard(task: HashTask) -> int:
    """Hash every image of a shard and write the file of hashes; returns the number of images."""
    columns: dict[str, list[Any]] = {name: [] for name in _DTYPES}
    for key, jpeg, offset, described in _samples(task):
        found = hash_image(jpeg)
        row = (key, described["wnid"], described["source_name"], found.plain, found.mirrored, found.contrast)
        encoded = [value.encode() if isinstance(value, str) else value for value in row]
        digest = np.frombuffer(hashlib.sha256(jpeg).digest(), np.uint8)
        for name, value in zip(_DTYPES, [*encoded, digest, offset, len(jpeg)], strict=True):
            columns[name].append(value)
    if len(columns["key"]) != task.samples:
        raise DuplicateError(
            f"{task.dataset}/{task.file} holds {len(columns['key'])} samples, dataset.json says {task.samples}: "
            "rebuild the data set with --force"
        )
    arrays = {name: np.array(columns[name], dtype=dtype) for name, dtype in _DTYPES.items()}
    with Folder(task.cache).writing(task.target) as temp, open(temp, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return task.samples


# The arrays of a file of hashes, in the order in which hash_shard makes them.
_DTYPES = {
    "key": "S",
    "wnid": "S9",
    "name": "S",  # UTF-8
    "plain": "uint64",
    "mirrored": "uint64",
    "contrast": "float32",
    "sha256": "uint8",  # (N, 32)
    "offset": "int64",
    "size": "int64",
}


def _samples(task: HashTask) -> Iterator[tuple[str, bytes, int, dict[str, Any]]]:
    """Key, image, where it begins in the tar, and the description of every sample, in one pass over the shard."""
    if task.index is not None:
        yield from _indexed_samples(task, ShardIndex.load(task.index))
        return
    parts: dict[str, dict[str, Any]] = {}
    try:
        with open_binary(f"{task.dataset}/{task.file}") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                if extension not in ("jpg", "json"):
                    continue
                sample = parts.setdefault(key, {})
                sample[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
                if extension == "jpg":
                    sample["offset"] = member.offset_data
                if "jpg" in sample and "json" in sample:
                    del parts[key]
                    yield key, sample["jpg"], sample["offset"], json.loads(sample["json"])
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise DuplicateError(f"{task.dataset}/{task.file} is damaged ({error}): rebuild it with --force") from None


def _indexed_samples(task: HashTask, index: ShardIndex) -> Iterator[tuple[str, bytes, int, dict[str, Any]]]:
    """Of a tar of others: its key is all that an image was called."""
    with open_binary(f"{task.dataset}/{task.file}") as file:
        for key, offset, size, label in zip(index.keys, index.offsets, index.sizes, index.labels, strict=True):
            file.seek(int(offset))
            image = file.read(int(size))
            if len(image) < size:
                raise DuplicateError(f"{task.dataset}/{task.file} ends inside {key}: copy it again")
            yield str(key), image, int(offset), {"wnid": task.synsets[label], "source_name": str(key)}


def hash_tasks(dataset: Folder, manifest: Manifest, shards: Iterable[ShardEntry], cache: Folder) -> list[HashTask]:
    """One task for each shard, done or not. The name of a target comes from the shard's content, and for a tar of
    others also from what is taken of it.
    """
    if not manifest.settings.get("indexed"):
        return [
            HashTask(dataset.url, shard.file, cache.url, f"{shard.sha256[:32]}-v{CACHE_VERSION}.npz", shard.samples)
            for shard in shards
        ]
    synsets, tars = tuple(manifest.synsets), manifest.shards_folder(dataset.url)
    taken = manifest.dataset_id[:12]
    return [
        HashTask(
            tars,
            shard.file,
            cache.url,
            f"{shard.sha256[:32]}-{taken}-v{CACHE_VERSION}.npz",
            shard.samples,
            dataset.join(str(index_path(shard.file))),
            synsets,
        )
        for shard in shards
    ]


class HashedImages:
    """The hashes of all images of some splits; images are numbered in the order of the shards.

    plain, mirrored (N,) uint64: perceptual hashes. digest (N,) uint64: the first 8 bytes of the SHA-256, to find
    candidates by; the whole is in `rows`. flat (N,) bool: no content to compare. 25 bytes an image: 350 MB for 14 M.
    """

    def __init__(self, dataset: Folder, manifest: Manifest, splits: Sequence[str], tasks: Sequence[HashTask]):
        self.dataset, self.manifest, self.splits, self.tasks = dataset, manifest, tuple(splits), list(tasks)
        self.starts = np.cumsum([0, *(task.samples for task in tasks)])
        count = int(self.starts[-1])
        self.plain, self.mirrored, self.digest = (np.empty(count, np.uint64) for _ in range(3))
        self.flat = np.empty(count, dtype=bool)
        self.undecodable = 0
        for task, start, stop in zip(tasks, self.starts, self.starts[1:], strict=False):
            loaded = _load(task, "plain", "mirrored", "contrast", "sha256")
            self.plain[start:stop], self.mirrored[start:stop] = loaded["plain"], loaded["mirrored"]
            self.digest[start:stop] = leading_bytes(loaded["sha256"])
            self.flat[start:stop] = ~(loaded["contrast"] >= FLAT_CONTRAST)  # so that NaN counts as flat
            self.undecodable += int(np.isnan(loaded["contrast"]).sum())

    def __len__(self) -> int:
        return len(self.plain)

    def rows(self, numbers: NDArray[np.int64]) -> dict[int, ImageRow]:
        """The images of these numbers, read from the files of hashes, each of which is opened once."""
        wanted = np.unique(numbers)
        found = {}
        for index, (begin, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            inside = wanted[np.searchsorted(wanted, begin) : np.searchsorted(wanted, end)]
            if not len(inside):
                continue
            task = self.tasks[index]
            at = inside - begin
            part = _load(task, "key", "wnid", "name", "sha256", "offset", "size")
            columns = [part[name][at] for name in ("key", "wnid", "name", "sha256", "offset", "size")]
            for number, key, wnid, name, sha, offset, size in zip(inside.tolist(), *columns, strict=True):
                found[number] = ImageRow(
                    key.decode(), wnid.decode(), name.decode(), sha.tobytes(), task.file, int(offset), int(size)
                )
        return found

    def numbers_of(self, file: str, keys: Sequence[str]) -> list[tuple[int, str]]:
        """(number, key) of the images with these keys in the shard `file`; unknown keys are left out."""
        for task, start in zip(self.tasks, self.starts, strict=False):
            if task.file == file:
                known = {key: place for place, key in enumerate(_load(task, "key")["key"].tolist())}
                return [(int(start) + known[key.encode()], key) for key in keys if key.encode() in known]
        return []


def leading_bytes(sha256: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(N, 32) bytes of SHA-256 -> (N,) the first 8 as numbers."""
    return np.ascontiguousarray(sha256.reshape(-1, 32)[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def _load(task: HashTask, *names: str) -> dict[str, NDArray[Any]]:
    # An .npz is read array by array: the long ones (names, keys) only where they are wanted.
    with np.load(io.BytesIO(Folder(task.cache).read(task.target)), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}
