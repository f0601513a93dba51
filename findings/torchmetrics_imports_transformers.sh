#!/usr/bin/env bash
# torchmetrics 1.9.0: whoever imports its confusion matrix imports transformers, scipy.signal and matplotlib too.
#
# One would guess: `from torchmetrics.functional.classification import multiclass_confusion_matrix` brings torch and that
#   corner of the library; what other metrics need is imported when they are used, or at most looked up.
# What happens: the package's __init__ imports the metrics of text, audio and images, and each of these what it would need
#   and finds installed: of texts transformers, of audio scipy.signal, for plots matplotlib. None of it is used.
# Whom it hurts: who starts many processes, as a rank a GPU does: the import takes longer than torch's own, on top of it, and
#   loads more than a thousand modules, from a network file system perhaps, on every rank at once.
# Instead: import it where it is first called, not where the rank starts.
# (torch takes 0.9 GB where pip finds the CPU build, and several where it takes the CUDA build.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 torchmetrics==1.9.0 transformers==5.24.0 \
  scipy==1.17.1 matplotlib==3.11.2 numpy==2.4.6

venv/bin/python -I - <<'PYTHON'
import subprocess
import sys

ASKED = ("transformers", "scipy.signal", "matplotlib")


def imported(statement):
    """(CPU seconds, number of modules, which of ASKED) of a fresh process."""
    code = f"import time, sys; {statement}; print(time.process_time(), len(sys.modules), *(m for m in {ASKED} if m in sys.modules))"
    tries = [subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    return min(float(each[0]) for each in tries), int(tries[0][1]), tuple(tries[0][2:])


torch = imported("import torch")
found = imported("from torchmetrics.functional.classification import multiclass_confusion_matrix")
print(f"torch alone: {torch[0]:.1f} s of CPU, {torch[1]} modules")
print(f"the confusion matrix: {found[0]:.1f} s ({found[0] / torch[0]:.1f} times), {found[1]} modules, with {', '.join(found[2])}")

if torch[2] or found[2] != ASKED:
    sys.exit(f"no longer so: it imports {found[2]}, torch {torch[2]}")
PYTHON
