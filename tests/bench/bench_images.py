"""Images per CPU-second of preparing images, against what people write and what the libraries alone can do.

    python tests/bench/bench_images.py [--large 32] [--small 300] [--repeats 3] [--no-ffcv]

Images are crops of two real photos, resized, with mild noise, JPEG quality 92. One core; CPU time of this process and
of its children; the best of the repeats, which alternate between the methods. Every method but the floors also writes:
the plain loop with webdataset's ShardWriter, FFCV its .beton, ours a tar of .jpg and .json.

- plain: PIL decode, bicubic resize, PIL encode at quality 90
- ffcv: DatasetWriter, write_mode jpg, quality 90; its max_resolution bounds the longer side
- floor: simplejpeg decode, torch resize, simplejpeg encode, nothing else; with "DCT": decoded at 1/2 where that pays
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import signal
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.images.jpeg import jpeg_header
from data_prep.images.pixels import decode_unpacked, resize
from data_prep.images.prepare import ImagePolicy, prepare_image
from data_prep.images.turbo import dct_scale

SHORT_SIDE_PX, QUALITY = 512, 90
Method = Callable[[list[bytes], Path], None]


def photos(count: int, widths: tuple[int, int], seed: int = 0) -> list[bytes]:
    """JPEG files of random crops, resized to a width in `widths` pixels."""
    rng = np.random.default_rng(seed)
    sources = [Image.fromarray(photo) for photo in load_sample_images().images]
    files = []
    for number in range(count):
        source = sources[number % 2]
        part = rng.uniform(0.6, 1)
        width, height = round(source.width * part), round(source.height * part)
        left, top = int(rng.integers(source.width - width + 1)), int(rng.integers(source.height - height + 1))
        image = source.crop((left, top, left + width, top + height))
        wide = int(rng.integers(widths[0], widths[1] + 1))
        image = image.resize((wide, round(wide * height / width)), Image.Resampling.BICUBIC)
        noisy = np.asarray(image) + rng.normal(0, 3, (image.height, image.width, 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    return files


def shrunk(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, SHORT_SIDE_PX / min(width, height))
    return round(width * scale), round(height * scale)


def plain(files: list[bytes], folder: Path) -> None:
    with contextlib.redirect_stdout(None), webdataset.ShardWriter(str(folder / "plain-%06d.tar"), verbose=0) as writer:
        for number, data in enumerate(files):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            size = shrunk(*image.size)
            if size != image.size:
                image = image.resize(size, Image.Resampling.BICUBIC)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=QUALITY)
            writer.write({"__key__": f"{number:08d}", "jpg": file.getvalue(), "cls": 0})


class Opened:
    """The images as FFCV's writer takes them: (PIL image, label)."""

    def __init__(self, files: list[bytes]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.files[index])).convert("RGB"), 0


def ffcv(files: list[bytes], folder: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    longest = max(max(shrunk(*Image.open(io.BytesIO(data)).size)) for data in files)
    image = RGBImageField(write_mode="jpg", max_resolution=longest, jpeg_quality=QUALITY)
    signal.alarm(300)  # the writer waits for ever when its worker fails
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        writer = DatasetWriter(str(folder / "out.beton"), {"image": image, "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset(Opened(files))
    for worker in multiprocessing.active_children():  # FFCV leaves them: their CPU time counts once they are joined
        worker.join()
    signal.alarm(0)


def floor(scaled: bool) -> Method:
    def run(files: list[bytes], folder: Path) -> None:
        for data in files:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            source, target = (width, height), shrunk(width, height)
            header = jpeg_header(data)
            scale = dct_scale(min(width, height) / min(target)) if scaled else 1
            pixels = decode_unpacked(data, header, scale).pixels
            assert pixels is not None
            if target != source:
                pixels = resize(pixels, source, target)
            simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420")

    return run


def write_tar(samples: Iterable[tuple[str, bytes, dict]], path: Path) -> None:
    """(key, jpeg, about) to .jpg and .json members, as data_prep writes its shards: no TarFile, only its headers."""
    with open(path, "wb") as file:
        for key, jpeg, about in samples:
            for suffix, content in (("jpg", jpeg), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def ours(**policy) -> Method:
    def run(files: list[bytes], folder: Path) -> None:
        chosen = ImagePolicy(short_side_px=SHORT_SIDE_PX, quality=QUALITY, **policy)
        prepared = ((f"{number:08d}", prepare_image(data, chosen)) for number, data in enumerate(files))
        write_tar(((key, p.jpeg, {"width": p.width, "height": p.height}) for key, p in prepared), folder / "ours.tar")

    return run


def copied(files: list[bytes], folder: Path) -> None:
    write_tar(((f"{number:08d}", data, {}) for number, data in enumerate(files)), folder / "copied.tar")


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(methods: dict[str, Method], files: list[bytes], repeats: int) -> dict[str, float]:
    """Images per CPU-second by method, without what it takes to start: two images are timed too, and subtracted."""
    best: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in methods.values():  # imports, caches
            method(files[:2], Path(folder))
        for _ in range(repeats):
            for name, method in methods.items():
                for count in (2, len(files)):
                    start = cpu_seconds()
                    method(files[:count], Path(folder))
                    best[name, count] = min(best.get((name, count), float("inf")), cpu_seconds() - start)
    return {name: (len(files) - 2) / (best[name, len(files)] - best[name, 2]) for name in methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", type=int, default=32, help="images 1500 to 2500 pixels wide")
    parser.add_argument("--small", type=int, default=300, help="images 400 to 600 pixels wide")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-ffcv", action="store_true", help="leave FFCV out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    baselines: dict[str, Method] = {"plain": plain}
    if not arguments.no_ffcv:
        import cv2

        cv2.setNumThreads(1)
        baselines["ffcv"] = ffcv
    large, small = photos(arguments.large, (1500, 2500)), photos(arguments.small, (400, 600))
    always, structure = {"reencode": "always"}, {"check": "structure"}
    cases: list[tuple[str, list[bytes], dict[str, Method]]] = [
        ("large", large, {"floor": floor(False), "floor, DCT": floor(True), "ours": ours()}),
        ("small, all encoded", small, {"floor": floor(False), "ours": ours(**always)}),
        ("small, passing", small, {"copy": copied, "ours, decode": ours(), "ours, structure": ours(**structure)}),
    ]
    print(f"{'case':20} {'method':16} {'images/CPU-s':>12} {'to plain':>9} {'to ffcv':>9} {'to floor':>9}")
    for case, files, methods in cases:
        speeds = measure(baselines | methods, files, arguments.repeats)
        for method, speed in speeds.items():
            floors = [speeds[name] for name in ("floor, DCT", "floor") if name in speeds]
            against = [speeds["plain"], speeds.get("ffcv"), floors[0] if floors else None]
            ratios = " ".join(f"{speed / other:9.2f}" if other else f"{'':9}" for other in against)
            print(f"{case:20} {method:16} {speed:12.1f} {ratios}")


if __name__ == "__main__":
    main()
