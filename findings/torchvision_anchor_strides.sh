#!/usr/bin/env bash
# torchvision 0.29.2: the anchors of a feature pyramid's coarsest level drift away from its cells, by image size.
#
# One would guess: strides of 4, 8, 16, 32 and 64 px; the anchors of a level stand at multiples of its stride, where the
#   cells of its map look.
# What happens: AnchorGenerator takes for a stride the image's side divided by the map's, rounded down. Images are padded to
#   multiples of 32, and the fifth level has every second cell of the fourth: 800 px, the short side of most recipes for
#   COCO, are 25 cells there and 13 here, so the stride is 61. The last row's anchors stand at 732 instead of 768 px. A
#   side that is a multiple of 64 has none of this, so one cell means another place from image to image.
# Whom it hurts: who trains Faster, Mask R-CNN or RetinaNet with `size_divisible=32`, its default: objects that the
#   coarsest level is for, more so near the right and the lower edge; and who compares with other libraries' weights.
# Instead: size_divisible=64 (128 with seven levels), or an anchor generator that knows its strides.
# (torch takes 0.9 GB where pip finds the CPU build, and several where it takes the CUDA build.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torchvision==0.29.2 numpy==2.4.6

venv/bin/python -I - <<'PYTHON'
import sys

import torch
import torchvision
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

print("torchvision", torchvision.__version__)
model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
seen = {}
for height, width in ((800, 1216), (832, 1216)):
    images = torch.zeros(1, 3, height, width)
    with torch.no_grad():
        maps = list(model.backbone(images).values())
    anchors = model.rpn.anchor_generator(ImageList(images, [(height, width)]), maps)[0]
    parts = anchors.split([3 * each.shape[2] * each.shape[3] for each in maps])
    rows = [((part[:, 1] + part[:, 3]) / 2).unique() for part in parts]
    seen[height] = [(len(each), float(each[1] - each[0]), float(each[-1])) for each in rows]
    for level, (count, stride, last) in enumerate(seen[height]):
        print(f"{height} px, level {level}: {count} rows, anchors every {stride:g} px, the last at {last:g}")

if seen[800][-1] != (13, 61.0, 732.0) or seen[832][-1] != (13, 64.0, 768.0):
    sys.exit("no longer so: the coarsest level's anchors are not 61 px apart at 800 px, or not 64 at 832")
PYTHON
