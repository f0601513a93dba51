"""Images per CPU-second of a whole build, archive to shards with ledger, against the loop that people write.

    python tests/bench/bench_build.py [--large 32] [--small 1000] [--repeats 3]
    python tests/bench/bench_build.py --gzip 4.3 [--before d1ce186] [--repeats 3]

Both read the same tar of synset tars from disk and write shards. One process; CPU time, so that waiting for the disk
does not count; the best of the repeats, which alternate. The plain loop neither shuffles, checks nor ledgers.

With --gzip: a .tar.gz of so many GB instead, against another version of this project (gzip_rows.py).
"""

import argparse
import io
import tarfile
import tempfile
import time
from pathlib import Path

import gzip_rows
import webdataset
from bench_images import QUALITY, SHORT_SIDE_PX, photos, shrunk
from PIL import Image

from data_prep.build import shards
from data_prep.build.output import Output
from data_prep.build.shards import ShardSettings, build_shards
from data_prep.cluster import InProcess
from data_prep.sources.detect import open_source


def write_archive(path: Path, files: list[bytes]) -> None:
    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w") as outer:
        for label in range(10):
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for number in range(label, len(files), 10):
                    add(inner, f"n{label:08d}_{number}.JPEG", files[number])
            add(outer, f"n{label:08d}.tar", inner_file.getvalue())


def plain(archive: Path, folder: Path) -> None:
    writer = webdataset.ShardWriter(str(folder / "plain-%06d.tar"), verbose=0)
    with tarfile.open(archive) as outer, writer:
        for label, member in enumerate(outer):
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for image_member in inner:
                    image = Image.open(inner.extractfile(image_member)).convert("RGB")
                    size = shrunk(*image.size)
                    if size != image.size:
                        image = image.resize(size, Image.Resampling.BICUBIC)
                    file = io.BytesIO()
                    image.save(file, "JPEG", quality=QUALITY)
                    key = image_member.name.removesuffix(".JPEG")
                    writer.write({"__key__": key, "jpg": file.getvalue(), "cls": label})


# A small source is cut into small chunks, each with its fixed cost; a real one is not.
shards.MIN_CHUNK_BYTES = shards.MAX_CHUNK_BYTES


def ours(archive: Path, folder: Path, **settings: str) -> None:
    chosen = ShardSettings(short_side_px=SHORT_SIDE_PX, quality=QUALITY, **settings)
    build_shards([open_source(archive)], Output(folder / "out"), chosen, InProcess(), name="bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=32, help="images 1500-2500 px wide (32)")
    parser.add_argument("--small", type=int, default=1000, help="images 400-600 px wide (1000)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gzip", type=float, metavar="GB", help="of content, in a .tar.gz: that alone")
    parser.add_argument("--before", default="d1ce186", metavar="REVISION", help="or a folder; what --gzip is against")
    parser.add_argument("--folder", type=Path, help="keep --gzip's archive there, or take the one that is")
    options = parser.parse_args()
    if options.gzip:
        gzip_rows.measure(options.gzip, options.before, options.repeats, options.folder)
        return
    cases = {
        "large": (photos(options.large, (1500, 2500)), [{}]),
        "small, all encoded": (photos(options.small // 2, (400, 600)), [{"reencode": "always"}]),
        "small, passing": (photos(options.small, (400, 600)), [{}, {"check": "structure"}]),
    }
    print(f"{'case':20} {'method':22} {'images/CPU-s':>12} {'to plain':>9}")
    for case, (files, variants) in cases.items():
        best: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "archive.tar"
            write_archive(archive, files)
            methods = {"plain loop": lambda to, archive=archive: plain(archive, to)}
            for variant in variants:
                name = " ".join(["ours", *variant.values()])
                methods[name] = lambda to, archive=archive, variant=variant: ours(archive, to, **variant)
            for _ in range(options.repeats):
                for name, method in methods.items():
                    with tempfile.TemporaryDirectory() as to:
                        begun = time.process_time()
                        method(Path(to))
                        best[name] = min(best.get(name, 1e9), time.process_time() - begun)
        for name, seconds in best.items():
            print(f"{case:20} {name:22} {len(files) / seconds:12.1f} {best['plain loop'] / seconds:9.2f}")


if __name__ == "__main__":
    main()
