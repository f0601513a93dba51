"""One image file, however dirty, to a clean RGB JPEG: its own bytes where they are good, else repaired, or rejected.

A baseline RGB JPEG that is small enough passes byte for byte: another encoding would only lose quality. The rest is
decoded and encoded by libjpeg-turbo (scaled in the DCT where much is thrown away) and resized by torch's uint8 kernel,
which gives PIL's bicubic pixels, off by at most 1, in a sixth of the time. PIL decodes what turbo does not take, and
judges what it warns of. No image is fatal: one that cannot be used raises ImageRejected with a reason, nothing else.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg

from data_prep.images.jpeg import BASELINE, JpegHeader, is_closed, jpeg_header, metadata, without
from data_prep.images.pixels import MAX_PIXELS, Decoded, decode_unpacked, decodes_cleanly, resize, unpacked
from data_prep.images.rejection import ImageRejected, words
from data_prep.images.turbo import Size, dct_scale, refusal, too_much

MAX_SIDE_PX = 65_500  # libjpeg's bound
ANY_DECODER = (BASELINE, 0xC1, 0xC2)  # baseline, extended, progressive

# In the order in which `Prepared.repairs` lists them.
REPAIRS = (
    *("gzip", "png", "bmp", "gif", "webp", "tiff", "ppm", "avif", "cmyk", "ycck", "palette", "alpha", "16bit", "gray"),
    *("extended", "arithmetic", "lossless", "progressive", "subsampling"),  # JPEGs that not every decoder takes
    *("exif_orientation", "broken_exif", "broken_icc", "truncated"),
)
CHOICES = {
    "reencode": ("never", "when-resized", "always"),
    "truncated": ("reject", "keep"),
    "exif_orientation": ("ignore", "apply"),
    "check": ("decode", "structure"),
}
# EXIF orientation -> the picture upright; (height, width, 3) arrays.
UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@dataclass(frozen=True)
class ImagePolicy:
    """What becomes of an image. Sizes in pixels, `quality` JPEG's 1 to 95. ValueError for any other value."""

    short_side_px: int = 512  # shrink only
    quality: int = 90
    reencode: str = "when-resized"  # never (nothing is shrunk) | when-resized | always
    truncated: str = "reject"  # reject | keep
    min_side_px: int = 32  # shorter side below: rejected; 0 keeps all
    exif_orientation: str = "ignore"  # ignore (pixels as ImageNet's users see them) | apply
    check: str = "decode"  # of images that pass as they are. decode: entropy-decode all | structure: markers only

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {', '.join(allowed)}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}: choose 1 to 95")
        if self.short_side_px < 1 or self.min_side_px < 0:
            raise ValueError(f"short_side_px {self.short_side_px} must be 1 or more, min_side_px {self.min_side_px} 0")


class Prepared(NamedTuple):
    """A JPEG ready to be stored; sizes in pixels. `reencoded` is False where its scan is the source's; `repairs` are
    codes of REPAIRS, in that order."""

    jpeg: bytes
    width: int
    height: int
    source_width: int
    source_height: int
    reencoded: bool
    repairs: tuple[str, ...]


def prepare_image(data: bytes, policy: ImagePolicy) -> Prepared:
    """Apply the policy to one image file. Raises ImageRejected, whatever is wrong with it."""
    try:
        return _prepare(data, policy)
    except ImageRejected:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        raise ImageRejected("undecodable", words(error)) from None


def _prepare(data: bytes, policy: ImagePolicy) -> Prepared:
    repairs: set[str] = set()
    data, packed = unpacked(data, policy.truncated == "keep")
    if packed:
        repairs.add("gzip")
    header = jpeg_header(data)
    if header is not None:
        return _prepare_jpeg(data, header, policy, repairs)
    found = _decode(data, None, policy)
    return _encode(found.pixels, found.size, found.orientation, policy, repairs | found.repairs)


def _prepare_jpeg(data: bytes, header: JpegHeader, policy: ImagePolicy, repairs: set[str]) -> Prepared:
    frame = header.frame
    size = (frame.width, frame.height)
    target = _target(size, policy)
    if reason := too_much(data, header):
        raise ImageRejected("undecodable", reason, *size)
    orientation, broken = metadata(data, header)
    if policy.exif_orientation == "ignore":
        orientation = 1
    if broken:
        repairs |= {code for code, _ in broken}
        data = without(data, [segment for _, segment in broken])
        header = jpeg_header(data) or header
    refused = refusal(data)
    if "subsampling" in refused:
        repairs.add("subsampling")
    passes = (
        not refused
        and policy.reencode != "always"
        and frame.marker in (ANY_DECODER if policy.reencode == "never" else (BASELINE,))
        and (frame.components, orientation, target) == (3, 1, size)
    )
    if passes and (is_closed(data, header) if policy.check == "structure" else decodes_cleanly(data, header)):
        return _prepared(data, size, size, False, repairs)
    found = _decode(data, header, policy, dct_scale(min(size) / min(target)))
    if not found.warning:
        return _encode(found.pixels, size, orientation, policy, repairs | found.repairs)
    if passes and "truncated" not in found.repairs:  # PIL takes it: turbo's warning was of something that does no harm
        return _prepared(data, size, size, False, repairs)
    return _encode(found.pixels, size, found.orientation, policy, repairs | found.repairs)


def _decode(data: bytes, header: JpegHeader | None, policy: ImagePolicy, scale: int = 1) -> Decoded:
    return decode_unpacked(
        data,
        header,
        scale,
        check_size=lambda size: _target(size, policy),
        keep_truncated=policy.truncated == "keep",
        upright=policy.exif_orientation == "apply",
    )


def _target(size: Size, policy: ImagePolicy) -> Size:
    """The (width, height) to store for a source of this size. Raises ImageRejected for a size out of bounds."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageRejected("too_large", f"{width} x {height} pixels, more than {MAX_PIXELS}", width, height)
    if min(size) < max(1, policy.min_side_px):
        raise ImageRejected("too_small", f"{width} x {height} pixels", width, height)
    if policy.reencode != "never" and min(size) > policy.short_side_px:
        scale = policy.short_side_px / min(size)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if max(size) > MAX_SIDE_PX:
        raise ImageRejected("too_long", f"{width} x {height} pixels; a JPEG holds {MAX_SIDE_PX}", width, height)
    return size


def _encode(pixels: np.ndarray, source: Size, orientation: int, policy: ImagePolicy, repairs: set[str]) -> Prepared:
    """Resize, set upright and encode (height, width, 3) uint8 pixels that show `source`, maybe at a DCT scale."""
    target = _target(source, policy)
    if (pixels.shape[1], pixels.shape[0]) != target:
        pixels = resize(pixels, source, target)
    if orientation != 1:
        pixels = UPRIGHT[orientation](pixels)
        repairs = repairs | {"exif_orientation"}
    # As PIL does by default: baseline, chroma at half size, the standard's tables. Turbo's faster DCT costs 0.05 dB.
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), policy.quality, "RGB", "420")
    return _prepared(jpeg, (pixels.shape[1], pixels.shape[0]), source, True, repairs)


def _prepared(jpeg: bytes, size: Size, source: Size, reencoded: bool, repairs: set[str]) -> Prepared:
    return Prepared(jpeg, *size, *source, reencoded, tuple(code for code in REPAIRS if code in repairs))
