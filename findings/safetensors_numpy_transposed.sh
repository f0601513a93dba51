#!/usr/bin/env bash
# safetensors 0.8.0: the numpy writer stores a transposed array under its shape, with its numbers in another order.
#
# One would guess: what is saved is what is loaded, for any array. Or else the writer refuses an array that is not
#   contiguous, as safetensors.torch does with a ValueError.
# What happens: the writer takes the shape of the view and the memory of the array below it. The file is valid, the shape
#   is right, the numbers stand in the wrong places, and nothing is said. Version 0.7.0 wrote the right numbers. (The
#   documentation asks for contiguous arrays; nothing checks.)
# Whom it hurts: whoever converts weights between layouts (a linear layer's `w.T`, a convolution's `transpose`) and saves
#   the result: square matrices even pass each check of shapes. An upgrade breaks a converter that worked.
# Instead: numpy.ascontiguousarray for every array before it is written.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > try.py <<'PYTHON'
import numpy as np
import safetensors
from safetensors.numpy import load, save

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
view = weight.T
back = load(save({"weight": view}))["weight"]
packed = load(save({"weight": np.ascontiguousarray(view)}))["weight"]
assert back.shape == packed.shape == view.shape
same = {True: "the same", False: "OTHER numbers"}
print(
    f"safetensors {safetensors.__version__}: saved {view.tolist()}, loaded {back.tolist()}:",
    same[np.array_equal(back, view)] + "; packed first:",
    same[np.array_equal(packed, view)],
)
PYTHON

python3 -m venv venv
for version in 0.7.0 0.8.0; do
  venv/bin/pip install --quiet --disable-pip-version-check safetensors==$version numpy==2.4.6
  venv/bin/python -I try.py | tee "$version"
done
if ! grep -q ': the same; packed first: the same' 0.7.0 || ! grep -q ': OTHER numbers; packed first: the same' 0.8.0; then
  echo "no longer so: with a transposed array 0.7.0 was right and 0.8.0 wrong" >&2
  exit 1
fi
