#!/usr/bin/env bash
# DeepSpeed 0.19.8: bf16 at ZeRO stage 0 takes a step of the optimizer before the first one.
#
# One would guess: ZeRO stages say who holds what. Stage 0 and stage 1 make the same updates, those of plain AdamW, up to
#   the rounding of bf16.
# What happens: at stage 0 `deepspeed.initialize` makes the optimizer's state by calling its step with gradients of zero.
#   AdamW counts it: its bias correction is one step ahead, so the first update is 0.744 of what it should be, and the
#   next ones are too small as well, less and less. The hidden step also applies one weight decay to the fp32 weights.
#   Stage 1 is right, and so is stage 0 without bf16.
# Whom it hurts: whoever takes stage 0 for the plain baseline that the other stages are compared with.
# Instead: with bf16, stage 1 or more, also on one rank; or fp32 weights and autocast.
# (torch takes 0.9 GB where pip finds the CPU build, and several where it takes the CUDA build.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
venv/bin/pip install --quiet --disable-pip-version-check deepspeed==0.19.8

cat > try.py <<'PYTHON'
import os
import socket
import sys

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
os.environ["DS_ACCELERATOR"] = "cpu"  # one rank, no GPU

import deepspeed
import torch

print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is compiled
deepspeed.init_distributed("gloo")
RATE = 1e-3


def start(stage, bf16, weight, rate, decay):
    """-> model, its optimizer, and the engine that is to train it; no step is taken."""
    model = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}}
    return model, optimizer, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def updates(stage, bf16):
    """-> the weight after 1, 2, 3 steps with a constant gradient, in learning rates: AdamW's are 1, 2, 3."""
    model, _, engine = start(stage, bf16, weight=0, rate=RATE, decay=0)
    ones = torch.ones(1, 8, dtype=model.weight.dtype)
    seen = []
    for _ in range(3):
        engine.backward(engine(ones).sum())
        engine.step()
        seen.append(-float(model.weight[0, 0]) / RATE)
    print(f"stage {stage}, {'bf16' if bf16 else 'fp32'}: weight after 1, 2, 3 steps:", *(f"{w:.3f}" for w in seen))
    return torch.tensor(seen)


_, optimizer, _ = start(stage=0, bf16=True, weight=1, rate=0.1, decay=1)
[state] = optimizer.state.values()
print("stage 0, bf16, before any step: steps counted", float(state["step"]), end="; ")
decayed = float(optimizer.param_groups[0]["params"][0].flatten()[0])
print(f"an fp32 weight of 1 is {decayed:.3f} (rate 0.1, weight decay 1)")
if (float(state["step"]), round(decayed, 3)) != (1.0, 0.9):
    sys.exit("no longer so: no step and no weight decay before the first step")

right = torch.tensor([1.0, 2.0, 3.0])
hidden = torch.tensor([0.744, 1.602, 2.518])
seen = [updates(0, False), updates(1, True), updates(0, True)]
for weights, expected in zip(seen, (right, right, hidden), strict=True):
    if not torch.allclose(weights, expected, rtol=0.01):
        sys.exit("no longer so: stage 0 with bf16 alone was too small, by 0.744 at the first step")
PYTHON
venv/bin/python -I try.py 2>log | grep -v '\[INFO\]' || {
  grep '^no longer so' log >&2 || tail -n 1 log >&2
  exit 1
}
