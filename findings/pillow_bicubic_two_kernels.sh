#!/usr/bin/env bash
# Pillow 12.3.0: "bicubic" is one kernel in Image.resize and another one in Image.transform.
#
# One would guess: BICUBIC names one filter. Enlarging a picture twofold by resize, or by transform with the affine
#   matrix that says the same, gives the same pixels up to rounding, as BILINEAR does.
# What happens: resize takes the cubic kernel with a = -0.5, transform (AFFINE, and so rotate) the one with a = -1, which
#   sharpens and overshoots twice as much. Half way between two pixels the weights are -1/16, 9/16 against -1/8, 5/8.
# Whom it hurts: whoever writes augmentation anew (on a GPU, in another library) with one kernel for everything, and then
#   compares it with what published recipes did through Pillow; whoever replaces a resize by an affine transform.
# Instead: choose the kernel by the call that is to be matched, not by the name of the filter.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==12.3.0 numpy==2.4.6

venv/bin/python -I - <<'PYTHON'
import sys

import numpy as np
import PIL
from PIL import Image

print("pillow", PIL.__version__)


def twofold(image, resample):
    """-> the same enlargement by resize and by transform."""
    width, height = image.width * 2, image.height * 2
    affine = (0.5, 0, 0, 0, 0.5, 0)  # output pixel -> input pixel
    resized = image.resize((width, height), resample)
    transformed = image.transform((width, height), Image.Transform.AFFINE, affine, resample)
    return (np.asarray(each, dtype=float) for each in (resized, transformed))


inner = (slice(8, -8), slice(8, -8))  # at the border the two differ by design
noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
largest = {}
for name in ("BILINEAR", "BICUBIC"):
    resized, transformed = twofold(noise, Image.Resampling[name])
    largest[name] = np.abs(resized - transformed)[inner].max()
    print(f"{name.lower()}: largest difference of resize and transform {largest[name]:.0f} of 255")

# One bright pixel in a row, sampled half way between pixels, shows the weights themselves.
row = np.zeros((1, 33), dtype=np.float32)
row[0, 16] = 1
row = Image.fromarray(row)
resized = np.asarray(row.resize((32, 1), Image.Resampling.BICUBIC, box=(0.5, 0, 32.5, 1)))[0]
half = (1, 0, 0.5, 0, 1, 0)
transformed = np.asarray(row.transform((32, 1), Image.Transform.AFFINE, half, Image.Resampling.BICUBIC))[0]
print("weights half way, resize:   ", resized[14:18])
print("weights half way, transform:", transformed[14:18])

seen = (
    largest["BILINEAR"] <= 1
    and largest["BICUBIC"] > 10
    and np.allclose(resized[14:18], [-1 / 16, 9 / 16, 9 / 16, -1 / 16], atol=1e-3)
    and np.allclose(transformed[14:18], [-1 / 8, 5 / 8, 5 / 8, -1 / 8], atol=1e-3)
)
if not seen:
    sys.exit("no longer so: resize and transform do not use the kernels a = -0.5 and a = -1")
PYTHON
