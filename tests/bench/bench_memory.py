"""Peak memory of data prep's workers on a large archive: it must stay under 1 GB and not grow.

    python tests/bench/bench_memory.py [--gigabytes 20] [--workers 2] [--folder DIR]

The archive is a sparse file: each member is a real photograph followed by a hole, so that 20 GB take about 2 GB of
disk. Prints the resident memory of each process by tenth of the run, and the ratio of its last tenth to its second.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).parents[2]
MEMBER_BYTES = 1 << 20
MEMBERS_PER_CLASS = 500


def photographs() -> list[bytes]:
    """Sixteen cuts of two photographs, 1600 px wide."""
    rng, found = np.random.default_rng(0), []
    for photo in load_sample_images().images:
        large = Image.fromarray(photo).resize((2000, 1334), Image.Resampling.BICUBIC)
        for _ in range(8):
            x, y = rng.integers(0, 400), rng.integers(0, 134)
            file = io.BytesIO()
            large.crop((x, y, x + 1600, y + 1200)).save(file, "JPEG", quality=85)
            found.append(file.getvalue())
    return found


def sparse_archive(path: Path, total_bytes: int) -> int:
    """A tar of synset tars of that apparent size; returns the number of images."""
    images, members = photographs(), max(1, total_bytes // (MEMBER_BYTES + 512))
    block = tarfile.BLOCKSIZE
    with open(path, "wb") as file:
        for first in range(0, members, MEMBERS_PER_CLASS):
            wnid, count = f"n{first:08d}", min(MEMBERS_PER_CLASS, members - first)
            outer = tarfile.TarInfo(f"{wnid}.tar")
            outer.size = count * (block + MEMBER_BYTES) + 2 * block
            file.write(outer.tobuf())
            for number in range(first, first + count):
                inner = tarfile.TarInfo(f"{wnid}_{number}.JPEG")
                inner.size = MEMBER_BYTES
                start = file.write(inner.tobuf()) and file.tell()
                file.write(images[number % len(images)])
                file.seek(start + MEMBER_BYTES)  # the hole
            file.seek(2 * block, io.SEEK_CUR)
        file.seek(2 * block - 1, io.SEEK_CUR)
        file.write(b"\0")
    return members


def resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the archive and the result (a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        archive = Path(folder) / "archive.tar"
        images = sparse_archive(archive, int(options.gigabytes * 1e9))
        print(f"{images} images, {archive.stat().st_size / 1e9:.1f} GB apparent")
        command = [sys.executable, "-m", "data_prep", "shard", "--source", str(archive), "--output", f"{folder}/out"]
        command += ["--short-side", "256", "--workers", str(options.workers), "--ignore-disk"]
        run = subprocess.Popen(command, cwd=ROOT)
        samples: dict[int, list[tuple[float, int]]] = {}
        while run.poll() is None:
            processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            for process in processes:
                samples.setdefault(process.pid, []).append((time.monotonic(), resident_bytes(process)))
            time.sleep(0.2)
        if run.returncode:
            sys.exit(run.returncode)
    for pid, found in samples.items():
        if len(found) < 20:
            continue
        parts = np.array_split(np.array([size for _, size in found]), 10)
        peaks = [part.max() / 1e6 for part in parts]
        kind = "command" if pid == run.pid else "child"
        print(f"{kind} {pid}: peak by tenth of its life, MB: {' '.join(f'{peak:.0f}' for peak in peaks)}", end="; ")
        print(f"last to second tenth {peaks[-1] / peaks[1]:.2f}, peak to 1 GB {max(peaks) / 1000:.2f}")


if __name__ == "__main__":
    main()
