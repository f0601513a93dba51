#!/usr/bin/env bash
# torch 2.13.0 and 2.15.0 on a CPU: with OMP_THREAD_LIMIT below torch's number of threads, gradients are wrong.
#
# One would guess: OMP_THREAD_LIMIT, which schedulers and containers set to keep jobs to their cores, makes training slower
#   at most.
# What happens: torch asks OpenMP for as many threads as it counts cores, gets fewer, and the weight gradient of a
#   convolution lacks the parts of the threads that never ran: 70 % off with one thread of two. Outputs and the gradients
#   of the inputs are right. Nothing is said.
# Whom it hurts: whoever trains or tests on CPUs of a shared machine, or compares a GPU with "the CPU, which is right".
# Instead: torch.set_num_threads(n) with n at most OMP_THREAD_LIMIT (OMP_NUM_THREADS=n does the same).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > try.py <<'PYTHON'
import sys

import torch

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
images, weight = torch.randn(16, 96, 32, 32), torch.randn(192, 96, 3, 3)


def gradient(dtype):
    w = weight.to(dtype).requires_grad_()
    torch.nn.functional.conv2d(images.to(dtype), w, padding=1).sum().backward()
    return w.grad.double()


truth = gradient(torch.float64)
error = float((gradient(torch.float32) - truth).norm() / truth.norm())
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads: weight gradient {error:.1e} off:", end=" ")
print("right" if error < 1e-4 else "WRONG")
PYTHON

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
echo "no limit, two threads:";                  venv/bin/python -I try.py 2 | tee free
echo "OMP_THREAD_LIMIT=1, torch told of one:";  OMP_THREAD_LIMIT=1 venv/bin/python -I try.py 1 | tee told
echo "OMP_THREAD_LIMIT=1, torch takes two:";    OMP_THREAD_LIMIT=1 venv/bin/python -I try.py 2 | tee limited
if ! grep -q right free || ! grep -q right told || ! grep -q WRONG limited; then
  echo "no longer so: only two threads under OMP_THREAD_LIMIT=1 gave a wrong gradient" >&2
  exit 1
fi
