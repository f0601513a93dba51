"""The ledger of a dense set: a row for each image, and for each annotation that is not taken as it is, in Parquet."""

import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.ledger import LEDGER_NAME
from data_prep.storage import Folder

# Of images. kept: in the set with its own bytes; repaired: in it, and something was changed; rejected: not in it.
# Of annotations. kept: in the set, with something to know of it; repaired: in it, something was changed or made up for;
# dropped: not in it.
ACTIONS = ("kept", "repaired", "dropped", "rejected")
WHAT_IT_MEANS = {
    "no_annotation": "an image without objects or labels: it counts in evaluation",
    "missing_image": "listed, but there is no such file",
    "missing_mask": "an image without its mask",
    "size_differs": "the image is not of the size of its mask, or of what its annotations say",
    "mask_not_8_bit": "a mask in colours or of 16 bits: of another set",
    "mask_damaged": "a mask that does not decode",
    "values_over_classes": "pixels of a mask above the last class: ignored, as unlabelled ones",
    "crowd": "iscrowd is 1: evaluators ignore what is matched to it",
    "empty_box": "a box without width or height: no target of training; evaluation counts it as missed",
    "outside_image": "a box that lies outside: likewise",
    "no_area": "its area, or its mask, is 0: likewise",
    "bad_box": "no four finite numbers as bbox",
    "no_segmentation": "a box alone",
    "bad_segmentation": "a segmentation that cannot be one of this image: taken as a box alone",
    "bad_polygon": "polygons of fewer than three points, or of odd numbers: left out of the mask",
    "area_missing": "taken from its mask, or its box",
    "iscrowd_missing": "taken as 0",
    "unknown_image": "of an image that is not listed: evaluation does not look at it",
    "unknown_category": "of a category that is not listed: likewise",
}

SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("name", pa.string()),  # of the image, as in the source; '' where an annotation is of none
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),  # null in the row of an image
        ("action", pa.string()),  # one of ACTIONS
        ("reason", pa.string()),  # codes joined by '+': those above, or of `images.prepare` and `images.rejection`
        ("detail", pa.string()),
        ("width", pa.int32()),  # pixels as stored; null where not stored, and of annotations
        ("height", pa.int32()),
        ("bytes_in", pa.int64()),
        ("bytes_out", pa.int64()),  # of the stored image
        ("sha256", pa.string()),  # of the source image's bytes
        ("key", pa.string()),
        ("shard", pa.string()),
    ]
)


def row(split: str, name: str, action: str, reason: str, detail: str = "", **more: Any) -> dict[str, Any]:
    """A row; columns that are not given are null, texts empty."""
    texts = {"key": "", "shard": ""}
    told = {"split": split, "name": _text(name), "action": action, "reason": reason, "detail": _text(detail)}
    return {**dict.fromkeys(SCHEMA.names), **texts, **told, **more}


def rows_to_bytes(rows: list[dict[str, Any]]) -> bytes:
    """Rows as a Parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, compression="zstd")
    return file.getvalue()


def write_ledger(folder: Folder, parts: Iterable[bytes]) -> None:
    """Write the ledger from files of `rows_to_bytes`, one in memory at a time."""
    with folder.writing(LEDGER_NAME) as temp, pq.ParquetWriter(temp, SCHEMA, compression="zstd") as writer:
        for part in parts:
            writer.write_table(pq.read_table(io.BytesIO(part)))


def _text(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()
