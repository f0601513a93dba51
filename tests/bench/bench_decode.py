"""The JPEG decoder alone: random-resized crops to a square, one thread, no loader around it.

    python tests/bench/bench_decode.py [--rounds 9]

Baselines do the same work: FFCV's own two functions (whole decode, resize by area), and simplejpeg's whole decode with
torch's antialiased resize. Ratios are medians over rounds of CPU seconds; FFCV may be missing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from io import BytesIO
from unittest.mock import patch

import numpy as np
import simplejpeg
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images

from pipeline.data import decode
from pipeline.data.keyed import crop_box

Job = tuple[bytes, int, int, decode.Box]  # file, height, width, box


def photographs(side: int, count: int, rng: np.random.Generator) -> list[Job]:
    """Crops of two photographs, scaled to about side x side with a grain that keeps their size per pixel realistic."""
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    jobs = []
    for number in range(count):
        width, height = (side + rng.integers(-side // 5, side // 5, 2)).tolist()
        zoom = min(640 / width, 427 / height) * rng.uniform(0.6, 1)
        left, top = rng.uniform(0, 640 - width * zoom), rng.uniform(0, 427 - height * zoom)
        box = (left, top, left + width * zoom, top + height * zoom)
        image = np.asarray(sources[number % 2].resize((width, height), Image.Resampling.LANCZOS, box), float)
        noisy = Image.fromarray((image + rng.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8))
        noisy.save(file := BytesIO(), "JPEG", quality=90)
        jobs.append((file.getvalue(), height, width, crop_box(height, width, 0.08, int(rng.integers(1 << 63)))))
    return jobs


def spellings(size: int) -> dict[str, Callable[[Job], object]]:
    """Name -> the crop of one job, by each way."""
    out, scratch = np.empty((size, size, 3), np.uint8), np.empty(4000 * 4000 * 3, np.uint8)

    def by_torch(pixels: np.ndarray, box: decode.Box) -> torch.Tensor:
        top, left, height, width = box
        region = torch.from_numpy(pixels[top : top + height, left : left + width])[None].permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(region, (size, size), mode="bicubic", antialias=True)

    def without_module(job: Job) -> np.ndarray:
        with patch.object(decode, "COMPILED", False):
            return decode.crop_resize(job[0], job[3], size)

    ways: dict[str, Callable[[Job], object]] = {
        "crop_resize": lambda job: decode.crop_resize(job[0], job[3], size, out),
        "crop_resize without the C module": without_module,
        "whole decode + torch resize": lambda job: by_torch(simplejpeg.decode_jpeg(job[0], "RGB"), job[3]),
        "whole decode alone (no crop)": lambda job: simplejpeg.decode_jpeg(job[0], "RGB"),
    }
    try:
        from ffcv.libffcv import imdecode, resize_crop
    except ImportError:
        return ways

    def by_ffcv(job: Job) -> None:
        data, height, width, (top, left, h, w) = job
        pixels = scratch[: height * width * 3].reshape(height, width, 3)
        imdecode(np.frombuffer(data, np.uint8), pixels, height, width, height, width)
        resize_crop(pixels, top, top + h, left, left + w, out)

    return {**ways, "FFCV (whole decode, area resize)": by_ffcv}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"times the throughput of a whole decode + torch resize (C module: {decode.COMPILED})")
    columns = [(side, size) for side in (500, 1000) for size in (224, 384)]
    table.add_column("way")
    rows: dict[str, list[str]] = {}
    for side, size in columns:
        jobs = photographs(side, options.images, np.random.default_rng(side))
        kilobytes = np.mean([len(job[0]) for job in jobs]) / 1e3
        table.add_column(f"{side} px, {kilobytes:.0f} kB -> {size}", justify="right")
        ways = spellings(size)
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.process_time()
                for job in jobs:
                    way(job)
                spent[name].append(time.process_time() - started)
        baseline = np.array(spent["whole decode + torch resize"])
        for name, seconds in spent.items():
            rows.setdefault(name, []).append(f"{np.median(baseline / np.array(seconds)):.2f}")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
