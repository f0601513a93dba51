"""One image: decode, make it RGB, shrink, encode; or keep its bytes as they are; or reject it with a reason.

An image that is a baseline RGB JPEG and small enough passes byte for byte: another encoding would only lose
quality. No image is fatal. What cannot be decoded completely is rejected, and the caller counts and lists it.
"""

import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.manifest import DataPrepError
from data_prep.sources import Record

# Formats found in image sets. Left to itself PIL would also run Ghostscript on an EPS.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # PIL's own bound for a decompression bomb: 256 MiB of RGB
BASELINE = 0xC0  # JPEG's SOF0

BATCH_IMAGES = 16
BATCH_BYTES = 2 << 20  # a batch is closed at either bound, so memory does not depend on image size
BATCHES_PER_WORKER = 3


class ImageRejected(ValueError):
    """This image cannot be used; the text is the reason."""


class WorkerError(DataPrepError):
    """A worker process died (most often: out of memory)."""


@dataclass(frozen=True)
class ImagePolicy:
    """Shrink (never enlarge) the shorter side to `short_side_px` pixels; encode with JPEG `quality` 1-95."""

    short_side_px: int = 512
    quality: int = 90


class Prepared(NamedTuple):
    """An image ready to be stored; sizes in pixels. `reencoded` is False where the bytes are the source's."""

    jpeg: bytes
    width: int
    height: int
    source_width: int
    source_height: int
    reencoded: bool


class JpegFrame(NamedTuple):
    """What a JPEG's frame header says. `marker` is 0xC0 for baseline, 0xC2 for progressive."""

    marker: int
    width: int
    height: int
    components: int


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """The frame header of a JPEG, or None where there is none. Reads headers only, decodes nothing."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # those three are tables
            height, width = (
                int.from_bytes(data[at + 5 : at + 7], "big"),
                int.from_bytes(data[at + 7 : at + 9], "big"),
            )
            return JpegFrame(marker, width, height, data[at + 9])
        if marker == 0xDA:  # the scan begins: too late for a frame header
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def prepare_image(data: bytes, policy: ImagePolicy) -> Prepared:
    """Apply the policy to one image file. Raises ImageRejected with the reason where that is impossible."""
    if not data:
        raise ImageRejected("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF, odd palettes, large images: none is our user's business
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageRejected(f"{width} x {height} pixels, more than {MAX_PIXELS}")
                image.load()  # decodes everything: a truncated file fails here
                small_enough = min(width, height) <= policy.short_side_px
                if small_enough and image.format == "JPEG" and image.mode == "RGB":
                    frame = jpeg_frame(data)
                    if frame and frame.marker == BASELINE:
                        return Prepared(data, width, height, width, height, False)
                rgb = _to_rgb(image)
    except ImageRejected:
        raise
    except Image.UnidentifiedImageError:
        raise ImageRejected("not an image of a known format") from None
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error... for damaged files
        raise ImageRejected(f"damaged: {error or type(error).__name__}") from None
    if not small_enough:
        scale = policy.short_side_px / min(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    if max(rgb.size) > 65500:  # libjpeg's bound
        raise ImageRejected(f"{rgb.width} x {rgb.height} pixels: too long for a JPEG")
    rgb.info.clear()  # otherwise PIL carries comments of the source over
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=policy.quality)
    return Prepared(encoded.getvalue(), rgb.width, rgb.height, width, height, True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith(("I", "F")):
        # PIL clips 16-bit values at 255 when it converts, which makes a white image.
        values = np.asarray(image).astype(np.float64)
        if values.max(initial=0) > 255:
            values = values / 257  # 65535 -> 255
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


Outcome = tuple[str, str, Prepared | str]  # wnid, name, and the image or the reason of its rejection


def _prepare_batch(batch: list[Record], policy: ImagePolicy) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for wnid, name, data in batch:
        try:
            outcomes.append((wnid, name, prepare_image(data, policy)))
        except ImageRejected as error:
            outcomes.append((wnid, name, str(error)))
    return outcomes


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    batch_bytes = 0
    for record in records:
        batch.append(record)
        batch_bytes += len(record.data)
        if len(batch) >= BATCH_IMAGES or batch_bytes >= BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def end_with_parent() -> None:
        # A killed parent closes no queue: without this its workers would wait for work for ever.
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def prepare_all(records: Iterable[Record], policy: ImagePolicy, workers: int) -> Iterator[Outcome]:
    """Prepare a stream of images on `workers` processes (1: in this one). Outcomes come in the order of the
    records, so the result does not depend on `workers`; at most 3 batches of about 2 MiB per worker are under
    way.
    """
    if workers <= 1:
        for batch in _batches(records):
            yield from _prepare_batch(batch, policy)
        return
    pending: deque[Future[list[Outcome]]] = deque()
    # spawn: a forked worker could inherit a lock that some thread of ours (the progress bar's) holds.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        for batch in _batches(records):
            pending.append(pool.submit(_prepare_batch, batch, policy))
            if len(pending) >= BATCHES_PER_WORKER * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise WorkerError(
            f"one of the {workers} image workers was killed, probably for lack of memory: use fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
