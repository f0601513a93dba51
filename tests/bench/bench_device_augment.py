"""Images per second of the augmentation on the device, against timm's transforms on one core of the host.

    python -m tests.bench.bench_device_augment [--device cuda] [--sizes 224 384] [--batch 64] [--repeats 10]

Both start from a cropped uint8 image and end at a normalised, erased float tensor. Ours takes a batch that is on the
device already. Images are made up: smooth noise at three scales. Needs torch, timm, numpy and Pillow; on a CPU, one
thread. Medians of the repeats, after two rounds of warming up.

- chain: the whole, and the part of it for which the host is busy; device operations in a batch (about the number of
  kernels); on CUDA also the peak of the memory allocated, and a check that nothing waits for the device
- groups: each operation on every image of the batch, per image
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data import device_augment, keyed
from pipeline.data.device_augment import NO_OP, OPS, DeviceAugment, Layer

ARGUMENTS = {  # typical of magnitude 9
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), 0.0),
    "Rotate": 27.0,
    "Posterize": 1.0,
    "Solarize": 26.0,
    "SolarizeAdd": 99.0,
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.81),
    **dict.fromkeys(("ShearX", "ShearY"), 0.27),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), 0.405),
}


class CountOperations(TorchDispatchMode):
    """Counts what torch dispatches, without views and empty allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in func.__name__)
        return func(*args, **(kwargs or {}))


def made_up_images(count: int, size: int) -> list[Image.Image]:
    """RGB images with structure of three scales."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        total = np.zeros((size, size, 3))
        for cells, share in ((4, 0.6), (16, 0.3), (size, 0.1)):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += share * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
        images.append(Image.fromarray(total.astype(np.uint8)))
    return images


def seconds(work: Callable[[int], object], wait: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of work(round): (until it returns, until the device is done too)."""
    busy, done = [], []
    for number in range(-2, repeats):
        wait()
        start = time.perf_counter()
        work(number)
        returned = time.perf_counter()
        wait()
        if number >= 0:
            busy.append(returned - start)
            done.append(time.perf_counter() - start)
    return statistics.median(busy), statistics.median(done)


def timm_seconds(augment: Any, images: list[Image.Image]) -> float:
    """Seconds per image of timm's transforms after the crop, on one core."""
    _, second, last = create_transform(
        input_size=images[0].width,
        is_training=True,
        auto_augment=augment.rand_augment,
        color_jitter=augment.color_jitter,
        interpolation=augment.interpolation,
        re_prob=augment.random_erasing,
        re_mode="pixel",
        separate=True,
    )
    for image in images[:4]:
        last(second(image))
    start = time.perf_counter()
    for image in images:
        last(second(image))
    return (time.perf_counter() - start) / len(images)


def bench(args: argparse.Namespace, size: int) -> None:
    """Print the two tables of one image size."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    images = made_up_images(args.batch, size)
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).to(device)

    def keys(number: int) -> np.ndarray:
        return keyed.view_keys(0, np.arange(args.batch) + (number + 2) * args.batch)

    print(f"\n{size} x {size}, batch {args.batch}")
    print(f"{'chain':32} {'images/s':>10} {'host busy':>10} {'timm, one core':>15} {'ratio':>7} {'operations':>11}")
    for text in (*args.rand_augment, None):
        augment = SimpleNamespace(
            rand_augment=text, color_jitter=0.4, random_erasing=0.25, interpolation=args.interpolation
        )
        ours = DeviceAugment(augment, device)
        if cuda:
            ours(batch, keys(-2))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("error")
        with CountOperations() as counted:
            ours(batch, keys(-1))
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        busy, done = seconds(lambda number, ours=ours: ours(batch, keys(number)), wait, args.repeats)
        theirs = timm_seconds(augment, (images * -(-args.timm_images // args.batch))[: args.timm_images])
        print(
            f"{text or 'colour jitter 0.4':32} {args.batch / done:10.0f} {busy * 1e3:7.2f} ms "
            f"{1 / theirs:11.0f} i/s {args.batch * theirs / done:6.1f}x {counted.count:11}"
        )
        if cuda:
            peak = torch.cuda.max_memory_allocated() - before
            print(f"{'':32} memory at the peak: {peak / 2**20:.0f} MiB; nothing waited for the device")

    print(f"{'group, on every image':32} {'us/image':>10} {'operations':>11}")
    nothing = np.zeros((0, 7), dtype=np.int64)
    everywhere = np.arange(args.batch)
    half = round(size * 0.41)  # a sixth of the area, as on average
    boxes = np.column_stack([everywhere, *(np.full(args.batch, value) for value in (3, 5, half, half, 1, 2))])
    cases: dict[str, Callable[[int], object]] = {
        "draws (host)": lambda number: (ours.draw_layers(keys(number)), ours.draw_boxes(keys(number), size, size)),
        "copy, normalise": lambda number: ours.apply(batch, [], nothing),
    }
    for name in OPS:
        layer = Layer(np.full(args.batch, OPS.index(name)), np.full(args.batch, ARGUMENTS[name]))
        assert (layer.ops != NO_OP).all()
        cases[name] = lambda number, layer=layer: _one_layer(ours, batch, layer)
    out = ours.apply(batch, [], nothing)
    cases["random erasing"] = lambda number: _erase(ours, out, boxes)
    for name, case in cases.items():
        with CountOperations() as counted:
            case(0)
        _, done = seconds(case, wait, args.repeats)
        print(f"{name:32} {done / args.batch * 1e6:10.1f} {counted.count:11}")


def _one_layer(ours: DeviceAugment, images: torch.Tensor, layer: Layer) -> None:
    work = images.clone(memory_format=torch.contiguous_format)
    plan = device_augment._plan(layer, *images.shape[2:])
    ours._apply_layer(work, dict(zip(plan, device_augment._send(list(plan.values()), ours.device), strict=True)))


def _erase(ours: DeviceAugment, images: torch.Tensor, boxes: np.ndarray) -> None:
    (there,) = device_augment._send([boxes], ours.device)
    device_augment.device_ops.erase(images, there, boxes[:, 3] * boxes[:, 4], ours.normal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--timm-images", type=int, default=256, help="images for timm's side")
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    strings = ["rand-m9-mstd0.5-inc1", "rand-m5-n1-p0.3-mstd0.5-inc1"]
    parser.add_argument("--rand-augment", nargs="*", default=strings, help="colour jitter is always measured as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.processor() or "CPU"
    print(f"device {args.device} ({name}), torch {torch.__version__}, one thread on the host, {args.interpolation}")
    for size in args.sizes:
        bench(args, size)


if __name__ == "__main__":
    main()
