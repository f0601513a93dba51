"""The engine on one rank: a step whose gradient is not finite leaves no trace, and is counted over a resume."""

import os
import subprocess
import sys
from pathlib import Path

# A process of its own: a process group and its environment variables would stay behind in this one.
PROGRAM = """
import torch
from pipeline import engine
from pipeline.config import load
from pipeline.recipe import build_model, optimizer, parameter_groups

overrides = ["train.global_batch=2", "train.micro_batch=2", "data.resolution=32"]
config = load("configs/demo_pretrain.yaml", overrides)
ranks, device = engine.start_ranks()

def fresh():
    torch.manual_seed(0)
    model = build_model(config.model, 4, 32)
    return engine.Engine(config, model, optimizer(parameter_groups(model, config.optimizer), config), ranks, device)

def everything(subject):
    return {(s, n): t for s in ("model", *subject.state_names) for n, t in subject.full_state(s).items()}

def step(subject, factor=1.0):
    torch.manual_seed(1)
    batch = [(torch.randn(2, 3, 32, 32), torch.zeros(2))]
    return subject.train_step(batch, lambda logits, _: (logits.square().sum() * factor))

subject = fresh()
step(subject)
before = everything(subject)
result = step(subject, float("inf"))
assert float(result.grad_norm) == float("inf"), result
assert subject.skipped_steps == 1
after = everything(subject)
assert all(torch.equal(before[key], after[key]) for key in before)

resumed = fresh()
states = {s: subject.full_state(s) for s in subject.state_names}
resumed.load_state(states, steps_done=2, skipped=1)
assert resumed.skipped_steps == 1
assert all(torch.equal(t, before[s, n]) for s in states for n, t in resumed.full_state(s).items())
for one in (subject, resumed):
    assert {float(state["step"]) for state in one._inner.state.values()} == {1.0}
step(subject)
assert subject.skipped_steps == 1
assert any(not torch.equal(before[key], value) for key, value in everything(subject).items())
print("agreed")
"""


def test_a_step_that_is_not_finite() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        env={**environment, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("agreed\n")
