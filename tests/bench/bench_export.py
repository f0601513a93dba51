"""An exported model in onnxruntime, against our own eager net in fp32 and timm's ConvNeXt exported the same way.

    python tests/bench/bench_export.py [--models hornet_tiny_7x7 hornet_tiny_gf] [--px 224] [--batch 1]
        [--threads 1 2] [--rounds 15] [--profile FOLDER]

A case's subjects take turns, forwards and backwards, in one process. `ratio` is the median over rounds of eager /
subject, with its quartiles; GMAC/s are images/s times GMACs, which lets unequal models be compared. "fused" is after
`fuse_for_inference`, which `export` does not do. `Transpose`: nodes in the graph as exported, and left after
onnxruntime's own optimisation; `Reorder`: the copies between layouts that it puts around convolutions. --profile:
onnxruntime's own record of a run, and the operators that take most of it.

Export takes minutes, mostly torch's. `hornet_nano_gf` at 64 px is the quick look.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pipeline.models  # noqa: F401 (registers HorNet)
from pipeline.export.graph import OPSET
from pipeline.models.fuse import fuse_for_inference
from pipeline.models.hornet import HorNet

RIVAL = "convnext_tiny"
TARGET = 1.35  # times our own eager fp32
_PAUSE = 0.5  # seconds; libgomp and libiomp turn for up to 0.2


def written(net: nn.Module, px: int, file: Path) -> Path:
    """As `export --to onnx` writes it, without the comparison."""
    with torch.no_grad():
        program = torch.onnx.export(
            net,
            (torch.randn(2, 3, px, px),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["image"],
            output_names=["logits"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.save(file, external_data=False)
    return file


def session(file: Path, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.optimized_model_filepath = str(file.with_suffix(".optimised.onnx"))
    options.log_severity_level = 3  # of a file that is for this processor alone
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / file.stem)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def nodes(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


def gmacs(net: nn.Module, px: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(1, 3, px, px))
    return counter.get_total_flops() / 2e9


def turns(subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each subject in each round, of its second run after a pause: the idle threads of torch's and of
    onnxruntime's pool turn in a loop for a while, on the cores that the next subject needs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name in list(subjects) if number % 2 else list(reversed(subjects)):
            time.sleep(_PAUSE)
            subjects[name]()
            started = time.perf_counter()
            subjects[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def operators(file: Path) -> None:
    """Print the operators that take most of a profiled run."""
    spent: Counter[str] = Counter()
    for event in json.loads(file.read_text()):
        if event.get("cat") == "Node" and "op_name" in event.get("args", {}):
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    print("    " + ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in spent.most_common(6)))


def case(name: str, options: argparse.Namespace, px: int, folder: Path) -> None:
    torch.manual_seed(0)
    sized = {"img_size": px} if "_gf" in name else {}
    ours = timm.create_model(name, num_classes=1000, layer_scale_init=0.5, **sized).eval()
    assert isinstance(ours, HorNet)
    rival = timm.create_model(RIVAL).eval()
    work = {"onnx": gmacs(ours, px), "convnext": gmacs(rival, px)}
    fused = fuse_for_inference(copy.deepcopy(ours))
    nets: dict[str, nn.Module] = {"onnx": ours, "onnx fused": fused, f"onnx {RIVAL}": rival}
    files = {label: written(net, px, folder / f"{label.replace(' ', '-')}.onnx") for label, net in nets.items()}
    images = torch.randn(options.batch, 3, px, px)
    for threads in options.threads:
        torch.set_num_threads(threads)
        sessions = {label: session(file, threads) for label, file in files.items()}

        def run(label: str, sessions: dict[str, onnxruntime.InferenceSession] = sessions) -> list[Tensor]:
            return sessions[label].run(None, {"image": images.numpy()})

        subjects: dict[str, Callable[[], object]] = {
            "eager": lambda: ours(images),
            "eager fused": lambda: fused(images),
        }
        subjects |= {label: (lambda label=label: run(label)) for label in files}
        with torch.inference_mode():
            seconds = turns(subjects, options.rounds)
        print(f"{name} {px} px, batch {options.batch}, {threads} thread{'s' * (threads > 1)}, {options.rounds} rounds")
        for label, times in seconds.items():
            ratios = [a / b for a, b in zip(seconds["eager"], times, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            per_second = options.batch / statistics.median(times)
            rate = per_second * work["convnext" if RIVAL in label else "onnx"]
            speed = f"{per_second:7.1f} images/s  {rate:6.1f} GMAC/s"
            line = f"  {label:20} {speed}  ratio {middle:.2f} ({low:.2f}-{high:.2f})"
            if label in files:
                before, after = nodes(files[label]), nodes(files[label].with_suffix(".optimised.onnx"))
                reorders = sum(times for kind, times in after.items() if kind.startswith("Reorder"))
                line += f"  Transpose {before['Transpose']} -> {after['Transpose']}, Reorder {reorders}"
            print(line)
        best = statistics.median([a / b for a, b in zip(seconds["eager"], seconds["onnx"], strict=True)])
        pairs = zip(seconds["onnx"], seconds[f"onnx {RIVAL}"], strict=True)
        against = statistics.median([work["onnx"] / work["convnext"] * theirs / mine for mine, theirs in pairs])
        print(
            f"  onnx is {best:.2f} times eager fp32 (wanted {TARGET}), {against:.2f} times {RIVAL}'s GMAC/s (wanted 1)"
        )
        with torch.inference_mode():
            apart = float(
                (torch.from_numpy(sessions["onnx"].run(None, {"image": images.numpy()})[0]) - ours(images)).abs().max()
            )
        print(f"  logits within {apart:.1e} of eager's")
        if options.profile is not None:
            options.profile.mkdir(parents=True, exist_ok=True)
            for label, file in files.items():
                profiled = session(file, threads, options.profile)
                for _ in range(3):
                    profiled.run(None, {"image": images.numpy()})
                print(f"  {label}:")
                operators(Path(profiled.end_profiling()))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["hornet_tiny_7x7", "hornet_tiny_gf"])
    parser.add_argument("--px", type=int, nargs="+", default=[224])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", type=Path, help="a folder for onnxruntime's records")
    options = parser.parse_args()
    for name in options.models:
        for px in options.px:
            with tempfile.TemporaryDirectory() as folder:
                case(name, options, px, Path(folder))


if __name__ == "__main__":
    main()
