"""The `plan` command: sample an archive, and predict images, shards, disk and hours before they are spent."""

import argparse
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.build.arguments import add_source_arguments, settings_of, sources_of
from data_prep.build.lost import RejectError, offer_of, refuse_lost_split
from data_prep.build.output import Output
from data_prep.cluster import TASKS_PER_WORKER, available_cpus
from data_prep.images.prepare import prepare_image
from data_prep.images.rejection import ImageRejected
from data_prep.sources.items import Record, Stray
from data_prep.sources.layout import is_lost_image
from data_prep.sources.streams import SourceError
from data_prep.storage import DataPrepError, number, place, refuse_unwritable, user_path
from data_prep.writer import BUILD_FOLDER, is_ours

if TYPE_CHECKING:
    from data_prep.build.shards import ShardSettings
    from data_prep.sources.chunking import Source

DESCRIPTION = """\
Read a few hundred images from all over the source (of a compressed archive: from its beginning), prepare them with
the settings given, and predict what `shard` with the same options will take. With --output, exit code 1 where the
disk there cannot hold it."""

SAMPLED_IMAGES = 400
COPY_SECONDS_PER_BYTE = 3.5e-9  # reading, hashing and writing twice, beside `prepare_image`: bench_build.py
SURE_FACTOR = 8  # free space of so many times the source needs no sample
TAR_BYTES_PER_SAMPLE = 512 + 256 + 1024 + 512 + 512  # header and padding of the image, class, header and JSON
WORK_SHARE_RECLAIMED, WORK_SHARE_KEPT = 0.1, 1.0  # of the shards' size, beside them, with and without `reclaim.py`


class DiskError(DataPrepError):
    """The disk cannot hold the data set."""


@dataclass(frozen=True)
class Estimate:
    """What a source will give. Bytes are of files; `out_error` is the standard error of `bytes_out`, relative."""

    images: int
    classes: int | None
    rejected_share: float  # of images, those of no class among them
    lost: list[str]  # images of no class that were met
    bytes_in: int
    bytes_out: int
    out_error: float
    pixels: int  # of all images as stored
    prepare_seconds: float  # on one core
    read_seconds: float  # by one reader, where only one can read
    sampled: int
    from_beginning: bool


def estimate(source: "Source", settings: "ShardSettings", images: int = SAMPLED_IMAGES) -> Estimate:
    """Sample about `images` images of the source and extrapolate. Raises SourceError when it holds none."""
    outside = source.lost_images()
    refuse_lost_split(source, outside.names)
    sizes_in: list[int] = []
    sizes_out: list[int] = []
    pixels = 0
    prepare_seconds = 0.0
    started = time.monotonic()
    lost: list[str] = []
    for item in source.sample(images):
        if isinstance(item, Stray) and is_lost_image(item.name, item.reason):
            lost.append(item.name)
            sizes_in.append(item.bytes)
            sizes_out.append(0)
        if not isinstance(item, Record):
            continue
        sizes_in.append(len(item.data))
        begun = time.process_time()
        try:
            image = prepare_image(item.data, settings.policy)
            sizes_out.append(len(image.jpeg) + TAR_BYTES_PER_SAMPLE)
            pixels += image.width * image.height
        except ImageRejected:
            sizes_out.append(0)
        prepare_seconds += time.process_time() - begun
    read_seconds = time.monotonic() - started - prepare_seconds
    if len(lost) == len(sizes_in):
        raise SourceError(f"{source.path}: no images {'of a class ' if lost else ''}found to sample")
    census = source.census()
    total = census.estimate_images(len(sizes_in), sum(sizes_in))
    scale = total / len(sizes_in)
    if settings.max_images_per_class and census.classes:
        scale = min(scale, settings.max_images_per_class * census.classes / len(sizes_in))
    in_all = scale * len(sizes_in) + outside.count
    mean = sum(sizes_out) / len(sizes_out)
    deviation = math.sqrt(sum((size - mean) ** 2 for size in sizes_out) / max(1, len(sizes_out) - 1))
    return Estimate(
        images=round(in_all),
        classes=census.classes,
        rejected_share=(sizes_out.count(0) * scale + outside.count) / in_all,
        lost=[*outside.names, *lost],
        bytes_in=census.payload_bytes,
        bytes_out=round(scale * sum(sizes_out)),
        out_error=deviation / math.sqrt(len(sizes_out)) / mean if mean else 0.0,
        pixels=round(scale * pixels),
        prepare_seconds=scale * (prepare_seconds + COPY_SECONDS_PER_BYTE * sum(sizes_in)),
        read_seconds=0.0 if source.seekable else read_seconds / sum(sizes_in) * census.payload_bytes,
        sampled=len(sizes_in),
        from_beginning=not source.seekable,
    )


def disk_bytes(estimates: list[Estimate], output: Output, *, beton_mode: str | None, workers: int) -> int:
    """Bytes that the output's disk must have free: shards, unfinished work beside them, spool, FFCV files."""
    from data_prep.build.reclaim import can_punch_holes

    shards = sum(e.bytes_out for e in estimates)
    share = WORK_SHARE_RECLAIMED if can_punch_holes(output.work) else WORK_SHARE_KEPT
    betons = {None: 0, "jpg": shards, "proportion": sum(2 * e.pixels for e in estimates)}
    beton = betons.get(beton_mode, sum(3 * e.pixels for e in estimates))
    spool = TASKS_PER_WORKER * workers * (128 << 20) if any(e.from_beginning for e in estimates) else 0
    spool = min(spool, sum(e.bytes_in for e in estimates))
    work = round(share * shards)
    # Unfinished work is gone before FFCV files are written.
    return shards + max(work + spool, beton)


def refuse_small_disk(
    sources: "list[Source]", settings: "ShardSettings", output: Output, *, beton_mode: str | None, workers: int
) -> None:
    """Raise DiskError when the disk of a local output cannot hold the data set. Looks at the source only where the
    free space is not plainly enough; what an interrupted build has there already counts as free.
    """
    if not output.folder.is_local:
        return
    free = _free_bytes(output.folder.url) + _present_bytes(output.folder.url)
    if all(source.total_bytes for source in sources):
        in_all = sum(source.total_bytes or 0 for source in sources)
        if free > SURE_FACTOR * in_all and beton_mode in (None, "jpg"):
            return
    try:
        estimates = [estimate(source, settings) for source in sources]
    except SourceError:
        return  # `shard` says better what is wrong with it
    if settings.max_images_per_class and any(found.classes is None for found in estimates):
        return  # how large the subset is shows only when all is read
    needed = disk_bytes(estimates, output, beton_mode=beton_mode, workers=workers)
    if needed > free:
        raise DiskError(
            f"{output} needs about {needed / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} GB: make room, choose "
            "another --output, a smaller --short-side, or start all the same with --ignore-disk"
        )


def _free_bytes(path: str) -> int:
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _present_bytes(path: str) -> int:
    """Of files of an interrupted build: its folder of unfinished work, and shards beside it."""
    if not os.path.exists(os.path.join(path, BUILD_FOLDER)):
        return 0
    total = 0
    for folder, _, names in os.walk(os.path.join(path, BUILD_FOLDER)):
        total += sum(_allocated_bytes(os.path.join(folder, name)) for name in names)
    return total + sum(_allocated_bytes(os.path.join(path, name)) for name in os.listdir(path) if is_ours(name))


def _allocated_bytes(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`: those of `shard` that decide its result."""
    add_source_arguments(parser)
    add = parser.add_argument_group("the prediction").add_argument
    add("--output", type=user_path, metavar="DIR", help="folder of the data set to come, to compare with its disk")
    add("--work", type=user_path, metavar="DIR", help="as for `shard`")
    add("--beton-mode", choices=("jpg", "proportion", "raw"), help="count FFCV files of this mode too")
    add("--workers", type=number(1), default=available_cpus(), metavar="N", help="processes (default: %(default)s)")
    add(
        "--sample",
        type=number(10),
        default=SAMPLED_IMAGES,
        metavar="N",
        help="images to try (default: %(default)s); more are more exact",
    )


def run(args: argparse.Namespace) -> int:
    """Print the prediction."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    settings = settings_of(args)
    output = Output(place(args.output or os.curdir, "--output"), args.work and place(args.work, "--work"))
    if args.output:
        refuse_unwritable(output.folder, "choose another --output")
    sources = sources_of(args)
    estimates = [estimate(source, settings, args.sample) for source in sources]
    needed = disk_bytes(estimates, output, beton_mode=args.beton_mode, workers=args.workers)
    table = Table(title="prediction", title_justify="left", show_header=False)
    for source, found in zip(sources, estimates, strict=True):
        where = "its beginning" if found.from_beginning else "all over it"
        table.add_row(source.split, escape(source.description))
        table.add_row("sampled", f"{found.sampled:,} images from {where}")
        table.add_row("classes", f"{found.classes:,}" if found.classes else "known when all is read")
        limited = settings.max_images_per_class and not found.classes
        table.add_row(
            "images",
            f"about {found.images:,}; {found.rejected_share:.1%} unusable"
            + (" (--max-images-per-class not counted: the classes are unknown)" if limited else ""),
        )
        low, high = (found.bytes_out * (1 + sign * 2 * found.out_error) / 1e9 for sign in (-1, 1))
        shards = -(-found.images // settings.samples_per_shard)
        table.add_row("shards", f"about {shards:,}, together {low:,.2f} to {high:,.2f} GB")
        for workers in sorted({1, args.workers, 64}):
            hours = max(found.prepare_seconds / workers, found.read_seconds) / 3600
            limit = (
                " (bound by reading the compressed archive)"
                if found.read_seconds * workers > found.prepare_seconds
                else ""
            )
            table.add_row(f"time, {workers} worker{'s' * (workers > 1)}", f"{_duration(hours)}{limit}")
    table.add_row("disk needed", f"{needed / 1e9:,.2f} GB")
    free = _free_bytes(args.output) + _present_bytes(args.output) if args.output and output.folder.is_local else None
    if free is not None:
        table.add_row("disk there", f"{free / 1e9:,.1f} GB in {args.output}")
    console.print(table)
    if free is not None and needed > free:
        console.print(f"the disk of {args.output} is too small", markup=False)
        return 1
    return _tell_of_rejects(estimates, args.max_reject)


def _tell_of_rejects(estimates: list[Estimate], max_reject: float) -> int:
    """What `shard` would end with: 3 where more than `max_reject` of the images are of no use."""
    names = [name for found in estimates for name in found.lost]
    images = max(1, sum(found.images for found in estimates))
    share = sum(found.rejected_share * found.images for found in estimates) / images
    if names:
        offer = offer_of(names)
        print(f"note: images that lie in no class, such as {names[0]}, are left out{f'; {offer}' if offer else ''}")
    if share > max_reject:
        print(
            f"error: {share:.1%} of the images are unusable: `shard` stops at --max-reject {max_reject:.1%}",
            file=sys.stderr,
        )
        return RejectError.exit_code
    return 0


def _duration(hours: float) -> str:
    for unit, factor in (("hours", 1), ("minutes", 60)):
        if hours * factor >= 1:
            return f"{hours * factor:,.1f} {unit}"
    return f"{hours * 3600:,.0f} seconds"
