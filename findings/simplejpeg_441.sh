#!/usr/bin/env bash
# simplejpeg 1.9.0: the header of a 4:4:1 JPEG is a bare KeyError, though the same library decodes the file.
#
# One would guess: decode_jpeg_header knows every subsampling that decode_jpeg takes, or raises ValueError as it says.
# What happens: libjpeg-turbo has a name for 4:4:1 since 3.0, simplejpeg's list has none: KeyError: 6. decode_jpeg gives
#   the pixels.
# Whom it hurts: who looks at headers before decoding, and catches ValueError: one file ends the job. A 4:1:1 file (of DV
#   cameras) becomes 4:4:1 when it is turned by 90 degrees without loss.
# Instead: catch KeyError too, and decode.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check simplejpeg==1.9.0 numpy==2.4.6

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import simplejpeg

print("simplejpeg", version("simplejpeg"))
pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
files = {"4:1:1": bytearray(simplejpeg.encode_jpeg(pixels, 90, "RGB", "411"))}
files["4:4:1"] = bytearray(files["4:1:1"])
luma = files["4:4:1"].index(b"\xff\xc0") + 11  # sampling factors in the frame header
assert files["4:4:1"][luma] == 0x41
files["4:4:1"][luma] = 0x14  # the same blocks, one below the other


def header(data):
    try:
        return simplejpeg.decode_jpeg_header(data)[3]
    except Exception as error:
        return f"{type(error).__name__}({error})"


seen = {}
for name, data in files.items():
    seen[name] = header(bytes(data)), simplejpeg.decode_jpeg(bytes(data)).shape
    print(name, "header:", seen[name][0], "pixels:", seen[name][1])
assert seen["4:1:1"][0] == "411"
if seen["4:4:1"] != ("KeyError(6)", (64, 64, 3)):
    sys.exit("no longer so: the header was KeyError(6), and the pixels came")
PYTHON
