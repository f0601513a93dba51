"""A source of images -> shuffled WebDataset shards with indexes, the ledger, and the manifest.

Two stages, so that neither the order nor the bytes depend on the number of workers, their deaths or restarts:
1. `ingest.py`: each chunk of the source becomes a data file of prepared images and a table of rows;
2. `assign.py` gives every image its place by hashes, so each shard is a uniform random draw of the whole set; then
   each shard is gathered from the data files, by any worker, to the same bytes.

All files get their final name only when complete; `dataset.json` comes last: a folder that has one is whole. What the
stages have done stands in OUTPUT/.data_prep until then, and the same command goes on from there.
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from data_prep.build.assign import IN_VAL, assign, load_rows
from data_prep.build.gather import FORMER_RECORDS, SHARD_RECORDS, ShardTask, write_shard
from data_prep.build.ingest import ChunkResult, IngestTask, chunk_name, ingest_chunk
from data_prep.build.output import BuildResult, Output
from data_prep.build.reclaim import Reclaimer
from data_prep.cluster import Cluster
from data_prep.images.prepare import ImagePolicy
from data_prep.ledger import TRAIN, VAL, Assignment, Rows, write_ledger
from data_prep.manifest import MANIFEST_NAME, Manifest, ShardEntry, Split
from data_prep.progress import Progress
from data_prep.shards.tar import ShardTarError
from data_prep.shards.upgrade import ShardUpgrade, upgrade_shard
from data_prep.sources.chunking import Source
from data_prep.sources.streams import SourceError
from data_prep.storage import Folder, LostWorkError
from data_prep.writer import sole_writer

MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, CHUNKS_OF_A_SMALL_SOURCE = 128 << 20, 1 << 16, 32
MAX_CHUNK_IMAGES = 8_000


@dataclass(frozen=True)
class ShardSettings:
    """What decides the content of the data set (workers and formats do not)."""

    short_side_px: int = 512
    quality: int = 90
    reencode: str = "when-resized"
    truncated: str = "reject"
    min_side_px: int = 32
    exif_orientation: str = "ignore"
    check: str = "decode"
    samples_per_shard: int = 10_000
    seed: int = 0
    max_images_per_class: int | None = None
    val_per_class: int = 0
    duplicates: str = "leaks"

    @property
    def policy(self) -> ImagePolicy:
        """The part that concerns one image."""
        return ImagePolicy(**{field.name: getattr(self, field.name) for field in fields(ImagePolicy)})


def build_shards(
    sources: list[Source],
    output: Output,
    settings: ShardSettings,
    cluster: Cluster,
    *,
    name: str,
    exclude: Collection[tuple[str, str]] = (),
    max_reject: float = 1.0,
    salvage: bool = False,
    force: bool = False,
    rename: bool = False,
) -> BuildResult:
    """Build the data set in `output`, go on with an interrupted build, or find that it is there already.

    Raises ShardError when `output` holds a build with other settings (unless `force`), SourceError when the source
    gives no usable image, RejectError when too much of it is unusable.
    """
    wanted = {**asdict(settings), "exclude": _digest(exclude) if exclude else None}
    wanted |= {"rename_classes": True} if rename else {}
    wanted |= dict.fromkeys(("source", "val_source"))
    for key, source in zip(("source", "val_source"), sources, strict=False):
        wanted[key] = {"file": source.name, "kind": source.kind}
        wanted[key]["fingerprint"] = source.fingerprint()
    with sole_writer(output.folder):
        if output.folder.exists(MANIFEST_NAME) and not force:
            return output.already_built(name, wanted)
        output.begin(name, wanted, force=force)
        names, met = _ingest(sources, output.work, settings, cluster)
        rows = load_rows(output.work.folder("chunks"), names)
        # What is salvaged may be of classes that no header told of.
        classes = sorted({*met, *(rows.wnids[i] for i in np.unique(rows.wnid[rows.split == TRAIN]))} - {""})
        notes = output.judge(names, max_reject=max_reject, salvage=salvage)
        assignment = assign(
            rows,
            output.work.folder("chunks"),
            classes,
            max_images_per_class=settings.max_images_per_class,
            val_per_class=settings.val_per_class,
            duplicates=settings.duplicates,
            exclude=exclude,
        )
        if not len(assignment.order["train"]):
            why = _why_no_train(rows, assignment) or output.first_reject(names)
            raise SourceError(f"no usable training images in {sources[0].path}: {why}")
        assignment.notes[:0] = notes
        # A tar tells only when it has been read whether it has a folder val/.
        has_val = bool(settings.val_per_class) or bool(np.any(rows.split == VAL))
        if has_val and not len(assignment.order["val"]):
            raise SourceError(_why_no_val(sources, output, names, rows, known=set(classes)))
        try:
            splits = _write_shards(rows, assignment, classes, output, settings, cluster, has_val)
        except LostWorkError as error:
            output.lost(error)
            raise
        empty = splits["train"].class_counts.count(0)
        if empty:
            assignment.notes.append(f"{empty} of {len(classes)} classes have no usable training image")
        write_ledger(rows, assignment, output.folder, output.work.folder("chunks"), settings.samples_per_shard)
        manifest = Manifest(
            name=name,
            dataset_id=dataset_id(classes, splits, settings),
            synsets=classes,
            splits=splits,
            settings=wanted,
        )
        output.finish(manifest)
    return BuildResult(manifest, False, assignment.notes)


def _ingest(
    sources: list[Source], work: Folder, settings: ShardSettings, cluster: Cluster
) -> tuple[list[str], set[str]]:
    """Stage 1. Returns the names of all chunks, in source order, and the classes of train."""
    names: list[str] = []
    classes: set[str] = set()
    for source in sources:
        record = f"ingested-{source.split}.json"
        if not work.exists(record):
            found = _ingest_source(source, work, settings, cluster)
            work.write(record, json.dumps(found).encode())
        found = json.loads(work.read(record))
        names += found["chunks"]
        if source.split == "train":
            classes |= set(found["classes"])
    return names, classes


def _ingest_source(source: Source, work: Folder, settings: ShardSettings, cluster: Cluster) -> dict[str, Any]:
    present = {stem.removesuffix(".parquet") for stem in work.folder("chunks").names("*.parquet")}
    done = {int(stem.rsplit("-", 1)[1]) for stem in present if stem.startswith(f"{source.split}-")}
    spool = work.folder("spool")
    names: list[str] = []
    classes: set[str] = set()
    max_bytes = MAX_CHUNK_BYTES
    if source.total_bytes:  # so that a small source, too, keeps all workers busy
        max_bytes = min(max_bytes, max(MIN_CHUNK_BYTES, source.total_bytes // CHUNKS_OF_A_SMALL_SOURCE))
    progress = Progress(f"images of {source.split}", source.total_bytes)

    def tasks() -> Iterator[IngestTask]:
        told = False
        for chunk in source.chunks(max_bytes, MAX_CHUNK_IMAGES, spool, done):
            if source.begun_at and not told:
                progress.say(f"{source.name}: unpacking goes on from byte {source.begun_at:,} of its content")
                told = True
            names.append(chunk_name(source.split, chunk.number))
            if chunk.split == "train":
                classes.update(chunk.classes)
            if chunk.number in done:
                progress.advance(chunk.bytes, resumed=True)
            else:
                yield IngestTask(
                    source.split, chunk, settings.policy, settings.seed, settings.max_images_per_class, work
                )

    task: IngestTask
    result: ChunkResult
    with progress:
        for task, result in cluster.run(ingest_chunk, tasks()):
            if task.chunk.spool is not None:
                spool.remove(task.chunk.spool)
            progress.advance(task.chunk.bytes, images=result.images, rejected=result.rejected)
            for damage in result.damage:
                progress.say(f"damaged: {damage}")
    return {"chunks": names, "classes": sorted(classes)}


def _write_shards(
    rows: Rows,
    assignment: Assignment,
    classes: list[str],
    output: Output,
    settings: ShardSettings,
    cluster: Cluster,
    has_val: bool,
) -> dict[str, Split]:
    """Stage 2."""
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    label = np.array([label_of.get(wnid, -1) for wnid in rows.wnids], np.int32)
    entries = _finished(output, classes, cluster)
    splits = ("val", "train") if has_val else ("train",)  # no space is given back before val is whole
    shard_names = {
        split: [
            f"{split}-{number:06d}.tar"
            for number in range(-(-len(assignment.order[split]) // settings.samples_per_shard))
        ]
        for split in splits
    }

    reclaimer = Reclaimer(rows, assignment.order["train"], settings.samples_per_shard, output.work)
    reclaimer.check({number for number, name in enumerate(shard_names["train"]) if name in entries})

    def tasks() -> Iterator[ShardTask]:
        for split in splits:
            for number, name in enumerate(shard_names[split]):
                if name in entries:
                    progress.advance(entries[name].samples, resumed=True)
                    continue
                start = number * settings.samples_per_shard
                index = assignment.order[split][start : start + settings.samples_per_shard]
                numbers, chunk = np.unique(np.searchsorted(rows.start, index, side="right") - 1, return_inverse=True)
                yield ShardTask(
                    name=name,
                    output=output.folder,
                    work=output.work,
                    chunks=[rows.chunks[i] for i in numbers],
                    chunk=chunk.astype(np.int32),
                    offset=rows.offset[index],
                    jpeg_bytes=rows.jpeg_bytes[index],
                    tail_bytes=rows.tail_bytes[index],
                    label=label[rows.wnid[index]],
                    wnids=classes,
                    keys={at: assignment.keys[row] for at, row in enumerate(index.tolist()) if row in assignment.keys},
                )

    train_shards = {name: number for number, name in enumerate(shard_names["train"])}
    val_shards = set(shard_names.get("val", ()))
    with Progress("shards", sum(len(assignment.order[split]) for split in splits), unit="images") as progress:
        for task, entry in cluster.run(write_shard, tasks()):
            entries[task.name] = entry
            progress.advance(entry.samples)
            reclaimer.finish(train_shards.get(task.name), val_done=val_shards <= entries.keys())
    return {
        split: Split(
            samples=len(assignment.order[split]),
            class_counts=np.bincount(label[rows.wnid[assignment.order[split]]], minlength=len(classes)).tolist(),
            shards=[entries[name] for name in shard_names[split]],
        )
        for split in sorted(splits)
    }


def _finished(output: Output, classes: list[str], cluster: Cluster) -> dict[str, ShardEntry]:
    """The shards that an interrupted run has written; those of format 1, whose images may be given back, upgraded."""
    entries, records = output.finished_shards(SHARD_RECORDS), output.work.folder(FORMER_RECORDS)
    former = [ShardEntry.model_validate_json(records.read(name)) for name in records.names("*.json")]
    tasks = [
        ShardUpgrade(output.folder, entry, tuple(classes), output.work.folder(SHARD_RECORDS))
        for entry in former
        if entry.file not in entries and output.folder.exists(entry.file)
    ]
    for task, upgraded in cluster.run(_upgraded, tasks):
        if upgraded is not None:
            entries[task.entry.file] = upgraded
    return entries


def _upgraded(task: ShardUpgrade) -> ShardEntry | None:
    try:
        return upgrade_shard(task)
    except ShardTarError:
        return None  # as if it were not there


def _why_no_train(rows: Rows, assignment: Assignment) -> str:
    """Where usable images are all left out; else ''."""
    usable = (rows.offset >= 0) & (rows.split == TRAIN)
    if not np.any(usable):
        return ""
    if np.all(assignment.left_out[usable] == IN_VAL):
        return (
            f"all {int(usable.sum()):,} have the same bytes as a validation image: give other images as one of the two "
            "sources (--duplicates keep leaves them in both)"
        )
    return f"all {int(usable.sum()):,} are left out by --exclude, as copies, or as copies of validation images"


def _why_no_val(sources: list[Source], output: Output, names: list[str], rows: Rows, known: set[str]) -> str:
    of_val = {rows.wnids[i] for i in np.unique(rows.wnid[rows.split == VAL])} - {""}
    if not np.any(rows.split == VAL):
        why = "every class has but one image, and half of a class stays in train: leave out --val-per-class"
    elif of_val and not of_val & known:
        why = f"none of its {len(of_val):,} classes, such as {min(of_val)}, is in train: give train's own"
    else:
        why = f"{output.first_reject(names, 'val')}: --val-labels says which class each image has"
    return f"no usable validation images in {sources[-1].path}: {why}"


def _digest(exclude: Collection[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(sorted("\t".join(pair) for pair in exclude)).encode()).hexdigest()[:32]


def dataset_id(synsets: list[str], splits: dict[str, Split], settings: ShardSettings) -> str:
    """A hash of content and settings. The `.beton` files are left out: they hold the same samples, and a run on either
    is a run on this dataset.
    """
    content = {
        "synsets": synsets,
        "splits": {name: [shard.sha256 for shard in split.shards] for name, split in splits.items()},
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
