"""Polygons and run lengths of COCO -> its compressed run-length encoding, by faster-coco-eval's mask functions.

What is no mask of the image is sorted out before. Where the first polygon has four numbers, faster-coco-eval 1.8.0
takes all of them for boxes, without a word, and pycocotools 2.0.11 stops with a TypeError
(findings/coco_polygon_of_two_points.sh).
"""

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask

LEAST_NUMBERS = 6  # of a polygon: three points
FAR = 16  # a point may lie so many image sizes outside: the rasterizer walks along every edge
MAX_RUNS = 1 << 24
MOST = 1e15


class BadSegmentation(ValueError):
    """It cannot be a mask of this image."""


def encode_segmentation(segmentation: Any, width: int, height: int) -> tuple[dict[str, Any], int]:
    """({"size": [height, width], "counts": text}, polygons left out) of a list of polygons, or a run-length encoding,
    compressed or not, of an image of `width` x `height` pixels. Raises BadSegmentation.
    """
    if isinstance(segmentation, dict):
        return _of_runs(segmentation, width, height), 0
    if not isinstance(segmentation, list):
        raise BadSegmentation(f"neither polygons nor run lengths but {type(segmentation).__name__}")
    polygons = [polygon for polygon in segmentation if is_polygon(polygon, width, height)]
    if not polygons:
        raise BadSegmentation("no polygon of three points or more")
    merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return _told(merged), len(segmentation) - len(polygons)


def is_polygon(polygon: Any, width: int, height: int) -> bool:
    """Whether it is a flat list of x, y of three points or more, all finite and not absurdly far outside."""
    if not isinstance(polygon, list) or len(polygon) < LEAST_NUMBERS or len(polygon) % 2:
        return False
    bound = FAR * max(width, height)
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= bound for value in polygon
    )


def _of_runs(segmentation: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    if segmentation.get("size") != [height, width]:
        raise BadSegmentation(f"its size is {segmentation.get('size')}, the image's [{height}, {width}]")
    counts = segmentation.get("counts")
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise BadSegmentation("counts are no run lengths")
    if sum(runs) != width * height:
        raise BadSegmentation(f"its runs have {sum(runs)} pixels, the image {width * height}")
    return _told(coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width))


def _told(encoded: dict[str, Any]) -> dict[str, Any]:
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def run_lengths(counts: str) -> list[int]:
    """The run lengths in COCO's compressed text: six bits a character, from the fourth run on the difference to the run
    before the last. Raises BadSegmentation.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60 or len(runs) > MAX_RUNS:
            raise BadSegmentation("counts are no compressed run lengths")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        run = value + runs[-2] if len(runs) > 2 else value
        if run < 0:
            raise BadSegmentation(f"counts have a run of {run} pixels")
        runs.append(run)
        value = shift = 0
    if shift:
        raise BadSegmentation("counts end in the middle of a number")
    return runs


def mask_area(encoded: dict[str, Any]) -> int:
    """Pixels of a mask that `encode_segmentation` gave."""
    return int(np.sum(coco_mask.area([encoded])))


def finite_numbers(values: Any, count: int) -> list[float] | None:
    """`count` finite numbers as floats, or None where it is something else."""
    if not isinstance(values, list | tuple) or len(values) != count:
        return None
    for value in values:  # the bound is far beyond any picture, and no whole number below it fails to be a float
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < MOST:
            return None
    return [float(value) for value in values]
