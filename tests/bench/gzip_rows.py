"""Part of bench_build.py: a `.tar.gz` of synset tars, read and built by this checkout and another, turn by turn.

The archive is as winter21: real JPEGs of 78 kB in the mean, 700 a class, one member, zlib's level 6. That makes them
1 % smaller, in blocks of literals, the slowest kind to inflate. CPU seconds of a process of its own for each figure.

- library: zlib and zlib-ng alone, from the file, blocks of 64 KiB, their CRC-32
- reading: every image of the source, as bytes
- structure, decode: the whole `shard` build, by --check
"""

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGES_OF_A_CLASS, WIDTHS = 700, (480, 720)
JOBS = ("library zlib", "library zlib-ng", "reading", "structure", "decode")


def write_archive(path: Path, gigabytes: float) -> None:
    """`gigabytes` of content: the same images under other names, too far from each other for gzip to notice."""
    from bench_images import photos

    files = photos(IMAGES_OF_A_CLASS, WIDTHS)
    packer, done, label = zlib.compressobj(6, wbits=31), 0, 0
    with open(path, "wb") as out:
        while done < gigabytes * 1e9:
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for number, data in enumerate(files):
                    info = tarfile.TarInfo(f"n{label:08d}_{number}.JPEG")
                    info.size = len(data)
                    inner.addfile(info, io.BytesIO(data))
            outer = tarfile.TarInfo(f"n{label:08d}.tar")
            outer.size = len(inner_file.getvalue())
            block = outer.tobuf() + inner_file.getvalue() + bytes(-outer.size % 512)
            out.write(packer.compress(block))
            done, label = done + len(block), label + 1
        out.write(packer.compress(bytes(10240)) + packer.flush())


def run(job: str, archive: Path) -> None:
    """In a process whose checkout is first on the path: print bytes of images (or of content) and CPU seconds."""
    if job.startswith("library"):
        begun, done = time.process_time(), 0
        if job == "library zlib":
            library = zlib
        else:
            from zlib_ng import zlib_ng as library  # type: ignore[no-redef]
        inflate = library.decompressobj(wbits=31)
        with open(archive, "rb", buffering=0) as file:
            while data := file.read(1 << 16):
                done += len(inflate.decompress(data))
    else:
        from data_prep.build.output import Output
        from data_prep.build.shards import ShardSettings, build_shards
        from data_prep.cluster import InProcess
        from data_prep.sources.detect import open_source

        begun, done = time.process_time(), 0
        if job == "reading":
            done = sum(len(event.data) for event in open_source(archive).events() if hasattr(event, "data"))
        else:
            with tempfile.TemporaryDirectory(dir=archive.parent) as to:
                settings = ShardSettings(check=job)
                build = build_shards([open_source(archive)], Output(Path(to) / "out"), settings, InProcess(), name="b")
                done = sum(shard.bytes for shard in build.manifest.splits["train"].shards)
    print(done, time.process_time() - begun)


def measure(gigabytes: float, before: str, rounds: int, folder: Path | None) -> None:
    """Print the table."""
    # Here, not above: what they import would change how the measured processes get their memory.
    from bench_launch import checked_out

    with tempfile.TemporaryDirectory() as temporary, checked_out(before, Path(temporary) / "before") as other:
        archive = (folder or Path(temporary)) / "archive.tar.gz"
        if not archive.exists():
            write_archive(archive, gigabytes)
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for _ in range(rounds):
            for job in JOBS:
                for name, root in (("before", other), ("now", ROOT)):
                    if job.startswith("library") and name == "before":
                        continue
                    command = [sys.executable, __file__, job, str(archive)]
                    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
                    told = subprocess.run(
                        command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True
                    ).stdout
                    size, seconds = map(float, told.split())
                    found[job, name].append(size / 1e6 / seconds)
        size = archive.stat().st_size / 1e9
        load = f"load {os.getloadavg()[0]:.1f}"
        print(f"{size:.1f} GB of gzip; MB of content a CPU-second, medians of {rounds} rounds; {load}")
        print("| | before | now | ratio |\n|---|---|---|---|")
        for job in JOBS:
            now = statistics.median(found[job, "now"])
            if job.startswith("library"):
                print(f"| {job} | | {now:.0f} | |")
                continue
            then = statistics.median(found[job, "before"])
            ratios = [b / a for a, b in zip(found[job, "before"], found[job, "now"], strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {job} | {then:.0f} | {now:.0f} | {spread} |")
        share = statistics.median(found["reading", "now"]) / statistics.median(found["library zlib-ng", "now"])
        print(f"reading at {share:.2f} of the library's own rate")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
