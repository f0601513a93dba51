"""What an image file looks like: RGB pixels, the same for `shard`, training, evaluation, `verify` and `duplicates`.

libjpeg-turbo for the JPEGs it takes (turbo.py), PIL for everything else (pil.py), which also judges what libjpeg warns
of. The training reader has a faster way for ordinary JPEGs, with these pixels (pipeline/data/decode.py).
"""

import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.images.jpeg import SOI, JpegHeader, jpeg_header
from data_prep.images.pil import codings, decode_pil, pil_size
from data_prep.images.rejection import ImageRejected
from data_prep.images.turbo import (
    LOST_DATA,
    Size,
    TurboRefused,
    decode,
    decode_eighth,
    is_cut_short,
    too_much,
)

MAX_PIXELS = 89_478_485  # PIL's own bound for a decompression bomb: 256 MiB of RGB
MAX_UNPACKED_BYTES = 3 * MAX_PIXELS  # of a gzip member: an uncompressed image of that bound


def bomb(size: Size) -> None:
    """Where PIL refuses a decompression bomb. Raises ImageRejected."""
    width, height = size
    if width * height > 2 * MAX_PIXELS:
        raise ImageRejected("too_large", f"{width} x {height} pixels, more than {2 * MAX_PIXELS}", width, height)


class Decoded(NamedTuple):
    """`pixels` uint8 (height, width, 3) RGB of a picture of `size` (width, height) at 1/`scale`; `orientation` is
    EXIF's, 1 to 8. `warning`: why libjpeg-turbo's were not taken. `repairs`: what sets the file apart."""

    pixels: np.ndarray
    size: Size
    scale: int
    orientation: int
    repairs: set[str]
    warning: str = ""


def decode_image(data: bytes, scale: int = 1) -> Decoded:
    """The pixels of any image file, for a reader; at 1/scale (of DCT_SCALES) where that can be. Raises
    ImageRejected."""
    data, _ = unpacked(data, keep_truncated=False)
    return decode_unpacked(data, jpeg_header(data), scale)


def image_size(data: bytes) -> Size:
    """(width, height) of any image file, from the header alone. Raises ImageRejected."""
    data, _ = unpacked(data, keep_truncated=False)
    header = jpeg_header(data)
    return pil_size(data) if header is None else (header.frame.width, header.frame.height)


def unpacked(data: bytes, keep_truncated: bool) -> tuple[bytes, bool]:
    """The bytes of the image, and whether they were in a gzip file. Raises ImageRejected."""
    packed = data[:3] == b"\x1f\x8b\x08"
    if packed:
        data = unpack_gzip(data, keep_truncated)
    if not data:
        raise ImageRejected("empty", "no bytes")
    return data, packed


def unpack_gzip(data: bytes, keep_truncated: bool) -> bytes:
    """The bytes in a gzip file, no more than MAX_UNPACKED_BYTES. Raises ImageRejected."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        inner = unpacker.decompress(data, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise ImageRejected("undecodable", f"gzip: {error}") from None
    if unpacker.unconsumed_tail:
        raise ImageRejected("too_large", f"gzip: more than {MAX_UNPACKED_BYTES} bytes unpacked")
    if not unpacker.eof and not keep_truncated:
        raise ImageRejected("truncated", "gzip: the stream ends early")
    return inner


def decode_unpacked(
    data: bytes,
    header: JpegHeader | None,
    scale: int = 1,
    check_size: Callable[[Size], object] = bomb,
    keep_truncated: bool = False,
    upright: bool = False,
) -> Decoded:
    """As decode_image, of a file that is not gzipped and whose JPEG header is known, None for what has none in order.

    `check_size` sees the size before anything is decoded, and may raise; `keep_truncated` takes what there is of a file
    that ends early. The orientation is 1 unless `upright`, or libjpeg-turbo decoded. Raises ImageRejected.
    """
    found: set[str] = set()
    if header is None:
        if data[:2] == SOI and (reason := too_much(data, None)):
            raise ImageRejected("undecodable", reason)
        pixels, orientation = decode_pil(data, found, check_size, keep_truncated, upright)
        return Decoded(pixels, (pixels.shape[1], pixels.shape[0]), 1, orientation, found)
    frame = header.frame
    size = (frame.width, frame.height)
    check_size(size)
    if reason := too_much(data, header):
        raise ImageRejected("undecodable", reason, *size)
    try:
        pixels = decode(data, header, (-(-size[0] // scale), -(-size[1] // scale)), strict=True)
        scale = 1 if pixels.shape[:2] == (frame.height, frame.width) else scale  # lossless ones have no scale
        return Decoded(pixels, size, scale, 1, codings(frame))
    except TurboRefused as error:  # warnings too: libjpeg's do not tell a stray byte from a lost half
        warning = str(error)
    pixels, orientation = decode_pil(data, found, check_size, keep_truncated, upright)
    if LOST_DATA.search(warning) and "truncated" not in found:  # PIL does not complain, and shows gray or garbage
        if not keep_truncated:
            if _ends_in_gray(data, header):
                raise ImageRejected("truncated", "its end marker comes before the picture is complete", *size)
            raise ImageRejected("damaged", warning, *size)
        found.add("truncated")
    return Decoded(pixels, size, 1, orientation, found, warning)


def _ends_in_gray(data: bytes, header: JpegHeader) -> bool:
    try:
        return is_cut_short(data, header)
    except TurboRefused:
        return False


def decodes_cleanly(data: bytes, header: JpegHeader) -> bool:
    """Whether a JPEG decodes without a warning. False does not yet mean that it is bad.

    Entropy decoding is 0.47 of its 0.56 ms: no cheap check is complete, so `structure` is a choice of the user's.
    """
    try:
        decode_eighth(data, header, strict=True)
        # PIL's own parser is who reads it in the end, and it is strict in other ways.
        return pil_size(data) == (header.frame.width, header.frame.height)
    except (TurboRefused, ImageRejected):
        return False


def check_image(data: bytes) -> Size:
    """(width, height) of an image file that decodes to its end. Raises ImageRejected."""
    data, _ = unpacked(data, keep_truncated=False)
    header = jpeg_header(data)
    if header is not None and not too_much(data, header) and decodes_cleanly(data, header):
        return header.frame.width, header.frame.height
    return decode_unpacked(data, header).size


def gray_pixels(data: bytes, smallest_px: int) -> np.ndarray:
    """Luma, uint8 (height, width), for hashing: of a JPEG at the least scale with both sides `smallest_px` or more, and
    what there is of a damaged one. Raises ImageRejected."""
    data, _ = unpacked(data, keep_truncated=True)
    header = jpeg_header(data)
    if header is not None:
        bomb((header.frame.width, header.frame.height))
        with suppress(TurboRefused):
            return decode(data, header, (smallest_px, smallest_px), "GRAY", strict=False)[:, :, 0]
    pixels = decode_unpacked(data, header, keep_truncated=True).pixels
    return np.asarray(Image.fromarray(pixels).convert("L"))


def resize(pixels: np.ndarray, source: Size, target: Size) -> np.ndarray:
    """PIL's bicubic (antialiased, uint8), of pixels that show a `source` at full size or at a DCT scale."""
    import torch  # seconds and 200 MB that a data set of small images does not need

    height, width = pixels.shape[:2]
    scale = round(source[0] / width)
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels_last, no copy
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there is a worker for each core
    try:
        if (width * scale, height * scale) == source:
            out = torch.nn.functional.interpolate(batch, target[::-1], mode="bicubic", antialias=True)
        else:
            # The last pixels of a DCT scale lie partly outside of the picture. To resize by the ratio of the pixel
            # counts would shift everything by a fraction of a pixel, and cost 8 dB: the factor is given instead.
            factors = [want * scale / have * (1 + 1e-9) for want, have in zip(target[::-1], source[::-1], strict=True)]
            out = torch.nn.functional.interpolate(batch, scale_factor=factors, mode="bicubic", antialias=True)
            out = out[:, :, : target[1], : target[0]]
    finally:
        torch.set_num_threads(threads)
    return out[0].permute(1, 2, 0).numpy()
