"""JPEG bytes to the pixels that training asks for: a region, or a random crop resized to a square.

The compiled half (`_jpeg.c`) leaves out the inverse DCT, upsampling and colour conversion of all but the region, reads
nothing below it, and has a resampler of its own: next to torch's kernel after the same decoding it gives 1.05 to 1.1
times the throughput (1.3 where torch cannot take a scaled decode), with the GIL released once and pixels that are
PIL's to the bit. Per CPU second, random-resized crops of JPEGs of 500 x 500 and 70 kB at 224 and at 384: 1.76 and 1.63
times FFCV's full decode and area resize; 1.33 and 1.33 times simplejpeg's full decode and torch's resize, which is what
runs where the compiled half is missing; of 1000 x 1000 and 200 kB, 2.3 and 2.0 times FFCV. What is left is entropy
decoding, about three quarters of decoding a region: it has to go through all that lies above.
"""

from __future__ import annotations

import importlib
import re
from io import BytesIO
from types import ModuleType
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image

_jpeg: ModuleType | None
try:
    _jpeg = importlib.import_module("pipeline.data._jpeg")
except ImportError:  # no compiler or no headers when it was installed: slower, and off by 1
    _jpeg = None
COMPILED: bool = _jpeg is not None

# Decoding at 1/2, 1/4, 1/8 (libjpeg-turbo's IDCT is SIMD at these only) leaves at least this many times the target to
# resize. PSNR against full decoding, least and mean over crops of photographs: 28 and 41 dB at 1.125, 32 and 40 at
# 1.25, 35 and 43 at 1.5; a test holds the bound.
DCT_SCALES = (8, 4, 2)
DCT_MARGIN = 1.25

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # left to itself PIL would run Ghostscript on an EPS
MAX_SIDE = 65_535  # of a JPEG
MAX_PIXELS = 2 * 89_478_485  # where PIL refuses a decompression bomb
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# libjpeg's warnings that mean lost pixels; the others are about stray bytes and odd headers.
LOST_DATA = re.compile(r"premature end|bad (huffman|arithmetic)|inconsistent progression|instead of RST", re.IGNORECASE)

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class DecodeError(ValueError):
    """The data are not an image that can be decoded. The message is the reason, in one line."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone. Raises DecodeError."""
    if COMPILED and _jpeg is not None:
        size = _jpeg.size(data)
        if size is not None:
            return size
    with _open(data) as image:
        return image.height, image.width


def decode_rgb(data: bytes) -> np.ndarray:
    """The whole image, uint8 (height, width, 3) RGB; any format that PIL reads. Raises DecodeError."""
    return decode_region(data, 0, 0, *image_size(data))


def decode_region(data: bytes, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A region of the image, uint8 (height, width, 3) RGB: the pixels of PIL's `convert("RGB")`, cut out.

    Where COMPILED, only what the region needs is decoded: damage below it goes unseen. Raises DecodeError for lost data
    above it or beside it, and for all else that cannot be decoded; ValueError for a region that is not inside of the
    image.
    """
    box = (top, left, height, width)
    if COMPILED and _jpeg is not None and 0 <= min(box) <= max(box) <= MAX_SIDE and 0 < height * width <= MAX_PIXELS:
        out = np.empty((height, width, 3), np.uint8)
        if _succeeded(_jpeg.region(data, out, *box)):
            return out
    pixels, _ = _whole(data, 1)
    _check(box, *pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def crop_resize(
    data: bytes,
    box: Box,
    size: int,
    out: np.ndarray | None = None,
    flip: bool = False,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    scaled: bool = True,
) -> np.ndarray:
    """The region `box` resized with antialiasing to uint8 (size, size, 3) RGB, mirrored left to right with `flip`.

    The pixels are those of PIL's crop and resize: bit for bit where COMPILED; elsewhere off by 1, seldom by 2 or 3.
    With `scaled` a region of at least 2 * DCT_MARGIN times `size` is decoded at 1/2, 1/4 or 1/8: PSNR against the
    unscaled is then 32 dB or more on photographs sharp to the pixel, 40 in the mean. Damage below the region goes
    unseen. Written into `out`, C-contiguous uint8 (size, size, 3), where given; `out` is returned, and undefined after
    an error.

    Thread-safe; the GIL is released for all of it. Raises DecodeError and ValueError as `decode_region` does, and
    ValueError for an `out` of another shape or kind.
    """
    top, left, height, width = box
    if size < 1:
        raise ValueError(f"size is {size}; it has to be 1 or more")
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    elif out.shape != (size, size, 3) or out.dtype != np.uint8 or not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(
            f"out is {out.dtype} {out.shape}; it has to be C-contiguous, writeable uint8 ({size}, {size}, 3)"
        )
    room = min(height, width) / (size * DCT_MARGIN) if scaled else 0
    scale = next((scale for scale in DCT_SCALES if room >= scale), 1)
    # Taller than 100 to 1, and only then, PIL resizes downwards first.
    if COMPILED and _jpeg is not None and 0 <= min(box) <= max(box) <= MAX_SIDE and height <= 100 * width:
        bicubic = interpolation == "bicubic"
        if _succeeded(_jpeg.crop_resize(data, out, top, left, height, width, size, scale, bicubic, flip)):
            return out
    if min(box) < 0:
        _check(box, *image_size(data))
    pixels, scale = _whole(data, scale, box)
    # As the compiled decoder does: whole pixels of the scaled image around the region, and the region's place in them.
    first_row, first_column = top // scale, left // scale
    end_row, end_column = -(-(top + height) // scale), -(-(left + width) // scale)
    pixels = pixels[first_row:end_row, first_column:end_column]
    if scale == 1 and not COMPILED:
        batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels_last, for torch's fast kernel
        batch = torch.nn.functional.interpolate(batch, (size, size), mode=interpolation, antialias=True)
        resized = batch[0].permute(1, 2, 0).numpy()
    else:  # torch takes no fractions of a pixel
        y, x = top / scale - first_row, left / scale - first_column
        place = (x, y, x + width / scale, y + height / scale)
        resized = np.asarray(Image.fromarray(pixels).resize((size, size), RESAMPLING[interpolation], place))
    out[:] = resized[:, ::-1] if flip else resized
    return out


def _succeeded(failure: tuple[int, str] | None) -> bool:
    """Whether the compiled decoder wrote its pixels; False where the file is for another decoder. Raises."""
    if failure is None:
        return True
    assert _jpeg is not None
    kind, reason = failure
    if kind == _jpeg.CORRUPT:
        raise DecodeError(reason)
    if kind == _jpeg.OUTSIDE:
        raise ValueError(reason)
    return False


def _check(box: Box, image_height: int, image_width: int) -> None:
    top, left, height, width = box
    if min(top, left, height - 1, width - 1) < 0 or top + height > image_height or left + width > image_width:
        raise ValueError(
            f"region (top, left, height, width) {box} is not inside of the image of {image_height} x {image_width}"
        )


def _whole(data: bytes, scale: int, box: Box | None = None) -> tuple[np.ndarray, int]:
    """RGB pixels (height, width, 3) of the whole image at 1/scale where that can be, and the scale that it is at."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, LookupError):  # the latter for an unusual subsampling
        colors = ""
    if colors in ("Gray", "YCbCr", "RGB") and height * width <= MAX_PIXELS:
        if box:
            _check(box, height, width)
        smallest = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", **smallest)
            return pixels, 1 if pixels.shape[:2] == (height, width) else scale  # a lossless file does not scale
        except (ValueError, LookupError) as error:
            if LOST_DATA.search(str(error)):
                raise DecodeError(str(error)) from None
    with _open(data) as image:
        try:
            pixels = np.array(image.convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error... for damaged files
            raise DecodeError(_one_line(error)) from None
    if box:
        _check(box, *pixels.shape[:2])
    return pixels, 1


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise DecodeError(f"no image of a known format, begins {bytes(data[:8])!r}") from None
    except Exception as error:
        raise DecodeError(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
