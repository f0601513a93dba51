"""One shard of a dense set: its images read, converted and written, in the shard's order."""

import json
from dataclasses import dataclass

import numpy as np

from data_prep.dense.ledger import rows_to_bytes
from data_prep.dense.sample import make_sample
from data_prep.dense.source import Item
from data_prep.dense.tree import Tree
from data_prep.dense_set import DenseIndex
from data_prep.images.prepare import ImagePolicy
from data_prep.manifest import ShardEntry, index_path
from data_prep.shards.tar import MemberTar
from data_prep.storage import Folder

# In the folder of unfinished work: what the manifest says of finished shards; their classes; their ledger rows.
SHARD_RECORDS, COUNT_RECORDS, ROW_RECORDS = "dense-shards", "dense-counts", "dense-rows"


@dataclass(frozen=True)
class DenseShardTask:
    """`items` in the shard's order; `masks` is None where the annotations are in the items."""

    name: str
    split: str
    items: tuple[Item, ...]
    images: Tree
    masks: Tree | None
    category_ids: tuple[int, ...]
    policy: ImagePolicy
    output: Folder
    work: Folder

    def __str__(self) -> str:
        return self.name


def write_dense_shard(task: DenseShardTask) -> ShardEntry:
    """Write the shard, its index, its rows and counts, then the record that all of them are there."""
    label_of = {number: label for label, number in enumerate(task.category_ids)}
    rows = []
    keys: list[str] = []
    places: list[tuple[int, ...]] = []
    images_with = np.zeros(len(label_of), np.int64)
    counts = np.zeros(len(label_of), np.int64)
    with task.output.writing(task.name) as temp:
        with open(temp, "wb") as file, task.images.opened() as images:
            tar = MemberTar(file)
            with (task.masks or task.images).opened() as other:
                masks = None if task.masks is None else other
                for item in task.items:
                    made = make_sample(item, images, masks, task.policy, label_of, task.split)
                    if made.jpeg is not None:
                        made.rows[0]["shard"] = task.name
                        image = tar.add_member(f"{item.key}.jpg", made.jpeg)
                        mask = 0 if made.mask is None else tar.add_member(f"{item.key}.png", made.mask)
                        described = tar.add_member(f"{item.key}.json", made.described)
                        keys.append(item.key)
                        sizes = (len(made.jpeg), described, len(made.described), mask, len(made.mask or b""))
                        places.append((image, *sizes, made.width, made.height))
                        images_with += made.counts > 0
                        counts += made.counts
                    rows += made.rows
            tar.finish()
        columns = np.array(places, np.int64).reshape(-1, 8).T
        # Before the shard gets its name: a shard is never without its index.
        task.output.write(str(index_path(task.name)), DenseIndex(np.array(keys), *columns).to_bytes())
    entry = ShardEntry(file=task.name, samples=len(keys), bytes=tar.bytes, sha256=tar.digest.hexdigest())
    task.work.write(f"{ROW_RECORDS}/{task.name}.parquet", rows_to_bytes(rows))
    told = {"images": images_with.tolist(), "counts": counts.tolist()}
    task.work.write(f"{COUNT_RECORDS}/{task.name}.json", json.dumps(told).encode())
    task.work.write(f"{SHARD_RECORDS}/{task.name}.json", entry.model_dump_json().encode())
    return entry
