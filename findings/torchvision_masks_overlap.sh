#!/usr/bin/env bash
# torchvision 0.29.2: draw_segmentation_masks paints black where masks overlap.
#
# One would guess: the later mask covers the earlier one there, or both colours are mixed; with alpha 0.6 the image shines
#   through in any case.
# What happens: no colour at all: zeros, mixed with the image by alpha. With alpha 1 these pixels are black. A single
#   pixel of overlap does it, and instance masks of real detectors overlap along every border.
# Whom it hurts: who draws the results of Mask R-CNN and its kin: the black seams look like faults of the masks, and with
#   several detections of one object the object itself is black.
# Instead: draw the masks one at a time, the best one last.
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
from torchvision.utils import draw_segmentation_masks

print("torchvision", torchvision.__version__)
image = torch.full((3, 1, 3), 100, dtype=torch.uint8)
masks = torch.tensor([[[True, True, False]], [[False, True, True]]])
red, green = (255, 0, 0), (0, 255, 0)
seen = {}
for alpha in (1.0, 0.6):
    together = draw_segmentation_masks(image, masks, alpha=alpha, colors=[red, green])
    one_by_one = image
    for mask, colour in zip(masks, (red, green), strict=True):
        one_by_one = draw_segmentation_masks(one_by_one, mask, alpha=alpha, colors=colour)
    seen[alpha] = [tuple(each[:, 0, 1].tolist()) for each in (together, one_by_one)]
    print(f"alpha {alpha}: under both masks {seen[alpha][0]} drawn together, {seen[alpha][1]} one by one")

if seen[1.0] != [(0, 0, 0), green] or seen[0.6][0] != (40, 40, 40):
    sys.exit("no longer so: pixels under two masks are not black")
PYTHON
