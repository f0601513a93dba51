"""How many operations a block dispatches, and how long a train step takes on a CPU: a former build and this one.

    python tests/bench/bench_launches.py [--before dd5ceaf] [--models 7x7 gf] [--policies none selective ...]
        [--steps fp32 bf16] [--rounds 9] [--batch 8] [--px 224] [--threads 2]

counts: of one more block in the third stage of HorNet-L, forward and backward under bf16 autocast, drop path 0.2,
micro-batch 4; views and allocations left out; with the Triton kernels each launch of one counts as well. `net` is all
of HorNet-L's 25 blocks, with what is done once a stage. Counts are exact: they hang on nothing that a clock measures.

steps: forward, cross-entropy, backward of HorNet-T, as in bench_model.py. The two builds are two processes that take
turns, step by step, on the same images with the same draws; the ratio is the median over rounds, with its quartiles.
What decides the times of products is printed: the instruction set that PyTorch uses, the libraries, and what each does
in GFLOP/s on a product of the net.

The former build is a commit, unpacked into a temporary folder.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
POLICIES = ("none", "selective", "selective_mlp", "block", "stage")


class Build:
    """A process that has one build's package, and answers one line of JSON with another."""

    def __init__(self, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", str(folder), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def ask(self, **asked: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a build ended with code {self._process.wait()} when it was asked for {asked}")
        return json.loads(answer)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work(folder: Path, threads: int) -> None:
    """The process of a build: its package is imported from `folder`, what counts and measures from here."""
    sys.path[:0] = [str(folder), str(ROOT / "tests" / "bench")]
    import bench_model
    import torch

    import tests.support

    tests.support.__path__.insert(0, str(ROOT / "tests" / "support"))
    from pipeline.models.hornet import HorNet
    from tests.support import launches

    torch.set_num_threads(threads)
    bench_model.keep_freed_memory()
    steps: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["what"] == "block":
            answer: Any = launches.of_block(asked["gf"], asked["policy"], asked["kernels"])
        elif asked["what"] == "net":
            answer = launches.of_pass(asked["gf"], asked["policy"], asked["kernels"], bench_model.DEPTHS).total()
        else:
            key = f"{asked['gf']} {asked['dtype']} {asked['policy']}"
            if key not in steps:
                steps.clear()
                torch.manual_seed(0)
                filters = {"global_filter_stages": (2, 3), "img_size": asked["px"]} if asked["gf"] else {}
                model = HorNet(drop_path_rate=0.2, **filters)
                model.set_checkpointing(asked["policy"])
                x, labels = torch.randn(asked["batch"], 3, asked["px"], asked["px"]), torch.arange(asked["batch"])
                steps[key] = bench_model.train_step(model, x, labels, bench_model.DTYPES[asked["dtype"]])
            torch.manual_seed(asked["round"])  # the same samples are dropped
            start = time.perf_counter()
            steps[key]()
            answer = time.perf_counter() - start
        print(json.dumps(answer), flush=True)


def counts(builds: dict[str, Build], models: list[str], policies: list[str]) -> None:
    print("| block | kernels | policy | before | now | now / before |\n|---|---|---|---|---|---|")
    for model in models:
        for kernels in (False, True):
            for policy in policies:
                asked = {"gf": model == "gf", "policy": policy, "kernels": kernels}
                before, now = (builds[name].ask(what="block", **asked) for name in ("before", "now"))
                said = "Triton" if kernels else "plain"
                print(f"| {model} | {said} | {policy} | {before:.4g} | {now:.4g} | {now / before:.3f} |", flush=True)
            before, now = (builds[name].ask(what="net", **asked) for name in ("before", "now"))
            print(f"| net, {model} | {said} | {policy} | {before} | {now} | {now / before:.3f} |", flush=True)


def products(threads: int) -> None:
    """What the machine has for products, and how fast these are."""
    import torch

    from pipeline.ops import products as ours

    torch.set_num_threads(threads)
    narrow = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    print(f"\ntorch {torch.__version__}, {threads} threads, instructions {torch.backends.cpu.get_cpu_capability()}")
    chosen = "oneDNN's" if ours.ONEDNN else "MKL's" if torch.backends.mkl.is_available() else "PyTorch's"
    print(f"products in fp32: {chosen}; in bf16: {'in bf16, by oneDNN' if narrow else 'through fp32'}")
    print("\n| rows, in, out | dtype | forward | input gradient | weight gradient: GFLOP/s |\n|---|---|---|---|---|")
    for rows, width, out in ((1568, 256, 1024), (392, 2048, 512), (25088, 64, 256)):
        for dtype in (torch.float32, torch.bfloat16):
            x, w, d = (torch.randn(*shape, dtype=dtype) for shape in ((rows, width), (out, width), (rows, out)))
            spelled = (
                lambda x=x, w=w: ours.linear(x, w, None),
                lambda d=d, w=w: ours.input_gradient(d, w),
                lambda x=x, d=d: ours.weight_gradients(d, x, (True, False)),
            )
            speeds = []
            for product in spelled:
                product()
                start, count = time.perf_counter(), 0
                while time.perf_counter() - start < 0.3:
                    product()
                    count += 1
                speeds.append(2 * rows * width * out * count / (time.perf_counter() - start) / 1e9)
            said = " | ".join(f"{speed:.0f}" for speed in speeds)
            print(f"| {rows}, {width}, {out} | {str(dtype).removeprefix('torch.')} | {said} |", flush=True)


def times(builds: dict[str, Build], args: argparse.Namespace) -> None:
    print("\n| train step | dtype | policy | before s | now s | before / now (quartiles) |\n|---|---|---|---|---|---|")
    for model in args.models:
        for dtype in args.steps:
            for policy in args.step_policies:
                found: dict[str, list[float]] = {name: [] for name in builds}
                for number in range(-2, args.rounds):
                    for name in sorted(builds, reverse=bool(number % 2)):
                        asked = {
                            "gf": model == "gf",
                            "dtype": dtype,
                            "policy": policy,
                            "batch": args.batch,
                            "px": args.px,
                        }
                        took = builds[name].ask(what="step", round=number + 2, **asked)
                        if number >= 0:
                            found[name].append(took)
                ratios = [a / b for a, b in zip(found["before"], found["now"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                medians = " | ".join(f"{statistics.median(found[name]):.3f}" for name in ("before", "now"))
                print(
                    f"| T {model} | {dtype} | {policy} | {medians} | {middle:.2f} ({low:.2f}-{high:.2f}) |", flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="dd5ceaf", help="commit of the former build")
    parser.add_argument("--models", nargs="+", choices=("7x7", "gf"), default=["7x7", "gf"])
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=list(POLICIES), help="none given: no counts")
    parser.add_argument("--steps", nargs="*", choices=("fp32", "bf16"), default=[], help="time train steps in these")
    parser.add_argument("--step-policies", nargs="+", choices=POLICIES, default=["none"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.threads)
    if args.steps:
        products(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", args.before, "pipeline", "tests"], cwd=ROOT, check=True, capture_output=True
        )
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        builds = {"before": Build(Path(folder), args.threads), "now": Build(ROOT, args.threads)}
        try:
            if args.policies:
                counts(builds, args.models, args.policies)
            if args.steps:
                times(builds, args)
        finally:
            for build in builds.values():
                build.end()


if __name__ == "__main__":
    main()
