"""CPU seconds per image of the data loader, against other loaders on the same images and against what nothing can beat.

    python tests/bench/bench_data.py [--images 960] [--sides 224 384] [--rounds 5] [--only NAME ...] [--folder DIR]

Images are crops of two photographs, about 500 x 500 pixels and 70 kB, JPEG quality 90, as an ImageFolder and, through
data_prep, as shards and .betons of the same bytes (and one of raw pixels). Each peer has a process of its own, with one
data worker or thread; it is warmed up (imports, FFCV's compiler), then all take turns, and the median of the rounds
counts. CPU time is that of the process and all its children, when all that was read ahead has been made.

- crop: decode, random-resized crop of 8 to 100 % of the area, flip: uint8 batches of 32
- recipe: and RandAugment (rand-m9-mstd0.5-inc1), normalisation and erasing 0.25 by timm: float batches of 32; with
  augment.where=device the host's part of it is the crop alone

A peer that cannot be imported is named and left out. All of them, beside the environment of this checkout (DALI needs
no GPU here; mosaicml-streaming wants older packages, so it has an environment of its own):

    python -m venv PEERS && echo $PWD/.venv/lib/python3.*/site-packages > PEERS/lib/python3.*/site-packages/shared.pth
    PEERS/bin/pip install -c constraints.txt litdata spdl datasets nvidia-dali-cuda130
    python -m venv MDS && MDS/bin/pip install mosaicml-streaming simplejpeg torchvision psutil pillow
    PEERS/bin/python tests/bench/bench_data.py --mds-python MDS/bin/python
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data_peers import (
    BATCH,
    ROOT,
    Batches,
    dali,
    decode_alone,
    decode_crop,
    ffcv_alone,
    floor,
    make_data,
    ours,
    pil_crop,
    timm_recipe,
    webdataset_pil,
    webdataset_turbo,
)
from data_rivals import RIVALS

WARM_UP, ROUND_BATCHES = 8, 10


class Target(NamedTuple):
    """`ours` has to take at most 1/ratio of `peer`'s CPU time, at these sides."""

    ours: str
    peer: str
    ratio: float
    sides: tuple[int, ...] = (224, 384)


TARGETS = (
    Target("ours", "webdataset, PIL", 2.0, (224,)),
    Target("ours", "webdataset, PIL", 2.5, (384,)),
    Target("ours", "FFCV, jpg", 1.2),
    Target("ours", "DALI on the CPU", 1.2),
    *(
        Target("ours", name, ratio, (side,))
        for name in ("torchvision v2", "litdata, simplejpeg", "SPDL, simplejpeg")
        for side, ratio in ((224, 1.8), (384, 2.1))
    ),
    Target("ours, streamed", "webdataset, PIL", 1.5),
    Target("ours, ffcv jpg", "FFCV, jpg", 0.97),
    Target("ours, ffcv raw", "FFCV, raw", 0.97),
    Target("ours", "recipe: ImageFolder, timm", 3.0),
)


PEERS: dict[str, Callable[[Path, int], Batches]] = {
    "ImageFolder, PIL": pil_crop,
    "webdataset, PIL": webdataset_pil,
    "webdataset, simplejpeg, torch": webdataset_turbo,
    **RIVALS,
    "FFCV, jpg": ffcv_alone("jpg"),
    "FFCV, raw": ffcv_alone("raw"),
    "DALI on the CPU": dali,
    "ours, no worker": ours("data.workers_per_rank=0"),
    "ours": ours(),
    "ours, streamed": ours("data.reader=stream"),
    "ours, ffcv jpg": ours("data.format=ffcv"),
    "ours, ffcv raw": ours("data.format=ffcv", mode="raw"),
    "floor: simplejpeg, whole image": floor(decode_alone),
    "floor: crop_resize": floor(decode_crop),
    "recipe: ImageFolder, timm": timm_recipe,
    "recipe: ours, augment.where=host": ours("augment.where=host"),
}


def cpu_seconds() -> float:
    """Of this process and its children, living or not."""
    import psutil

    process = psutil.Process()
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    own = time.process_time()  # finer than /proc's ticks of 10 ms
    reaped = times[0].children_user + times[0].children_system
    return own + reaped + sum(each.user + each.system for each in times[1:])


def settled_cpu_seconds() -> float:
    """When everything that is read ahead has been made: a round then makes as many images as it takes."""
    last = cpu_seconds()
    while True:
        time.sleep(0.5)
        now = cpu_seconds()
        if now - last < 0.015:
            return now
        last = now


def images_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, list | tuple) else batch


def serve(name: str, folder: Path, side: int) -> None:
    """A peer's process: a line on stdin is a round, the answer its milliseconds of CPU time per image."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(1)
    if "FFCV" in name or "ffcv" in name:
        import cv2

        cv2.setNumThreads(1)
        os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    if "DALI" in name:
        import nvidia.dali  # noqa: F401
    batches = (images_of(batch) for batch in PEERS[name](folder, side))
    epoch = len(list((folder / "tree").rglob("*.JPEG"))) // BATCH
    # FFCV runs dry at the end of an epoch: a round is a whole one.
    count = epoch if "FFCV" in name or "ffcv" in name else ROUND_BATCHES
    for first in itertools.islice(batches, epoch if count == epoch else WARM_UP):
        assert tuple(first.shape) in ((BATCH, side, side, 3), (BATCH, 3, side, side)), first.shape
        assert ("float32" if name.startswith("recipe") else "uint8") in str(first.dtype)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        begun = settled_cpu_seconds()
        taken = sum(len(batch) for batch in itertools.islice(batches, count))
        print((settled_cpu_seconds() - begun) * 1000 / taken, file=answers, flush=True)
    os._exit(0)


def measure(names: list[str], folder: Path, side: int, rounds: int, mds_python: str) -> dict[str, list[float]]:
    """Milliseconds by peer and round; a peer that cannot start is left out, with a word."""
    # The path for another environment than this checkout is installed in.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    peers: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        python = mds_python if name.startswith("MDS") else sys.executable
        command = [python, __file__, "--serve", name, "--folder", str(folder), "--sides", str(side)]
        pipe = subprocess.PIPE
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would block who writes much
        peer = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, cwd=ROOT, env=environment)
        assert peer.stdout is not None
        if peer.stdout.readline() != "ready\n":
            peer.wait()
            said.seek(0)
            print(f"left out: {name}: {(said.read().strip().splitlines() or ['no reason given'])[-1]}")
            del found[name]
        else:
            peers[name] = peer
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name in peers:
                stdin, stdout = peers[name].stdin, peers[name].stdout
                assert stdin is not None
                assert stdout is not None
                stdin.write("round\n")
                stdin.flush()
                found[name].append(float(stdout.readline()))
    for peer in peers.values():
        peer.communicate()
    return found


def report(found: dict[str, list[float]], side: int) -> None:
    from rich.console import Console
    from rich.table import Table

    median = {name: statistics.median(values) for name, values in found.items()}
    table = Table("what", "CPU-ms an image", "spread", "images/CPU-s", "ours / this", title=f"{side} px")
    reference = median.get("ours", float("nan"))
    for name, value in median.items():
        spread = (max(found[name]) - min(found[name])) / value
        table.add_row(name, f"{value:.2f}", f"{spread:.0%}", f"{1000 / value:.0f}", f"{value / reference:.2f}")
    goals = Table("target", "wanted", "found", "", title=f"{side} px: images per CPU-second, ratios")
    for target in TARGETS:
        if side in target.sides and target.ours in median and target.peer in median:
            ratio = median[target.peer] / median[target.ours]
            verdict = "met" if ratio >= target.ratio else "MISSED"
            goals.add_row(f"{target.ours} to {target.peer}", f"{target.ratio:g}", f"{ratio:.2f}", verdict)
    for name in ("floor: crop_resize", "floor: simplejpeg, whole image"):
        if name in median and "ours" in median:
            goals.add_row(f"ours to {name}", "", f"{median[name] / median['ours']:.2f}", "")
    Console(width=100).print(table, goals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="of the peers")
    parser.add_argument("--folder", type=Path, help="keep the images there, or take those that are")
    parser.add_argument("--mds-python", default=sys.executable, help="of the environment that has mosaicml-streaming")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.sides[0])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "raw" / "dataset.json").exists():
            make_data(folder, options.images)
        sizes = [path.stat().st_size for path in (folder / "tree").rglob("*.JPEG")]
        print(f"{len(sizes)} images of {statistics.mean(sizes) / 1000:.0f} kB; medians of {options.rounds} rounds")
        for side in options.sides:
            report(measure(options.only, folder, side, options.rounds, options.mds_python), side)


if __name__ == "__main__":
    main()
