#!/usr/bin/env bash
# faster-coco-eval 1.8.0 (and pycocotools 2.0.11): a first polygon of two points makes boxes of all the others.
#
# One would guess: a polygon of two points, which is none, is an empty mask or an error, and the polygons after it are what
#   they are.
# What happens: frPyObjects looks at the first of them only. Four numbers are x, y, width, height of a box, so all that
#   follow are taken for boxes too, by their first four numbers: a triangle of 45 pixels becomes a box of 600. pycocotools
#   stops with a TypeError that speaks of ndarrays. With the polygon of two points in second place both see no pixels in
#   it, and the triangle.
# Whom it hurts: whoever turns annotations made by hand into masks: the masks are too large, and nothing says so.
# Instead: leave out polygons of fewer than six numbers before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check faster-coco-eval==1.8.0 pycocotools==2.0.11 numpy==2.4.6

venv/bin/python -I - <<'PYTHON'
import sys

from faster_coco_eval.core import mask as faster
from pycocotools import mask as reference

two_points, triangle = [1, 1, 9, 9], [20, 20, 30, 20, 30, 30]
height, width = 40, 60


def areas(library, polygons):
    try:
        return [int(area) for area in library.area(library.frPyObjects(polygons, height, width))]
    except TypeError as error:
        return f"TypeError: {error}"


seen = {}
for name, library in (("faster-coco-eval", faster), ("pycocotools", reference)):
    for order, polygons in (("two points last", [triangle, two_points]), ("two points first", [two_points, triangle])):
        seen[name, order] = areas(library, polygons)
        print(f"{name}, {order}: {seen[name, order]}")

so = (
    seen["faster-coco-eval", "two points last"] == seen["pycocotools", "two points last"] == [45, 0]
    and seen["faster-coco-eval", "two points first"] == [81, 600]
    and str(seen["pycocotools", "two points first"]).startswith("TypeError")
)
if not so:
    sys.exit("no longer so: a polygon of two points in first place changes nothing of the others")
PYTHON
