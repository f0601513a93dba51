"""A dense source -> shards with indexes, the ledger, and the manifest.

Which image goes to which shard is decided before any is read: train by a hash of seed and key, so that each shard is a
uniform draw, validation in the order of image ids. So shards are written in one stage, by any worker, to the same
bytes; one that is finished is not written again. An image that cannot be used leaves its shard one sample short.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_prep.cluster import Cluster
from data_prep.dense.ledger import rows_to_bytes, write_ledger
from data_prep.dense.shard import COUNT_RECORDS, ROW_RECORDS, SHARD_RECORDS, DenseShardTask, write_dense_shard
from data_prep.dense.source import Item, Source, SourceSplit
from data_prep.dense.tree import DenseSourceError
from data_prep.dense_set import DenseManifest, DenseSplit
from data_prep.images.prepare import MAX_SIDE_PX, ImagePolicy
from data_prep.ledger import LEDGER_NAME
from data_prep.manifest import MANIFEST_NAME, ShardEntry, index_path
from data_prep.progress import Progress
from data_prep.storage import DataPrepError, Folder, open_binary
from data_prep.writer import BuildFolder, ShardError, sole_writer

CODE = 1  # of what becomes of an image; another number, and an interrupted build of the former does not go on


class DenseRejectError(DataPrepError):
    """Too many images cannot be used. The work done is kept."""

    exit_code = 3


@dataclass(frozen=True)
class DenseSettings:
    """What decides the content of the data set. `quality` is of images that are encoded anew."""

    quality: int = 95
    samples_per_shard: int = 1_000
    seed: int = 0

    @property
    def policy(self) -> ImagePolicy:
        """Nothing is shrunk, set upright, or too small: masks and boxes are of the pixels as they are stored."""
        return ImagePolicy(short_side_px=MAX_SIDE_PX, quality=self.quality, min_side_px=1)


@dataclass
class DenseResult:
    """`counts`: how many rows of the ledger have which (split, "image" or "annotation", action, reason)."""

    manifest: DenseManifest
    already_built: bool
    counts: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)


def build_dense(
    source: Source,
    output: BuildFolder,
    settings: DenseSettings,
    cluster: Cluster,
    *,
    name: str,
    max_reject: float = 1.0,
    force: bool = False,
) -> DenseResult:
    """Build the data set in `output`, go on with an interrupted build, or find that it is there already.

    Raises ShardError when `output` holds a build with other settings (unless `force`), DenseSourceError when a split
    has no usable image, DenseRejectError when too many of it are not usable.
    """
    wanted = {**asdict(settings), "code": CODE, "splits": [split.name for split in source.splits]}
    wanted["source"] = {"kind": source.kind, "fingerprint": source.fingerprint}
    with sole_writer(output.folder):
        if output.folder.exists(MANIFEST_NAME) and not force:
            return _already_built(output, name, wanted)
        output.begin(name, wanted, force=force)
        shards = {split.name: shard_items(split, settings) for split in source.splits}
        entries = _write_shards(source, shards, output, settings, cluster)
        parts = [f"{ROW_RECORDS}/{shard}.parquet" for split in source.splits for shard in shards[split.name]]
        strays = rows_to_bytes([row for split in source.splits for row in split.strays])
        write_ledger(output.folder, (*(output.work.read(part) for part in parts), strays))
        counts = count_rows(output.folder)
        for split in source.splits:
            refuse_rejects(split, counts, max_reject)
        splits = {
            split.name: _manifest_split(source, list(shards[split.name]), entries, output) for split in source.splits
        }
        manifest = DenseManifest(
            name=name,
            dataset_id=_dataset_id(source, splits, settings),
            task="semantic" if source.task == "semantic" else "instance",
            classes=source.classes,
            category_ids=source.category_ids,
            splits=splits,
            settings=wanted,
        )
        output.folder.write(MANIFEST_NAME, manifest.to_bytes())
        output.remove_work()
    return DenseResult(manifest, False, counts)


def shard_items(split: SourceSplit, settings: DenseSettings) -> dict[str, list[Item]]:
    """File name of each shard -> its images, in its order."""
    items = split.items
    if split.name == "train":
        items = sorted(items, key=lambda item: (shuffle_hash(settings.seed, item.key), item.key))
    size = settings.samples_per_shard
    return {
        f"{split.name}-{number:06d}.tar": items[start : start + size]
        for number, start in enumerate(range(0, len(items), size))
    }


def shuffle_hash(seed: int, key: str) -> int:
    """64 uniform bits that depend on seed and key alone."""
    return int.from_bytes(hashlib.blake2b(f"dense{seed}\0{key}".encode(), digest_size=8).digest(), "big")


def count_rows(folder: Folder) -> Counter[tuple[str, str, str, str]]:
    """How many rows of the ledger there are of each (split, "image" or "annotation", action, reason)."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    with open_binary(folder.join(LEDGER_NAME)) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=["split", "annotation_id", "action", "reason"]):
            for split, number, action, reason in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                counts[split, "image" if number is None else "annotation", action, reason] += 1
    return counts


def refuse_rejects(split: SourceSplit, counts: Counter[tuple[str, str, str, str]], max_reject: float) -> None:
    """Raise where no image of the split is usable, or a larger share than `max_reject` is not."""
    reasons = Counter({row[3]: count for row, count in counts.items() if row[:3] == (split.name, "image", "rejected")})
    rejected = reasons.total()
    most = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(5))
    if rejected == len(split.items):
        raise DenseSourceError(f"no usable image in {split.name} ({most or 'it lists none'}): look at {split.images}")
    if rejected / len(split.items) > max_reject:
        raise DenseRejectError(
            f"{rejected:,} of {len(split.items):,} images of {split.name} cannot be used "
            f"({rejected / len(split.items):.1%}: {most}), more than --max-reject {max_reject:.1%} allows: look at the "
            "source, or raise it (what is done is kept)"
        )


def _already_built(output: BuildFolder, name: str, wanted: dict[str, Any]) -> DenseResult:
    manifest = DenseManifest.load(output.folder.url)
    output.refuse_other(manifest.name, manifest.settings, name, wanted)
    for split in manifest.splits.values():
        output.refuse_incomplete(split.shards, indexed=True)
    if not output.folder.exists(LEDGER_NAME):
        raise ShardError(f"{output.folder.join(LEDGER_NAME)} is missing: give --force to build the dataset anew")
    output.remove_work()  # of a run that was killed between the manifest and the end
    return DenseResult(manifest, True, count_rows(output.folder))


def _write_shards(
    source: Source,
    shards: dict[str, dict[str, list[Item]]],
    output: BuildFolder,
    settings: DenseSettings,
    cluster: Cluster,
) -> dict[str, ShardEntry]:
    entries = output.finished_shards(SHARD_RECORDS)

    def tasks() -> Iterator[DenseShardTask]:
        for split in source.splits:
            for shard, items in shards[split.name].items():
                if shard in entries:
                    progress.advance(len(items), resumed=True)
                    continue
                yield DenseShardTask(
                    name=shard,
                    split=split.name,
                    items=tuple(items),
                    images=split.images,
                    masks=split.masks,
                    category_ids=tuple(source.category_ids),
                    policy=settings.policy,
                    output=output.folder,
                    work=output.work,
                )

    with Progress("images", sum(len(split.items) for split in source.splits), unit="images") as progress:
        for task, entry in cluster.run(write_dense_shard, tasks()):
            entries[task.name] = entry
            progress.advance(len(task.items), rejected=len(task.items) - entry.samples)
    return entries


def _manifest_split(
    source: Source, names: list[str], entries: dict[str, ShardEntry], output: BuildFolder
) -> DenseSplit:
    told = [json.loads(output.work.read(f"{COUNT_RECORDS}/{name}.json")) for name in names]
    empty = [name for name in names if not entries[name].samples]
    for name in empty:  # every image of it was rejected
        output.folder.remove(name)
        output.folder.remove(str(index_path(name)))
    of_classes = [np.sum([each[part] for each in told], axis=0).tolist() for part in ("images", "counts")]
    kind = "class_pixels" if source.task == "semantic" else "class_annotations"
    shards = [entries[name] for name in names if name not in empty]
    return DenseSplit(
        samples=sum(entry.samples for entry in shards),
        class_images=of_classes[0],
        shards=shards,
        **{kind: of_classes[1]},
    )


def _dataset_id(source: Source, splits: dict[str, DenseSplit], settings: DenseSettings) -> str:
    content = {
        "classes": list(zip(source.category_ids, source.classes, strict=True)),
        "splits": {name: [shard.sha256 for shard in split.shards] for name, split in splits.items()},
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
