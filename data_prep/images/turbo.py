"""The one door to libjpeg-turbo's decoder: what it is asked for is decided by the file's header, before it is asked.

A lossless JPEG (SOF3) is decoded at its full size whatever scale was set. simplejpeg 1.9 makes room for the scaled
size, and the library (3.1) writes past its end: no exception, the process ends. So the coding is looked at here, and
what has no scales is asked for at full size.
"""

import re
from typing import Literal

import numpy as np
import simplejpeg

from data_prep.images.jpeg import BASELINE, JpegHeader
from data_prep.images.rejection import words

# Decoding at 1/2, 1/4, 1/8 (libjpeg-turbo's IDCT is SIMD at these only) leaves at least this many times the target to
# resize. PSNR of random crops of photographs against full decoding, least and mean: 28 and 41 dB at 1.125, 32 and 40 at
# 1.25, 35 and 43 at 1.5; tests hold the bound. Whole photographs have 36 or more; the encoding that follows in `shard`
# (quality 90) has 31 to 35 on them.
DCT_SCALES = (8, 4, 2)
DCT_MARGIN = 1.25
# Frame markers. Of blocks of coefficients, which can be decoded at a scale: baseline, extended, progressive, and the
# latter two with arithmetic coding. Hierarchical ones and lossless with arithmetic coding it does not know.
OF_BLOCKS = frozenset((BASELINE, 0xC1, 0xC2, 0xC9, 0xCA))
LOSSLESS = 0xC3
MAX_SCANS = 500  # a real progressive JPEG has about 10; each costs a pass over the image, however few its bytes
# libjpeg's warnings that mean lost pixels; the others are about stray bytes and odd headers.
LOST_DATA = re.compile(r"premature end|bad (huffman|arithmetic)|inconsistent progression|instead of RST", re.IGNORECASE)

Size = tuple[int, int]  # width, height in pixels


class TurboRefused(ValueError):
    """libjpeg-turbo was not asked, or complained: of errors, and of what it merely warns of."""


def dct_scale(ratio: float) -> int:
    """The scale to decode at, 1/scale, what is to be shrunk to 1/ratio."""
    return next((scale for scale in DCT_SCALES if ratio >= scale * DCT_MARGIN), 1)


def too_much(data: bytes, header: JpegHeader | None) -> str:
    """What no decoder may be asked for, though it might try; "" where there is nothing of that kind. `header` is None
    where it is not in order."""
    if header is not None and header.precision != 8:
        return f"a JPEG of {header.precision} bits a sample"
    few_pixels = header is not None and header.frame.width * header.frame.height <= 1 << 20
    if header is None or header.frame.marker != BASELINE or not few_pixels:  # of few: little work at any rate
        scans = data.count(b"\xff\xda")
        if scans > MAX_SCANS:
            return f"{scans} scans, more than {MAX_SCANS}"
    return ""


def refusal(data: bytes) -> str:
    """Why libjpeg-turbo's simple interface, and with it FFCV, cannot read this JPEG, as far as its header tells; ""
    where it can."""
    try:
        simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError:  # simplejpeg 1.9 has no name for 4:4:1, which libjpeg-turbo has known since 3.0
        return "an unusual subsampling of colours"
    except Exception as error:
        return words(error)
    return ""


def decode(
    data: bytes,
    header: JpegHeader,
    smallest: Size | None = None,
    colors: Literal["RGB", "GRAY"] = "RGB",
    *,
    strict: bool,
) -> np.ndarray:
    """Pixels, uint8 (height, width, 3 or 1), of a gray or coloured JPEG: at the least scale of n/8 with `smallest`
    (width, height) or more, where its coding has scales. Raises TurboRefused; of what the library warns of only if
    `strict`."""
    frame = header.frame
    if frame.marker not in OF_BLOCKS and frame.marker != LOSSLESS:
        raise TurboRefused(f"a JPEG of a rare coding (SOF{frame.marker & 0x0F})")
    if frame.components not in (1, 3):
        raise TurboRefused(f"a JPEG of {frame.components} components")
    if reason := too_much(data, header):
        raise TurboRefused(reason)
    bounds = {"min_width": smallest[0], "min_height": smallest[1]} if smallest and frame.marker in OF_BLOCKS else {}
    try:
        return simplejpeg.decode_jpeg(data, colors, strict=strict, **bounds)
    except MemoryError:
        raise
    except Exception as error:  # ValueError, and KeyError for 4:4:1
        raise TurboRefused(words(error)) from None


def decode_eighth(data: bytes, header: JpegHeader, strict: bool) -> np.ndarray:
    """Luma at 1/8, a pixel a block: decodes the entropy coding of everything, and little else. Raises TurboRefused, of
    libjpeg's warnings only if `strict`."""
    return decode(data, header, (-(-header.frame.width // 8), -(-header.frame.height // 8)), "GRAY", strict=strict)


def is_cut_short(data: bytes, header: JpegHeader) -> bool:
    """Whether the last row, of blocks or of pixels, is what libjpeg puts where there is no data: gray."""
    if header.frame.marker in OF_BLOCKS:
        pixels = decode_eighth(data, header, strict=False)
    else:  # libjpeg converts no colours of a lossless file
        pixels = decode(data, header, strict=False)
    return bool((pixels[-1] == 128).all())
