"""A source of images -> shuffled WebDataset shards with indexes, and the manifest.

Two stages, so that neither the order nor the bytes depend on the number of workers:
1. every image is prepared and its bytes appended to one spill file in the output folder;
2. a sample's place in the split is given by a hash of (seed, class, name), so each shard is a uniform random
   draw of the whole set; shards are then written one after another from the spill.

All files get their final name only when complete; `dataset.json` comes last: a folder that has one is whole.
"""

import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from data_prep.images import ImagePolicy, Prepared, prepare_all
from data_prep.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    ShardIndex,
    Split,
    atomic_write,
    file_sha256,
    index_path,
)
from data_prep.output import (
    BuildResult,
    ShardError,
    already_built,
    clear,
    sole_writer,
    spill_file,
    write_rejected,
)
from data_prep.sources import Source, SourceError, limit_per_class, name_hash

MAX_KEY_CHARS = 80  # leaves room for the extension in the 100 bytes of a plain tar header


@dataclass(frozen=True)
class ShardSettings:
    """What decides the content of the shards (workers and formats do not)."""

    short_side_px: int = 512
    quality: int = 90
    samples_per_shard: int = 10_000
    seed: int = 0
    max_images_per_class: int | None = None
    val_per_class: int = 0


@dataclass(slots=True)
class _Sample:
    wnid: str
    name: str
    key: str
    spill_offset: int
    size_bytes: int
    image: Prepared  # without its bytes: those are in the spill


def build_shards(
    source: Source,
    output: Path,
    settings: ShardSettings,
    *,
    name: str,
    val_source: Source | None = None,
    workers: int = 1,
    force: bool = False,
) -> BuildResult:
    """Build the dataset folder `output`, or find that it is there already.

    Raises ShardError when `output` holds a build with other settings (unless `force`), SourceError when the
    source is damaged or gives no usable image.
    """
    for read in (source, val_source):
        if read is not None and read.path.is_dir() and output.resolve().is_relative_to(read.path.resolve()):
            raise ShardError(f"output {output} lies inside the source {read.path}: choose a folder outside of it")
    wanted = {**asdict(settings), "source": _identity(source), "val_source": val_source and _identity(val_source)}
    output.mkdir(parents=True, exist_ok=True)
    with sole_writer(output):
        if (output / MANIFEST_NAME).exists() and not force:
            return already_built(output, name, wanted)
        clear(output)
        with spill_file(output) as spill:
            samples, rejected = _ingest(source, spill, settings, workers, split="train")
            splits = {"train": samples}
            synsets = sorted(set(source.classes))
            notes = []
            if val_source is not None:
                splits["val"], more = _ingest(val_source, spill, settings, workers, "val", known=set(synsets))
                rejected += more
            elif settings.val_per_class:
                splits["train"], splits["val"], note = _take_validation(samples, settings.val_per_class)
                notes += note
            empty = len(set(synsets) - {sample.wnid for sample in splits["train"]})
            if empty:
                notes.append(f"{empty} of {len(synsets)} classes have no usable training image")
            label = {wnid: number for number, wnid in enumerate(synsets)}
            built = {split: _write_split(output, split, rows, spill, label, settings) for split, rows in splits.items()}
        write_rejected(output, rejected)
        manifest = Manifest(
            name=name,
            dataset_id=_dataset_id(synsets, built, settings),
            synsets=synsets,
            splits=built,
            settings=wanted,
        )
        manifest.save(output)
    return BuildResult(manifest, False, rejected, notes)


def _identity(source: Source) -> dict[str, str]:
    return {"file": source.path.name, "kind": source.kind, "fingerprint": source.fingerprint()}


def _ingest(
    source: Source,
    spill: BinaryIO,
    settings: ShardSettings,
    workers: int,
    split: str,
    known: set[str] | None = None,
) -> tuple[list[_Sample], list[dict[str, str]]]:
    """Stage 1: prepare every image, append its bytes to the spill. Classes outside `known` are rejected."""
    samples: list[_Sample] = []
    rejected: list[dict[str, str]] = []
    keys: set[str] = set()
    records: Iterable[Any] = source
    if settings.max_images_per_class is not None and split == "train":
        records = limit_per_class(source, settings.max_images_per_class)
    policy = ImagePolicy(settings.short_side_px, settings.quality)
    with tqdm(
        prepare_all(records, policy, workers),
        desc=f"images for {split}",
        unit="image",
        mininterval=0.5 if sys.stderr.isatty() else 15,  # a log file is not a terminal
    ) as progress:
        for wnid, name, outcome in progress:
            if isinstance(outcome, Prepared) and known is not None and wnid not in known:
                outcome = "its class is not in the training source"
            if isinstance(outcome, str):
                rejected.append({"split": split, "wnid": wnid, "name": name, "reason": outcome})
                progress.set_postfix(rejected=len(rejected), refresh=False)
                continue
            samples.append(
                _Sample(
                    wnid, name, _new_key(wnid, name, keys), spill.tell(), len(outcome.jpeg), outcome._replace(jpeg=b"")
                )
            )
            spill.write(outcome.jpeg)
    if not samples:
        why = f"; {rejected[0]['name']}: {rejected[0]['reason']}" if rejected else ""
        raise SourceError(
            f"no images found in {source.path}: {len(source.classes)} classes, {len(rejected)} unusable files{why}"
        )
    rejected += [
        {"split": split, "wnid": "", "name": stray, "reason": "belongs to no class"} for stray in source.strays
    ]
    spill.flush()
    return samples, rejected


def _new_key(wnid: str, name: str, taken: set[str]) -> str:
    """A key unique in the split, the same in every build: from the name, with a hash where that is not enough."""
    # WebDataset takes everything after the first dot for the extension, and a slash for a folder.
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", os.path.splitext(name)[0])
    plain = stem if stem.startswith(f"{wnid}_") else f"{wnid}_{stem}"
    key, attempt = plain, 0
    while key in taken or len(key) > MAX_KEY_CHARS:
        suffix = f"-{name_hash(f'key{attempt}', wnid, name):016x}"
        key, attempt = plain[: MAX_KEY_CHARS - len(suffix)] + suffix, attempt + 1
    taken.add(key)
    return key


def _take_validation(samples: list[_Sample], per_class: int) -> tuple[list[_Sample], list[_Sample], list[str]]:
    """Take `per_class` images of each class for validation, at most half of the class.

    Chosen by a hash of class and name without the seed: another shuffle must not move images between splits.
    """
    by_class: dict[str, list[_Sample]] = defaultdict(list)
    for sample in samples:
        by_class[sample.wnid].append(sample)
    val_keys: set[str] = set()
    short = 0
    for rows in by_class.values():
        rows.sort(key=lambda row: (name_hash("val", row.wnid, row.name), row.key))
        taken = min(per_class, len(rows) // 2)
        short += taken < per_class
        val_keys.update(row.key for row in rows[:taken])
    notes = [f"{short} classes gave less than {per_class} validation images: half of a class stays in train"]
    train = [sample for sample in samples if sample.key not in val_keys]
    return train, [sample for sample in samples if sample.key in val_keys], notes if short else []


def _write_split(
    output: Path, split: str, samples: list[_Sample], spill: BinaryIO, label: dict[str, int], settings: ShardSettings
) -> Split:
    """Stage 2: put the samples in the order of their hash and write the shards."""
    salt = f"order{settings.seed}"
    samples = sorted(samples, key=lambda row: (name_hash(salt, row.wnid, row.name), row.key))
    shards = []
    starts = range(0, len(samples), settings.samples_per_shard)
    for number, start in enumerate(tqdm(starts, desc=f"shards of {split}", unit="shard", leave=False, disable=None)):
        rows = samples[start : start + settings.samples_per_shard]
        shards.append(_write_shard(output / f"{split}-{number:06d}.tar", rows, spill, label))
    counts = Counter(sample.wnid for sample in samples)
    return Split(samples=len(samples), class_counts=[counts[wnid] for wnid in label], shards=shards)


def _write_shard(path: Path, rows: list[_Sample], spill: BinaryIO, label: dict[str, int]) -> ShardEntry:
    # tarfile rather than webdataset.TarWriter: it gives the same bytes, tells where each member's data lies (the
    # index needs that), and does not import torch.
    offsets = []
    with atomic_write(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                jpeg = os.pread(spill.fileno(), row.size_bytes, row.spill_offset)
                assert len(jpeg) == row.size_bytes, "the spill file holds every sample"
                offsets.append(_add_member(tar, f"{row.key}.jpg", jpeg))
                described = {
                    "wnid": row.wnid,
                    "label": label[row.wnid],
                    "source_name": row.name,
                    "width": row.image.width,
                    "height": row.image.height,
                    "bytes": row.size_bytes,
                    "source_width": row.image.source_width,
                    "source_height": row.image.source_height,
                    "reencoded": row.image.reencoded,
                }
                _add_member(tar, f"{row.key}.json", json.dumps(described).encode())
        file.flush()
        entry = ShardEntry(
            file=path.name,
            samples=len(rows),
            bytes=file.tell(),
            sha256=file_sha256(file.name),
        )
        index = ShardIndex(
            keys=np.array([row.key for row in rows]),
            offsets=np.array(offsets),
            sizes=np.array([row.size_bytes for row in rows]),
            labels=np.array([label[row.wnid] for row in rows]),
        )
        index.save(index_path(path))  # before the shard gets its name: a shard is never without its index
    return entry


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file; returns the offset of its first data byte in the tar."""
    info = tarfile.TarInfo(name)  # mtime, owner and mode keep their fixed defaults: the same input, the same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - padded


def _dataset_id(synsets: list[str], splits: dict[str, Split], settings: ShardSettings) -> str:
    """The `.beton` files are left out: they hold the same samples, and a run on either is a run on this dataset."""
    content = {
        "synsets": synsets,
        "splits": {name: [shard.sha256 for shard in split.shards] for name, split in splits.items()},
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
