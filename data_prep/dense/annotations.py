"""The annotations of one COCO image -> those of its sample, and ledger rows of what is not taken as it is.

Training leaves out what is no target: boxes without extent, outside of the image, or of no area (as the reference
training readers do). Evaluation keeps them, since the reference evaluators count them, as objects that nobody finds.
"""

from typing import Any

from data_prep.dense.ledger import row
from data_prep.dense.rle import BadSegmentation, encode_segmentation, finite_numbers, mask_area
from data_prep.dense.source import Item

NO_TARGET = ("empty_box", "outside_image", "no_area")


def convert_annotations(
    item: Item, width: int, height: int, label_of: dict[int, int], split: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(annotations as `dense_set` describes them, ledger rows) of an image of `width` x `height` pixels."""
    kept, rows = [], []
    for annotation in item.annotations:
        made, reasons, changed = _convert(annotation, width, height, label_of)
        if made is not None and split == "train" and any(reason in NO_TARGET for reason in reasons):
            made = None
        if made is not None:
            kept.append(made)
        if reasons:
            action = "dropped" if made is None else "repaired" if changed else "kept"
            detail = "; ".join(text for text in reasons.values() if text)
            about = {"image_id": item.image_id, "annotation_id": annotation["id"]}
            rows.append(row(split, item.file_name, action, "+".join(reasons), detail, **about))
    return kept, rows


def _convert(
    annotation: dict[str, Any], width: int, height: int, label_of: dict[int, int]
) -> tuple[dict[str, Any] | None, dict[str, str], bool]:
    """(annotation, reasons with details, whether something was made up for); None where it has no box."""
    reasons: dict[str, str] = {}
    box = finite_numbers(annotation.get("bbox"), 4)
    if box is None:
        return None, {"bad_box": str(annotation.get("bbox"))[:80]}, False
    x, y, w, h = box
    crowd, changed = annotation.get("iscrowd"), False
    if crowd not in (0, 1):
        crowd, changed = 0, True
        reasons["iscrowd_missing"] = ""
    elif crowd:
        reasons["crowd"] = ""
    encoded, said, left_out = _segmentation(annotation.get("segmentation"), width, height)
    if said:
        reasons[said[0]] = said[1]
        changed |= said[0] == "bad_segmentation"
    if left_out:
        reasons["bad_polygon"], changed = f"{left_out} left out", True
    pixels = None if encoded is None else mask_area(encoded)
    area = finite_numbers([annotation.get("area")], 1)
    if area is None:
        area, changed = [float(w * h if pixels is None else pixels)], True
        reasons["area_missing"] = ""
    if w <= 0 or h <= 0:
        reasons["empty_box"] = f"{w:g} x {h:g}"
    elif min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        reasons["outside_image"] = f"{x:g}, {y:g}, {w:g} x {h:g} in {width} x {height}"
    if area[0] <= 0 or pixels == 0:
        reasons["no_area"] = f"area {area[0]:g}, mask {pixels}"
    made = {
        "id": annotation["id"],
        "label": label_of[annotation["category_id"]],
        "bbox": box,
        "area": area[0],
        "iscrowd": int(crowd),
        "segmentation": encoded,
    }
    return made, reasons, changed


def _segmentation(told: Any, width: int, height: int) -> tuple[dict[str, Any] | None, tuple[str, str] | None, int]:
    """(encoded mask, why there is none, polygons left out)."""
    if not told:
        return None, ("no_segmentation", ""), 0
    try:
        encoded, left_out = encode_segmentation(told, width, height)
    except BadSegmentation as error:
        return None, ("bad_segmentation", str(error)), 0
    return encoded, None, left_out
