#!/usr/bin/env bash
# DeepSpeed 0.19.8: ZeRO-1 and ZeRO-2 all-reduce whole gradients, although reduce_scatter is on.
#
# One would guess: with `reduce_scatter` (on by default) a rank receives the sum of its own part alone: ZeRO-1 and 2
#   send what plain data parallelism sends: N elements scattered, N gathered, in the place of an all-reduce, which is the
#   two after each other.
# What happens: `use_multi_rank_bucket_allreduce`, on by default too, has every bucket all-reduced, and each rank then
#   throws away the others' parts. With the gathering of weights after the step that is one and a half times what stage
#   0 sends. And at stage 2 it is done for every micro-batch: with 2 accumulated, twice.
# Whom it hurts: whoever takes ZeRO-2 with accumulation between nodes for no dearer than ZeRO-1.
# Instead: ZeRO-1 with accumulation; measure `use_multi_rank_bucket_allreduce: false` (a reduce for each rank's part).
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
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
import torch.distributed as dist

SIZE = 512
sent = {}


def count(name):
    real = getattr(dist, name)

    def counted(tensor, *arguments, **options):
        source = arguments[0] if name == "reduce_scatter_tensor" else tensor
        sent[name] = sent.get(name, 0) + source.numel()
        return real(tensor, *arguments, **options)

    setattr(dist, name, counted)


for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
    count(name)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is compiled
deepspeed.init_distributed("gloo")
if dist.get_rank() == 0:
    print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
seen = {}
for stage, more in ((0, {}), (1, {}), (2, {}), (2, {"use_multi_rank_bucket_allreduce": False})):
    model = torch.nn.Linear(SIZE, SIZE, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage, "reduce_scatter": True, **more},
    }
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
    sent.clear()
    for _ in range(2):
        engine.backward(engine(torch.ones(1, SIZE)).sum())
        engine.step()
    shares = {name: round(number / SIZE**2, 2) for name, number in sent.items()}
    seen[stage, bool(more)] = shares.get("all_reduce", 0.0)
    if dist.get_rank() == 0:
        print(f"stage {stage} {more or ''}, 2 micro-batches: of all gradients", shares, flush=True)
expected = {(0, False): 1.0, (1, False): 1.0, (2, False): 2.0, (2, True): 0.0}
if any(abs(seen[key] - expected[key]) > 0.1 for key in expected):
    sys.exit(f"no longer so: whole gradients were all-reduced, at stage 2 for each micro-batch; now {seen}")
PYTHON
venv/bin/python -I -m torch.distributed.run --standalone --nproc_per_node 2 try.py 2>log | grep -v '\[INFO\]' || {
  grep -m1 'no longer so' log >&2 || tail -n 3 log >&2
  exit 1
}
