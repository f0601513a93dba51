#!/usr/bin/env bash
# Pillow 12.3.0 and OpenCV 5.0.0: labels in a grey PNG of 2 or 4 bits come back as other numbers.
#
# One would guess: a mask whose pixels are 0, 1, 2, 3 is read as 0, 1, 2, 3, however few bits each of them takes: that is
#   how it is with 8 bits, with 1 bit in Pillow, and with a palette.
# What happens: grey of 2 bits is spread over 0 to 255 (0, 85, 170, 255), of 4 bits in steps of 17, by Pillow and by
#   OpenCV's IMREAD_UNCHANGED alike. Of 1 bit Pillow gives False and True, OpenCV 0 and 255.
# Whom it hurts: whoever reads masks that a tool has written as small as it could. Class 1 is class 17 or 85 then, which a
#   set of 150 classes has as well.
# Instead: write masks with 8 bits, or with a palette; refuse the others when they are read.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
  pillow==12.3.0 pypng==0.20220715.0 numpy==2.4.6 opencv-python-headless==5.0.0.93

venv/bin/python -I - <<'PYTHON'
import io
import sys

import cv2
import numpy as np
import PIL
import png
from PIL import Image

print(f"Pillow {PIL.__version__}, OpenCV {cv2.__version__}")
labels, found = [0, 1, 2, 3], {}
for kind in ("grey", "palette"):
    for bits in (2, 4, 8):
        file = io.BytesIO()
        if kind == "grey":
            writer = png.Writer(4, 1, greyscale=True, bitdepth=bits)
        else:
            writer = png.Writer(4, 1, palette=[(i, i, i) for i in range(2**bits)], bitdepth=bits)
        writer.write(file, [labels])
        pillow = np.array(Image.open(io.BytesIO(file.getvalue())))[0].tolist()
        found[kind, bits] = pillow
        seen = f"labels {labels} in {kind} of {bits} bits: Pillow {pillow}"
        if kind == "grey":
            opencv = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED)[0].tolist()
            found["OpenCV", bits] = opencv
            seen += f", OpenCV {opencv}"
        print(seen)
spread = {2: [0, 85, 170, 255], 4: [0, 17, 34, 51], 8: labels}
expected = {(kind, bits): spread[bits] for kind in ("grey", "OpenCV") for bits in spread}
expected |= {("palette", bits): labels for bits in spread}
if found != expected:
    sys.exit(f"it has changed: {found}")
PYTHON
