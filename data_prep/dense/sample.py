"""One image of a source -> its sample: the image's bytes, its mask or annotations, its ledger rows."""

import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data_prep.dense.annotations import convert_annotations
from data_prep.dense.ledger import row
from data_prep.dense.source import Item
from data_prep.dense.tree import Reader, UnreadableFile
from data_prep.dense_set import IGNORED
from data_prep.images.jpeg import jpeg_header, metadata
from data_prep.images.pil import decode_png_labels
from data_prep.images.prepare import ImagePolicy, Prepared, prepare_image
from data_prep.images.rejection import ImageRejected

PNG_LEVEL = 6  # of zlib: 9 takes three times as long, for 2 % of the bytes of masks


@dataclass
class Made:
    """What became of an image. `jpeg` is None where it is not in the set. `objects` and `pixels` (classes,) int64:
    annotations and pixels by label.
    """

    rows: list[dict[str, Any]]
    jpeg: bytes | None = None
    mask: bytes | None = None
    described: bytes = b""
    width: int = 0
    height: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def make_sample(
    item: Item, images: Reader, masks: Reader | None, policy: ImagePolicy, label_of: dict[int, int], split: str
) -> Made:
    """Read, check and convert one image; whatever is wrong with it ends in a row, never in an exception."""
    about: dict[str, Any] = {"image_id": item.image_id}

    def rejected(reason: str, detail: str = "") -> Made:
        return Made([row(split, item.file_name, "rejected", reason, detail, **about)])

    if item.image is None:
        return rejected("missing_image")
    if masks is not None and item.mask is None:
        return rejected("missing_mask")
    try:
        data = images.read(item.image)
    except UnreadableFile as error:
        return rejected("undecodable", str(error))
    about |= {"bytes_in": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        image = prepare_image(data, policy)
    except ImageRejected as error:
        return rejected(error.reason, error.detail)
    size = (image.width, image.height)
    if (item.width or size[0], item.height or size[1]) != size:
        return rejected("size_differs", _differs(data, size, (item.width or size[0], item.height or size[1])))
    about |= {"width": size[0], "height": size[1], "bytes_out": len(image.jpeg), "key": item.key}
    if masks is None:
        return _instances(item, image, label_of, split, about)
    return _semantic(item, image, data, masks, len(label_of), split, about)


def _instances(item: Item, image: Prepared, label_of: dict[int, int], split: str, about: dict[str, Any]) -> Made:
    annotations, rows = convert_annotations(item, image.width, image.height, label_of, split)
    told = _about(item, image) | {"annotations": annotations}
    reasons = [*image.repairs, *([] if annotations else ["no_annotation"])]
    action = "repaired" if image.repairs else "kept"
    labels = np.array([annotation["label"] for annotation in annotations], np.int64)
    return Made(
        [row(split, item.file_name, action, "+".join(reasons), **about), *rows],
        image.jpeg,
        None,
        _json(told),
        image.width,
        image.height,
        np.bincount(labels, minlength=len(label_of)),
    )


def _semantic(
    item: Item, image: Prepared, data: bytes, masks: Reader, classes: int, split: str, about: dict[str, Any]
) -> Made:
    def rejected(reason: str, detail: str) -> Made:
        kept = {name: about[name] for name in ("image_id", "bytes_in", "sha256")}
        return Made([row(split, item.file_name, "rejected", reason, detail, **kept)])

    assert item.mask is not None
    try:
        values = decode_png_labels(masks.read(item.mask))
    except UnreadableFile as error:
        return rejected("mask_damaged", str(error))
    except ImageRejected as error:
        return rejected("mask_not_8_bit" if error.reason == "not_8_bit" else "mask_damaged", error.detail)
    if values.shape != (image.height, image.width):
        size = (values.shape[1], values.shape[0])
        return rejected("size_differs", _differs(data, (image.width, image.height), size))
    # 0 is unlabelled, 1 the first class; what is above the last is as good as unlabelled.
    above = int(np.count_nonzero(values > classes))
    labels = np.where((values == 0) | (values > classes), IGNORED, values.astype(np.int16) - 1).astype(np.uint8)
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:classes]
    reasons, action = [*image.repairs], "repaired" if image.repairs or above else "kept"
    reasons += ["values_over_classes"] if above else []
    reasons += [] if counts.any() else ["no_annotation"]
    detail = f"{above} pixels above {classes}, up to {int(values.max())}" if above else ""
    return Made(
        [row(split, item.file_name, action, "+".join(reasons), detail, **about)],
        image.jpeg,
        mask_png(labels),
        _json(_about(item, image) | {"scene": item.scene}),
        image.width,
        image.height,
        counts.astype(np.int64),
    )


def mask_png(labels: np.ndarray) -> bytes:
    """Labels, uint8 (height, width), as an 8-bit grey PNG; the same labels always give the same bytes."""
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def _about(item: Item, image: Prepared) -> dict[str, Any]:
    return {"image_id": item.image_id, "file_name": item.file_name, "width": image.width, "height": image.height}


def _json(told: dict[str, Any]) -> bytes:
    return json.dumps(told, separators=(",", ":")).encode()


def _differs(data: bytes, image: tuple[int, int], told: tuple[int, int]) -> str:
    """Both sizes; and where only EXIF keeps them apart, that: pixels are taken as they are stored."""
    text = f"the image has {image[0]} x {image[1]} pixels, its annotations {told[0]} x {told[1]}"
    header = jpeg_header(data)
    orientation = 1 if header is None else metadata(data, header).orientation
    return f"{text}; its EXIF orientation is {orientation}" if orientation > 4 and image == told[::-1] else text
