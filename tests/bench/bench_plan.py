"""`python -m pipeline plan` against real training steps: is the memory that it predicts what ranks need?

    python tests/bench/bench_plan.py [--groups N ...]

Each setting is a run of real gloo ranks under DeepSpeed on the CPU (tests/support/programs/step_memory.py). Measured:
the most bytes of tensors that are alive at any moment of a step; where there is one rank, also the peak resident memory
of its process in a step, above what it had after a step of a tiny net. Predicted: `pipeline/planning/` from the
configuration alone, for the same device (no GPU's context, AdamW parameter by parameter). Markdown; exit code 1 where a
row of tensors is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "demo_pretrain.yaml"
PROGRAM = ROOT / "tests" / "support" / "programs" / "step_memory.py"
CLASSES = 50
ALLOWED = 0.10


class Setting(NamedTuple):
    model: str
    px: int
    batch: int
    policy: str
    stage: int
    ranks: int = 2
    accumulation: int = 1
    precision: str = "fp32"
    resident: bool = False

    @property
    def overrides(self) -> list[str]:
        return [
            *(f"model.name={self.model}", f"data.resolution={self.px}", f"train.micro_batch={self.batch}"),
            *(f"model.checkpointing={self.policy}", f"train.zero_stage={self.stage}"),
            f"train.global_batch={self.batch * self.ranks * self.accumulation}",
            *(f"train.precision={self.precision}", "data.shuffle_lanes=1"),
        ]


# Those of a group share their processes: ZeRO-3 last, since it puts functions of its own in place of torch's.
GROUPS = (
    (
        Setting("hornet_tiny_7x7", 64, 8, "none", 0),
        Setting("hornet_tiny_7x7", 64, 4, "selective", 0, accumulation=2),
        Setting("hornet_tiny_7x7", 64, 8, "selective", 1),
        Setting("hornet_tiny_gf", 64, 8, "stage", 1),
        Setting("hornet_small_gf", 64, 4, "selective", 1, accumulation=2),
        Setting("hornet_tiny_gf", 96, 8, "selective_mlp", 2),
        Setting("hornet_tiny_7x7", 64, 8, "selective", 2, precision="bf16"),
        Setting("hornet_small_7x7", 64, 4, "block", 2, accumulation=2),
        Setting("hornet_base_7x7", 64, 4, "selective", 2),
        Setting("hornet_tiny_7x7", 64, 8, "selective", 3),
        Setting("hornet_tiny_7x7", 128, 8, "none", 3),
        Setting("hornet_tiny_gf", 64, 8, "block", 3),
    ),
    (Setting("hornet_tiny_7x7", 160, 8, "none", 0, ranks=1, resident=True),),
    (Setting("hornet_tiny_gf", 160, 8, "selective", 0, ranks=1, resident=True),),
)
# Goes before one whose resident memory is wanted: what a first step loads and allocates for good is not the setting's.
FIRST = Setting("hornet_nano_gf", 32, 2, "none", 0, ranks=1)


def measure(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Of rank 0; settings of as many ranks share their processes."""
    if settings[0].resident:
        return measure((FIRST, settings[0]._replace(resident=False)))[1:]
    with tempfile.NamedTemporaryFile() as result:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [*launcher, str(settings[0].ranks), str(PROGRAM), str(CONFIG), result.name]
        for number, setting in enumerate(settings):
            command += [*(["--"] if number else []), *setting.overrides]
        # glibc keeps freed blocks below its threshold, which it raises as it goes: fixed, what is freed is given back.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return json.loads(Path(result.name).read_text())


def predict(setting: Setting) -> tuple[int, str]:
    """(bytes, moment)."""
    from pipeline.config.load import load
    from pipeline.planning.footprint import Asked, Footprint
    from pipeline.planning.rates import gpu

    config = load(CONFIG, setting.overrides)
    asked = Asked(gpu("h100"), setting.ranks, 0.0, 8, 1e9, images=100_000, classes=CLASSES)
    found = Footprint(config, asked, device="cpu").peak(config.model.checkpointing, setting.ranks, setting.batch)
    return found.total, found.moment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=range(len(GROUPS)), metavar="N", help="from 0")
    options = parser.parse_args()
    print("| model | px | batch | policy | ZeRO | ranks | acc. | | predicted MB, moment | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for number in options.groups:
        for setting, found in zip(GROUPS[number], measure(GROUPS[number]), strict=True):
            expected, moment = predict(setting)
            counted = {"tensors": found["peak"]} | ({"resident": found["resident"]} if setting.resident else {})
            for what, size in counted.items():
                ratio = expected / size
                if what == "tensors":
                    worst = max(worst, abs(ratio - 1))
                first = f"{setting.model.removeprefix('hornet_')} | {setting.px} | {setting.batch} | {setting.policy}"
                how = f"{what}{', bf16' if setting.precision == 'bf16' else ''}"
                print(
                    f"| {first} | {setting.stage} | {setting.ranks} | {setting.accumulation} | {how} "
                    f"| {expected / 1e6:.1f}, {moment} | {size / 1e6:.1f} | {ratio:.3f} |",
                    flush=True,
                )
    print(f"\nfurthest off, of tensors: {100 * worst:.1f} %")
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
