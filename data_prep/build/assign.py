"""Between the stages: which split each image goes to, which are left out, and the order of the shuffle.

All of it follows from hashes of names and contents, so neither workers nor chunks nor interruptions change it. Every
image is one row of a few numpy columns; deciding takes 115 bytes a row at its peak, 1.6 GB for all of ImageNet-22K
(tests/bench/bench_assign.py).
"""

import io
from collections.abc import Collection, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.build.ingest import VAL_SALT, hashed_key, name_hash
from data_prep.ledger import LEFT_OUT, NEITHER, SPLITS, TRAIN, VAL, Assignment, Rows
from data_prep.sources.streams import SourceError
from data_prep.storage import Folder

OVER_LIMIT, NOT_IN_TRAIN, EXCLUDED, IN_VAL, SAME_BYTES = LEFT_OUT

COLUMNS = ["wnid", "split", "action", "order", "name_hash", "key_hash", "content_hash", "offset"]
COLUMNS += ["bytes_out", "tail_bytes"]


def load_rows(chunks: Folder, names: list[str]) -> Rows:
    """Read the columns that decide from the chunks' tables."""
    codes: dict[str, int] = {}
    parts: dict[str, list[np.ndarray]] = {}
    start = [0]
    for name in names:
        table = pq.read_table(io.BytesIO(chunks.read(f"{name}.parquet")), columns=COLUMNS)
        wnid = table.column("wnid").combine_chunks().dictionary_encode()
        code_of = np.array([codes.setdefault(w, len(codes)) for w in wnid.dictionary.to_pylist()], np.int32)
        columns = {
            "wnid": code_of[wnid.indices.to_numpy()] if len(wnid) else np.zeros(0, np.int32),
            "split": np.where(_equals(table.column("split"), "val"), VAL, TRAIN).astype(np.int8),
            "counted": ~_equals(table.column("action"), "skipped") & ~_equals(table.column("wnid"), ""),
            "jpeg_bytes": table.column("bytes_out").fill_null(0).to_numpy().astype(np.int32),
            "tail_bytes": table.column("tail_bytes").to_numpy(),
            **{n: table.column(n).to_numpy() for n in ("order", "name_hash", "key_hash", "content_hash", "offset")},
        }
        for column, values in columns.items():
            parts.setdefault(column, []).append(values)
        start.append(start[-1] + len(table))
    if not parts:
        raise SourceError("the source holds no files at all")
    joined = {column: np.concatenate(values) for column, values in parts.items()}
    return Rows(chunks=names, start=np.array(start, np.int64), wnids=list(codes), **joined)


def _equals(column: pa.ChunkedArray, value: str) -> np.ndarray:
    return np.asarray(pc.equal(column, value).to_numpy(), dtype=bool)


def assign(
    rows: Rows,
    chunks: Folder,
    classes: Collection[str],
    *,
    max_images_per_class: int | None,
    val_per_class: int,
    duplicates: str,
    exclude: Collection[tuple[str, str]],
) -> Assignment:
    """Decide over every row. `classes`: of train; `duplicates`: 'keep' all, 'leaks' leaves out training images with
    the same bytes as a validation image, 'drop' all but one of the same bytes in a split as well; `exclude`: (wnid,
    name) of images to leave out of train.
    """
    usable = rows.offset >= 0
    split = np.where(usable, rows.split, NEITHER).astype(np.int8)
    left_out = np.zeros(len(rows), np.int8)
    notes: list[str] = []

    def leave_out(chosen: np.ndarray, code: int) -> None:
        left_out[chosen] = code
        split[chosen] = NEITHER

    in_train_source = rows.split == TRAIN
    if max_images_per_class is not None:
        place = _place_in_class(rows, rows.counted & in_train_source)
        leave_out(usable & in_train_source & (place >= max_images_per_class), OVER_LIMIT)
    known = np.isin(rows.wnids, list(classes))
    leave_out((split == VAL) & ~known[rows.wnid], NOT_IN_TRAIN)
    # Before --exclude: what is listed there must not change what is held out.
    if val_per_class:
        place = _place_in_class(rows, split == TRAIN)
        of_class = np.bincount(rows.wnid[split == TRAIN], minlength=len(rows.wnids))
        taken = np.minimum(val_per_class, of_class // 2)
        split[(split == TRAIN) & (place < taken[rows.wnid])] = VAL
        short = int(((of_class > 0) & (taken < val_per_class)).sum())
        if short:
            notes.append(
                f"{short} classes gave less than {val_per_class} validation images: half of a class stays in train"
            )
    if exclude:
        hashes = np.array([name_hash(VAL_SALT, wnid, name) for wnid, name in exclude], np.uint64)
        listed = np.isin(rows.name_hash, hashes) & (split == TRAIN)
        leave_out(listed, EXCLUDED)
        notes.append(f"{int(listed.sum()):,} of the {len(exclude):,} images listed in --exclude were left out of train")
    if duplicates == "drop":
        for which in (TRAIN, VAL):
            leave_out(_repeated(rows, split == which), SAME_BYTES)
    if duplicates in ("leaks", "drop"):
        leave_out((split == TRAIN) & np.isin(rows.content_hash, rows.content_hash[split == VAL]), IN_VAL)
    same = int(_repeated(rows, split == TRAIN).sum())
    if same and duplicates != "drop":
        notes.append(
            f"{same:,} training images are byte for byte another one's copies; --duplicates drop leaves them out"
        )
    # Hashes of 64 bits do not collide among 14 million names, but one name may stand twice in a source.
    order = {
        name: np.flatnonzero(split == number)[np.argsort(rows.order[split == number], kind="stable")]
        for number, name in enumerate(SPLITS)
    }
    return Assignment(split, left_out, order, _resolve_keys(rows, chunks, split), notes)


def _place_in_class(rows: Rows, chosen: np.ndarray) -> np.ndarray:
    """For each chosen row its place among those of its class by name hash; a huge number for the others."""
    place = np.full(len(rows), np.iinfo(np.int64).max)
    index = np.flatnonzero(chosen)
    index = index[np.lexsort((rows.name_hash[index], rows.wnid[index]))]
    wnid = rows.wnid[index]
    first = np.flatnonzero(np.concatenate([[True], wnid[1:] != wnid[:-1]])) if len(index) else np.zeros(0, int)
    place[index] = np.arange(len(index)) - np.repeat(first, np.diff(np.append(first, len(index))))
    return place


def _repeated(rows: Rows, chosen: np.ndarray) -> np.ndarray:
    """Which chosen rows have the content of an earlier one, by name hash."""
    index = np.flatnonzero(chosen)
    index = index[np.lexsort((rows.name_hash[index], rows.content_hash[index]))]
    content = rows.content_hash[index]
    repeated = np.zeros(len(rows), bool)
    repeated[index[1:][content[1:] == content[:-1]]] = True
    return repeated


def _resolve_keys(rows: Rows, chunks: Folder, split: np.ndarray) -> dict[int, str]:
    """New keys for rows whose plain keys are equal: the plain key with a hash of the name, unique in the data set."""
    index = np.flatnonzero(split != NEITHER)
    index = index[np.argsort(rows.key_hash[index], kind="stable")]
    hashes = rows.key_hash[index]
    equal = np.flatnonzero(hashes[1:] == hashes[:-1])
    colliding = np.sort(index[np.union1d(equal, equal + 1)])
    keys: dict[int, str] = {}
    taken: set[str] = set()
    for row, (wnid, name, plain) in zip(colliding.tolist(), _names(rows, chunks, colliding), strict=True):
        attempt = 0
        while (key := hashed_key(plain, wnid, name, attempt)) in taken:
            attempt += 1
        taken.add(key)
        keys[row] = key
    return keys


def _names(rows: Rows, chunks: Folder, wanted: np.ndarray) -> Iterable[tuple[str, str, str]]:
    for number in np.unique(np.searchsorted(rows.start, wanted, side="right") - 1).tolist():
        here = wanted[(wanted >= rows.start[number]) & (wanted < rows.start[number + 1])] - rows.start[number]
        columns = ["wnid", "name", "plain_key"]
        table = pq.read_table(io.BytesIO(chunks.read(f"{rows.chunks[number]}.parquet")), columns=columns)
        yield from (tuple(row.values()) for row in table.take(pa.array(here)).to_pylist())
