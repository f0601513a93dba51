#!/usr/bin/env bash
# torch 2.13.0 (and 2.15.0), CPU: LayerNorm on bf16 input sums the gradients of its fp32 parameters up in bf16.
#
# One would guess: the parameters are fp32, their gradients come back as fp32, so the sum over the rows is made in fp32;
#   at worst the inputs' own rounding shows, some 0.4 %.
# What happens: the running sum is a bf16 number. bf16 has 8 bits: from 256 on, adding 1 changes nothing. With a
#   gradient of 1 in each row the bias gradient stops at 256 (on one thread), for 8192 rows as well. With gradients
#   around zero it is some 7 % off, which no assertion on dtype or shape notices.
# Whom it hurts: bf16 autocast on a CPU, where this is what a LayerNorm after a linear layer does; and whoever tests a bf16
#   model against fp32 there, and takes this error for the model's own.
# Instead: feed such a LayerNorm with fp32, `norm(x.float()).to(x.dtype)`; autocast leaves it at that.
# (torch takes 0.9 GB where pip finds the CPU build, and several where it takes the CUDA build.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

venv/bin/python -I - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
width = 64


def gradients(x, upstream):
    """-> the gradients of weight and bias, fp32."""
    norm = torch.nn.LayerNorm(width)
    norm(x).backward(upstream)
    assert norm.bias.grad.dtype == norm.weight.grad.dtype == torch.float32
    return norm.weight.grad, norm.bias.grad


stops = {}
for rows in (128, 256, 512, 8192):
    x = torch.randn(rows, width).bfloat16()
    ones = torch.ones_like(x)
    stops[rows] = gradients(x, ones)[1].unique().tolist()
    exact = gradients(x.float(), ones.float())[1].unique().tolist()
    print(f"gradient 1 in each of {rows} rows: bias gradient {stops[rows]} from bf16, {exact} from fp32")

x = torch.randn(4096, width).bfloat16()
upstream = torch.randn(4096, width).bfloat16()
errors = []
for name, ours, exact in zip(
    ("weight", "bias"), gradients(x, upstream), gradients(x.float(), upstream.float()), strict=True
):
    errors.append(float((ours - exact).norm() / exact.norm()))
    print(f"random gradients, 4096 rows: {name} gradient {errors[-1]:.1%} off")

layer, norm = torch.nn.Linear(width, width), torch.nn.LayerNorm(width)
with torch.autocast("cpu", torch.bfloat16):
    loss = norm(layer(torch.randn(4096, width))).float().sum()
loss.backward()
autocast = norm.bias.grad.unique().tolist()
print("under autocast, after a linear layer, 4096 rows:", autocast)

if stops != {128: [128.0], 256: [256.0], 512: [256.0], 8192: [256.0]} or min(errors) < 0.02 or autocast != [256.0]:
    sys.exit("no longer so: the bias gradient does not stop at 256, or random gradients are less than 2 % off")
PYTHON
