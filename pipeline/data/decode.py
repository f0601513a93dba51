"""JPEG bytes to the pixels that training asks for: a region, or a random crop resized to a square.

The compiled half (`_jpeg.c`) takes ordinary JPEGs: baseline and progressive, gray and colour. It leaves out the inverse
DCT, upsampling and colour conversion of all but the region, reads nothing below it, has Huffman decoding (`_huffman.h`)
and a resampler of its own, and releases the GIL once; its pixels are PIL's to the bit. Everything else, and whatever is
odd in an ordinary file, goes through the function that all readers share (data_prep/images/pixels.py).

Per CPU second, random-resized crops of JPEGs of 500 x 500 and 65 kB at 224 and at 384: 1.87 and 1.42 times FFCV's full
decode and area resize; 1.44 and 1.46 times simplejpeg's full decode and torch's resize. What is left is entropy
decoding, two fifths of the time, and resizing, a third: what lies above and beside a region has to be gone through.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import Image

from data_prep.images.pixels import MAX_PIXELS, decode_image
from data_prep.images.pixels import image_size as size_of_any
from data_prep.images.rejection import ImageRejected
from data_prep.images.turbo import dct_scale

_jpeg: ModuleType | None
try:
    _jpeg = importlib.import_module("pipeline.data._jpeg")
except ImportError:  # no compiler or no headers when it was installed: slower, and off by 1
    _jpeg = None
COMPILED: bool = _jpeg is not None

MAX_SIDE = 65_535  # of a JPEG
MOST_PIXELS = 2 * MAX_PIXELS  # where PIL refuses a decompression bomb
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class DecodeError(ValueError):
    """The data are not an image that can be decoded. The message is the reason, in one line."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone. Raises DecodeError."""
    if COMPILED and _jpeg is not None:
        size = _jpeg.size(data)
        if size is not None:
            return size
    try:
        width, height = size_of_any(data)
    except ImageRejected as error:
        raise DecodeError(_one_line(error)) from None
    return height, width


def decode_rgb(data: bytes) -> np.ndarray:
    """The whole image, uint8 (height, width, 3) RGB, as `shard` sees it; of any format. Raises DecodeError."""
    return decode_region(data, 0, 0, *image_size(data))


def decode_region(data: bytes, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A region of the image, uint8 (height, width, 3) RGB: the pixels of PIL's `convert("RGB")`, cut out.

    Where COMPILED, only what the region needs is decoded: damage below it goes unseen. Raises DecodeError for lost data
    above it or beside it, and for all else that `shard` would reject; ValueError for a region that is not inside of the
    image.
    """
    box = (top, left, height, width)
    if COMPILED and _jpeg is not None and 0 <= min(box) <= max(box) <= MAX_SIDE and 0 < height * width <= MOST_PIXELS:
        out = np.empty((height, width, 3), np.uint8)
        if _succeeded(_jpeg.region(data, out, *box)):
            return out
    pixels, _ = _whole(data, box)
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
    With `scaled` a region of at least 2.5 times `size` is decoded at 1/2, 1/4 or 1/8: PSNR against the
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
    scale = dct_scale(min(height, width) / size) if scaled else 1
    # Taller than 100 to 1, and only then, PIL resizes downwards first.
    if COMPILED and _jpeg is not None and 0 <= min(box) <= max(box) <= MAX_SIDE and height <= 100 * width:
        bicubic = interpolation == "bicubic"
        if _succeeded(_jpeg.crop_resize(data, out, top, left, height, width, size, scale, bicubic, flip)):
            return out
    if min(box) < 0:
        _check(box, *image_size(data))
    pixels, scale = _whole(data, box, scale)
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
    """Whether the compiled decoder wrote its pixels; False where the file is for the other one. Raises ValueError."""
    if failure is None:
        return True
    assert _jpeg is not None
    kind, reason = failure
    if kind == _jpeg.OUTSIDE:
        raise ValueError(reason)
    return False


def _check(box: Box, image_height: int, image_width: int) -> None:
    top, left, height, width = box
    if min(top, left, height - 1, width - 1) < 0 or top + height > image_height or left + width > image_width:
        raise ValueError(
            f"region (top, left, height, width) {box} is not inside of the image of {image_height} x {image_width}"
        )


def _whole(data: bytes, box: Box, scale: int = 1) -> tuple[np.ndarray, int]:
    """RGB pixels (height, width, 3) of the whole image at 1/scale where that can be, and the scale that it is at."""
    try:
        found = decode_image(data, scale)
    except ImageRejected as error:
        raise DecodeError(_one_line(error)) from None
    _check(box, *found.size[::-1])
    return found.pixels, found.scale


def _one_line(error: ImageRejected) -> str:
    return " ".join(str(error).split())
