"""Shards -> one FFCV `.beton` per split, with the shards' own JPEG bytes.

Sample i of the `.beton` is sample i of the concatenated shards, so a run reads the same samples from either format.

FFCV's `DatasetWriter.from_indexed_dataset` starts workers and waits for them for ever when one of them raises. There
is nothing to compute here, only bytes to copy, so this file drives the writer's own parts (header, page allocator,
sample encoding, final tables) in this process: an error is an error, and the same shards give the same bytes.
"""

import os
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.images import jpeg_frame
from data_prep.manifest import (
    BetonEntry,
    DataPrepError,
    Manifest,
    ShardEntry,
    ShardIndex,
    Split,
    atomic_path,
    file_sha256,
)
from data_prep.output import clear_unfinished, sole_writer

MIN_PAGE_BYTES = 8 << 20  # FFCV's default: some 150 images of 50 kB, so little is lost at the end of a page
MAX_PAGE_BYTES = 1 << 31  # the next power of two does not fit FFCV's 32-bit field
MAX_SIDE_PX = 65_535  # 16 bits
CHECKED_SAMPLES = 200
FIELD_NAMES = ("image", "label", "sample")


class BetonError(DataPrepError):
    """FFCV is missing, or a `.beton` cannot be written from these shards."""


def require_ffcv() -> None:
    """Raise BetonError, saying how to get it, when FFCV cannot be imported."""
    try:
        import ffcv.reader
        import ffcv.writer  # noqa: F401
    except ImportError as error:
        raise BetonError(
            f"FFCV cannot be imported ({error}): `make setup` builds it or prints the system packages it needs; "
            "--format webdataset works without it"
        ) from None


def add_betons(directory: Path, manifest: Manifest) -> Manifest:
    """Write the `.beton` of every split that has none yet; returns the manifest that lists them, and saves it."""
    missing = [name for name, split in manifest.splits.items() if not split.betons and split.samples]
    if not missing:
        return manifest
    require_ffcv()
    with sole_writer(directory):
        clear_unfinished(directory)
        for name in missing:
            entry = write_beton(directory, manifest, name)
            split = manifest.splits[name].model_copy(update={"betons": [entry]})
            manifest = manifest.model_copy(update={"splits": {**manifest.splits, name: split}})
            manifest.save(directory)
    return manifest


def write_beton(directory: Path, manifest: Manifest, split_name: str) -> BetonEntry:
    """Write `SPLIT.beton` from the shards of a split and check it. Raises BetonError, leaving no file, when a shard
    differs from the manifest or holds an image that FFCV cannot hold.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    split = manifest.split(split_name)
    indexes = [manifest.load_index(directory, shard) for shard in split.shards]
    page_bytes = _page_bytes(max(int(index.sizes.max()) for index in indexes if len(index)), split_name)
    image_field = RGBImageField(write_mode="jpg")
    # A subclass would be a field type that FFCV's reader does not know: so the method is bound on the instance.
    image_field.encode = MethodType(_store_jpeg, image_field)
    fields = dict(zip(FIELD_NAMES, (image_field, IntField(), IntField()), strict=True))
    path = directory / f"{split_name}.beton"
    with atomic_path(path) as temp:
        writer = DatasetWriter(str(temp), fields, page_size=page_bytes, num_workers=1)
        writer.num_samples = split.samples
        writer.prepare()
        # prepare() puts the table of samples into shared memory for its workers; containers often have 64 MB of that.
        table_bytes = writer.metadata_sm.size
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
        writer.metadata_sm = SimpleNamespace(buf=bytearray(table_bytes))
        table = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type, count=split.samples)
        allocator = MemoryAllocator(str(temp), writer.data_region_start, page_bytes)
        sample_id = 0
        with allocator, tqdm(total=split.samples, desc=path.name, unit="image", disable=None) as progress:
            for shard, index in zip(split.shards, indexes, strict=True):
                _check_shard(directory, shard)
                with open(directory / shard.file, "rb") as file:
                    for i in range(len(index)):
                        jpeg = os.pread(file.fileno(), int(index.sizes[i]), int(index.offsets[i]))
                        image = _described(jpeg, f"{shard.file}: {index.keys[i]}")
                        sample = (image, int(index.labels[i]), sample_id)
                        handle_sample(sample, sample_id, table.dtype.names, table, allocator, fields)
                        sample_id += 1
                progress.update(len(index))
        assert sample_id == split.samples, "the indexes hold as many samples as the manifest"
        writer.finalize(allocator.allocations)
        height, width = int(table["f0"]["height"].max()), int(table["f0"]["width"].max())
        _check_beton(temp, directory, split, indexes)
        return BetonEntry(
            file=path.name,
            samples=split.samples,
            bytes=temp.stat().st_size,
            sha256=file_sha256(temp),
            write_mode="jpg",
            page_size_bytes=page_bytes,
            max_height=height,
            max_width=width,
        )


def _page_bytes(largest_image_bytes: int, split_name: str) -> int:
    page = max(MIN_PAGE_BYTES, 1 << (largest_image_bytes - 1).bit_length())
    if page > MAX_PAGE_BYTES:
        raise BetonError(
            f"the largest image of {split_name} has {largest_image_bytes} bytes, more than an FFCV page can hold: "
            "build the shards with a smaller --short-side"
        )
    return page


def _check_shard(directory: Path, shard: ShardEntry) -> None:
    path = directory / shard.file
    if not path.is_file():
        raise BetonError(f"shard {path} is missing: rebuild the dataset with --force")
    if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
        raise BetonError(f"shard {path} is not the file dataset.json describes (size or sha256): rebuild with --force")


def _described(jpeg: bytes, where: str) -> tuple[bytes, int, int]:
    frame = jpeg_frame(jpeg)
    if frame is None or frame.components != 3 or not 0 < max(frame.width, frame.height) <= MAX_SIDE_PX:
        raise BetonError(f"{where} is not an RGB JPEG that FFCV can hold ({frame}): rebuild the dataset with --force")
    return jpeg, frame.width, frame.height


def _store_jpeg(field: Any, destination: np.ndarray, image: tuple[bytes, int, int], malloc: Any) -> None:
    """RGBImageField.encode for bytes that are a JPEG already."""
    jpeg, width, height = image
    destination["mode"] = 0  # FFCV's IMAGE_MODES['jpg']
    destination["width"], destination["height"] = width, height
    destination["data_ptr"], storage = malloc(len(jpeg))
    storage[:] = np.frombuffer(jpeg, dtype=np.uint8)


def _check_beton(temp: Path, directory: Path, split: Split, indexes: list[ShardIndex]) -> None:
    """Read the file back with FFCV's reader: count, labels, ids and sizes of all samples, bytes of some."""
    from ffcv.reader import Reader

    reader = Reader(str(temp))
    labels = np.concatenate([index.labels for index in indexes])
    sizes = np.concatenate([index.sizes for index in indexes])
    order = np.argsort(reader.alloc_table["sample_id"], kind="stable")
    checks = {
        "field names": list(FIELD_NAMES) == list(reader.field_names),
        "count": int(reader.num_samples) == split.samples == len(labels),
        "labels": np.array_equal(reader.metadata["f1"], labels),
        "sample ids": np.array_equal(reader.metadata["f2"], np.arange(split.samples)),
        "image bytes": np.array_equal(reader.alloc_table["size"][order], sizes),
    }
    failed = [name for name, passed in checks.items() if not passed]
    starts = np.cumsum([0] + [len(index) for index in indexes])
    # A full disk can cut FFCV's unbuffered writes short without an error, so some bytes are compared, the last too.
    with open(temp, "rb") as file:
        for sample_id in np.unique(np.linspace(0, split.samples - 1, CHECKED_SAMPLES).astype(int)):
            number = int(np.searchsorted(starts, sample_id, side="right")) - 1
            row = sample_id - starts[number]
            size, offset = int(sizes[sample_id]), int(indexes[number].offsets[row])
            with open(directory / split.shards[number].file, "rb") as shard:
                wanted = os.pread(shard.fileno(), size, offset)
            if os.pread(file.fileno(), size, int(reader.metadata["f0"]["data_ptr"][sample_id])) != wanted:
                failed.append(f"bytes of sample {sample_id}")
                break
    if failed:
        raise BetonError(f"the FFCV file does not read back as written ({', '.join(failed)}): is the disk full?")
