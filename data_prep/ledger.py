"""The ledger: what became of every image of a source, one row each, in Parquet."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.storage import Folder

LEDGER_NAME = "ledger.parquet"

# kept: in train as it was or merely shrunk; repaired: in train after a repair; held_out: in the validation split
# (repaired or not); duplicate: left out because the same or nearly the same image is elsewhere; rejected: cannot be
# used; skipped: good, but not asked for (over the limit per class, class not wanted).
ACTIONS = ("kept", "repaired", "held_out", "duplicate", "rejected", "skipped")

SCHEMA = pa.schema(
    [
        ("wnid", pa.string()),  # '' where the file belongs to no class
        ("name", pa.string()),  # inside its class, as in the source
        ("split", pa.string()),  # train or val, '' where it is in neither
        ("action", pa.string()),  # one of ACTIONS
        ("reason", pa.string()),  # short code: of a rejection, or the repairs joined by '+'; '' for a plain 'kept'
        ("detail", pa.string()),  # free text, such as the decoder's words
        ("width", pa.int32()),  # pixels as stored; null where not stored
        ("height", pa.int32()),
        ("source_width", pa.int32()),  # pixels in the source; null where unknown
        ("source_height", pa.int32()),
        ("bytes_in", pa.int64()),
        ("bytes_out", pa.int64()),  # of the stored JPEG; null where not stored
        ("sha256", pa.string()),  # of the source's bytes, 64 hex digits
        ("key", pa.string()),  # of the sample in its shard; '' where not stored
        ("shard", pa.string()),  # file name of the shard; '' where not stored
    ]
)

TRAIN, VAL, NEITHER = 0, 1, -1
SPLITS = ("train", "val")
# Why stage 2 leaves an image out: code -> (action, reason).
LEFT_OUT = {
    1: ("skipped", "over_class_limit"),
    2: ("skipped", "class_not_in_train"),
    3: ("duplicate", "listed_in_exclude"),
    4: ("duplicate", "same_bytes_in_val"),
    5: ("duplicate", "same_bytes"),
}


@dataclass(eq=False)
class Rows:
    """All rows of all chunks, in source order; `start[c]` is the first row of chunk c."""

    chunks: list[str]
    start: np.ndarray  # int64 (chunks + 1,)
    wnids: list[str]
    wnid: np.ndarray  # int32 (rows,), number in `wnids`
    split: np.ndarray  # int8, of the source: TRAIN or VAL
    counted: np.ndarray  # bool: an image (also a rejected one) that counts against the limit per class
    order: np.ndarray  # uint64
    name_hash: np.ndarray  # uint64
    key_hash: np.ndarray  # uint64
    content_hash: np.ndarray  # uint64
    offset: np.ndarray  # int64, -1 where there is no image
    jpeg_bytes: np.ndarray  # int32
    tail_bytes: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.wnid)


@dataclass(eq=False)
class Assignment:
    """split (rows,) int8; left_out (rows,) int8, a code of LEFT_OUT or 0; order: rows of each split, shuffled;
    keys: rows whose key is not the plain one.
    """

    split: np.ndarray
    left_out: np.ndarray
    order: dict[str, np.ndarray]
    keys: dict[int, str]
    notes: list[str]


def final_action(source_action: str, source_reason: str, split: int, left_out: int) -> tuple[str, str]:
    """Action and reason of a row: what stage 1 found, unless stage 2 left the image out or took it for validation."""
    if left_out:
        return LEFT_OUT[left_out]
    return ("held_out" if split == VAL else source_action), source_reason


def write_ledger(rows: Rows, assignment: Assignment, output: Folder, chunks: Folder, samples_per_shard: int) -> None:
    """Write OUTPUT/ledger.parquet, in source order, one chunk in memory at a time."""
    shard_of = np.full(len(rows), -1, np.int64)
    for index in assignment.order.values():
        shard_of[index] = np.arange(len(index)) // samples_per_shard
    with output.writing(LEDGER_NAME) as temp, pq.ParquetWriter(temp, SCHEMA, compression="zstd") as writer:
        for number, name in enumerate(rows.chunks):
            table = pq.read_table(io.BytesIO(chunks.read(f"{name}.parquet")))
            columns = {**table.to_pydict(), "key": [""] * len(table), "shard": [""] * len(table)}
            for i, row in enumerate(range(int(rows.start[number]), int(rows.start[number + 1]))):
                split = int(assignment.split[row])
                columns["action"][i], columns["reason"][i] = final_action(
                    columns["action"][i], columns["reason"][i], split, int(assignment.left_out[row])
                )
                if split == NEITHER:
                    columns["split"][i] = ""
                    columns["width"][i] = columns["height"][i] = columns["bytes_out"][i] = None
                else:
                    columns["split"][i] = SPLITS[split]
                    columns["key"][i] = assignment.keys.get(row, columns["plain_key"][i])
                    columns["shard"][i] = f"{SPLITS[split]}-{shard_of[row]:06d}.tar"
            writer.write_table(pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA))


def count_actions(path: Path) -> dict[str, int]:
    """How many images became what, by ACTIONS. Raises OSError and pyarrow's errors."""
    counts = pq.read_table(path, columns=["action"])["action"].value_counts()
    return {str(each["values"]): int(each["counts"]) for each in counts.to_pylist()}
