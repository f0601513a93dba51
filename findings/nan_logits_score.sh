#!/usr/bin/env bash
# torchmetrics 1.9.0, timm 1.0.31 (torch 2.15.0): logits that are NaN score hits.
#
# One would guess: an image whose logits are all NaN counts as wrong, in top-1 and in top-5, or it is an error, as it is in
#   scikit-learn.
# What happens: both take some class for the prediction (torchmetrics the first one, timm what topk of NaN gives), so on ten
#   classes top-1 is 10 % and top-5 50 %; on images of class 0 alone torchmetrics says 100 %.
# Whom it hurts: who watches accuracy to see whether a run has gone wrong: a net of NaN looks like one at chance, and over a
#   set sorted by class, or few classes, far better than that.
# Instead: rank the label's logit by comparisons that NaN fails, or look for NaN before any metric.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torchmetrics==1.9.0 timm==1.0.31 torch==2.15.0 torchvision==0.29.2 numpy==2.4.6

cat >try.py <<'PYTHON'
import sys

import timm
import torch
import torchmetrics
from timm.utils import accuracy
from torchmetrics.functional.classification import multiclass_accuracy

print(f"torchmetrics {torchmetrics.__version__}, timm {timm.__version__}, torch {torch.__version__}")
labels = torch.arange(10)
nothing = torch.full((10, 10), torch.nan)
right = torch.eye(10)
found = {}
for name, logits in (("right", right), ("NaN", nothing)):
    metrics = [round(100 * multiclass_accuracy(logits, labels, 10, average="micro", top_k=k).item()) for k in (1, 5)]
    of_timm = [round(value.item()) for value in accuracy(logits, labels, topk=(1, 5))]
    found[name] = metrics, of_timm
    print(f"{name} logits: torchmetrics top-1 {metrics[0]} %, top-5 {metrics[1]} %; timm {of_timm[0]} %, {of_timm[1]} %")
first = 100 * multiclass_accuracy(torch.full((10, 1000), torch.nan), labels * 0, 1000, average="micro").item()
print(f"NaN logits of 1,000 classes, all images of class 0: torchmetrics top-1 {first:.0f} %")
sys.exit(found["NaN"] != ([10, 50], [10, 50]) or round(first) != 100)
PYTHON
venv/bin/python try.py || { echo "no longer so: NaN logits score otherwise" >&2; exit 1; }
