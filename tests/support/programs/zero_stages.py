"""Two ranks, every ZeRO stage in turn: EMA, refused updates, setting the state back, policies of checkpointing,
compiled blocks, CUDA graphs (their eager twin), and DeepSpeed's faults.

Run by tests/pipeline/training/test_engine.py under torchrun; prints "agreed" on rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.utils import safe_set_full_optimizer_state

from pipeline.config.load import Config, load
from pipeline.models.build import build_model
from pipeline.ops import kernels
from pipeline.ranks.collectives import gather
from pipeline.training import engine
from pipeline.training.recipe import optimizer, parameter_groups

ranks, device = engine.start_ranks()
STAGES = (0, 1, 2, 3)


def configured(stage: int, precision: str = "fp32", policy: str = "selective", graphs: bool = False) -> Config:
    overrides = ["train.global_batch=8", "train.micro_batch=2", "data.resolution=32", f"train.zero_stage={stage}"]
    overrides += [f"train.precision={precision}", f"model.checkpointing={policy}", f"model.cuda_graphs={graphs}"]
    return load("configs/demo_pretrain.yaml", [*overrides, "optimizer.layer_decay=0.7", "optimizer.clip_grad_norm=0.5"])


def fresh(
    stage: int, precision: str = "fp32", policy: str = "selective", compiled: bool = False, graphs: bool = False
) -> engine.Engine:
    config = configured(stage, precision, policy, graphs)
    torch.manual_seed(0)
    model = build_model(config.model, 5, 32)
    if compiled:
        model.compile_blocks(backend="aot_eager")  # inductor needs a C++ compiler
    return engine.Engine(config, model, optimizer(parameter_groups(model, config.optimizer), config), ranks, device)


def everything(subject: engine.Engine) -> dict[tuple[str, str], torch.Tensor]:
    names = ("model", *subject.state_names)
    return {(s, n): t for s in names for n, t in subject.full_state(s, everywhere=True).items()}


def step(subject: engine.Engine, seed: int, factor: float = 1.0, **options: object) -> engine.StepResult:
    generator = torch.Generator().manual_seed(100 * seed + ranks.rank)
    torch.manual_seed(seed)  # drop path
    batch = [(torch.randn(2, 3, 32, 32, generator=generator), torch.zeros(2)) for _ in range(2)]
    last = ranks.count - 1  # only one rank sees what is not finite

    def loss(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return logits.square().mean() * (factor if ranks.rank == last else 1.0)

    return subject.train_step(iter(batch), loss, **options)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def steps_of(count: int) -> Iterator[int]:
    return iter(range(count))


losses, norms, ends = {}, {}, {}
for stage in STAGES:
    subject = fresh(stage)
    average = subject.full_state("model", everywhere=True)
    assert same(average, subject.full_state("ema", everywhere=True))
    results = []
    for seed in steps_of(3):
        results.append(step(subject, seed))
        weights = subject.full_state("model", everywhere=True)
        average = {name: torch.lerp(value, weights[name], 1 - 0.99) for name, value in average.items()}
    for name, value in subject.full_state("ema", everywhere=True).items():
        assert (value - average[name]).norm() <= 1e-6 * average[name].norm(), (stage, name)
    assert all(result.refused is None and not result.stop for result in results)
    losses[stage], norms[stage] = [r.loss for r in results], [r.grad_norm for r in results]

    autocast = fresh(stage, "bf16")
    assert [step(autocast, seed).loss for seed in range(3)] != losses[stage]
    for (state, name), value in everything(autocast).items():
        assert value.dtype == torch.float32
        if state == "ema":
            assert (value - average[name]).norm() <= 0.05 * average[name].norm() + 1e-3, (stage, name)

    variants = [(policy, False) for policy in ("none", "selective_mlp", "block", "stage", "[stage, block, none, none]")]
    for policy, compiled in (*variants, *[("selective", True)] * (stage == 2)):
        other = fresh(stage, policy=policy, compiled=compiled)
        told = [step(other, seed) for seed in range(2)]
        found, wanted = [(r.loss, r.grad_norm) for r in told], list(zip(losses[stage], norms[stage], strict=True))[:2]
        assert torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=1e-4), (stage, policy, compiled)

    # The demo has no drop path: what is handed in as masks, or left out, is nothing, and all bits are the same.
    for precision, same_net in (("fp32", subject), ("bf16", autocast)) if stage < 3 else ():
        other = fresh(stage, precision, graphs=True)
        told = [step(other, seed) for seed in range(3)]
        assert precision == "bf16" or [(r.loss, r.grad_norm) for r in told] == list(
            zip(losses[stage], norms[stage], strict=True)
        ), stage
        assert same(everything(other), everything(same_net)), (stage, precision)
        assert all(parameter.grad is None or stage == 0 for parameter in other.engine.module.parameters())

    before = everything(subject)
    for refused in (step(subject, 3, float("inf")), step(subject, 3, float("nan"))):
        assert "not finite" in str(refused.refused), refused
        assert refused.grad_norm == float("inf") or refused.grad_norm != refused.grad_norm
    asked: list[tuple[float, float]] = []

    def judge(loss: float, grad_norm: float, asked: list[tuple[float, float]] = asked) -> str | None:
        asked.append((loss, grad_norm))
        return "a spike"

    refused = step(subject, 3, judge=judge, stop=lambda: ranks.rank == 1)
    assert (refused.refused, refused.stop) == ("a spike", True)
    assert asked == [(refused.loss, refused.grad_norm)], asked  # once, not once for each group
    assert same(before, everything(subject)), stage
    assert subject.updates == 3

    # What follows a refused step is what follows no step at all; and a state set back is the state.
    step(subject, 4)
    after = everything(subject)
    assert not same(before, after)
    states: dict[str, dict[str, torch.Tensor]] = {}
    for (state, name), value in before.items():
        states.setdefault(state, {})[name] = value
    subject.load_weights(states.pop("model"))
    subject.load_state(states, updates=3)
    assert same(before, everything(subject)), stage
    step(subject, 4)
    assert same(after, everything(subject)), stage
    assert subject.updates == 4
    ends[stage] = after

for stage in STAGES[1:]:
    assert torch.allclose(torch.tensor(losses[stage]), torch.tensor(losses[0]), rtol=1e-5), losses
    assert torch.allclose(torch.tensor(norms[stage]), torch.tensor(norms[0]), rtol=1e-4), norms
    for key, value in ends[stage].items():
        # Adam's first steps divide noise by noise: single entries drift.
        assert (value - ends[0][key]).norm() <= 1e-2 * ends[0][key].norm() + 1e-6, (stage, key)

# DeepSpeed's faults that the engine works around. Where one of these fails, the workaround may go.
plain = fresh(0)
step(plain, 0)
assert plain.engine.get_global_grad_norm() is None, "stage 0 tells the gradient's norm: Engine._clip may go"
whole = fresh(3)
odd = [p for p in whole._parameters.values() if p.ds_numel % ranks.count]
assert odd
failed = False
try:
    safe_set_full_optimizer_state(odd[0], torch.zeros(odd[0].ds_shape), "exp_avg")
except RuntimeError:
    failed = True
assert any(gather(failed)), "full states can be set at stage 3 for any size: Engine._part may go"
config = configured(1)
model = build_model(config.model, 5, 32)
groups = parameter_groups(model, config.optimizer)
bare, _, _, _ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(groups, lr=1e-3),
    config={
        **engine.deepspeed_config(config, ranks.count, False),
        "gradient_accumulation_steps": 1,
        "train_batch_size": 4,
    },
)
bare.backward(bare(torch.randn(2, 3, 32, 32)).square().mean())
bare.step()
mappings = [p._hp_mapping for p in bare.module.parameters() if p._hp_mapping is not None]
unlinked = any("exp_avg" not in (mapping.optim_fragment or {}) for mapping in mappings)
assert any(gather(unlinked)), "states are linked without our help: Engine need not make them before the first step"
assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, "no shm_comm: start_ranks need not turn it off"

# What one rank cannot run, none does: ranks add up their gradients in the order in which they are ready.
engine.agree_on_kernels(None)
assert kernels._off is None
engine.agree_on_kernels("no compiler" if ranks.rank == 1 else None)
assert kernels.why_not(0) == "no compiler"
if ranks.rank == 0:
    print("agreed")
engine.stop_ranks()
