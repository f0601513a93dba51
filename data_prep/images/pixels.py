"""Image files to RGB pixels: libjpeg-turbo for the JPEGs it takes, PIL for everything else; and resizing."""

import io
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, ImageChops, ImageFile

from data_prep.images.jpeg import EOI, SOI, JpegFrame, JpegHeader, jpeg_frame

# Formats found in image sets. Left to itself PIL would also run Ghostscript on an EPS.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # PIL's own bound for a decompression bomb: 256 MiB of RGB
MAX_UNPACKED_BYTES = 3 * MAX_PIXELS  # of a gzip member: an uncompressed image of that bound

# Decoding at 1/2, 1/4, 1/8 (libjpeg-turbo's IDCT is SIMD at these only) takes a quarter less time at 1/2. Left with
# 1.25 times the target or more to resize, PSNR against full decoding is 36 dB or more on photos sharp to the pixel, 40
# to 44 in the mean; the encoding that follows (quality 90) has 31 to 35 on the same photos.
DCT_SCALES = (8, 4, 2)
DCT_MARGIN = 1.25

REASONS = ("empty", "html", "truncated", "too_small", "too_large", "too_long", "undecodable")
HTML = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<\?xml.*?>\s*|<!--.*?-->\s*)*<(!doctype\s+html|html|head|body|title|script|meta)\b",
    re.IGNORECASE | re.DOTALL,
)
# Codings other than baseline, by the number of their frame header (SOFn).
CODINGS = {
    1: {"extended"},
    2: {"progressive"},
    3: {"lossless"},
    9: {"arithmetic"},
    10: {"arithmetic", "progressive"},
    11: {"arithmetic", "lossless"},
}

Size = tuple[int, int]  # width, height in pixels


class ImageRejected(ValueError):
    """This image cannot be used: `reason` is one of REASONS, `detail` free text, sizes are the source's or None."""

    def __init__(self, reason: str, detail: str, width: int | None = None, height: int | None = None) -> None:
        super().__init__(reason, detail, width, height)  # all of them, or it could not be pickled
        self.reason, self.detail, self.width, self.height = reason, detail, width, height

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


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


def codings(frame: JpegFrame) -> set[str]:
    """What sets this JPEG apart from baseline and colour: codes of repairs."""
    return CODINGS.get(frame.marker & 0x0F, set()) | ({"gray"} if frame.components == 1 else set())


def turbo_refusal(data: bytes) -> str:
    """Why libjpeg-turbo, and with it FFCV, cannot read this JPEG, as far as its header tells; "" where it can."""
    try:
        simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError as error:
        return str(error)
    return ""


def decode_turbo(data: bytes, header: JpegHeader, target: Size) -> tuple[np.ndarray | None, str]:
    """RGB pixels (height, width, 3) at full size or at a DCT scale well above `target`; or None, and why not."""
    width, height = header.frame.width, header.frame.height
    if header.frame.components not in (1, 3):
        return None, ""
    ratio = 1.0 if "lossless" in codings(header.frame) else min(width, height) / min(target)
    scale = next((scale for scale in DCT_SCALES if ratio >= scale * DCT_MARGIN), 1)
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_width=-(-width // scale), min_height=-(-height // scale)), ""
    except ValueError as error:  # warnings too: libjpeg's do not tell a stray byte from a lost half
        return None, str(error)


def decode_eighth(data: bytes, size: Size, strict: bool) -> np.ndarray:
    """Luma at 1/8, a pixel a block: decodes the entropy coding of everything, and little else. `strict` raises
    ValueError for libjpeg's warnings too."""
    return simplejpeg.decode_jpeg(data, "GRAY", min_width=-(-size[0] // 8), min_height=-(-size[1] // 8), strict=strict)


def decodes_cleanly(data: bytes, size: Size) -> bool:
    """Whether a JPEG decodes without a warning. False does not yet mean that it is bad.

    Entropy decoding is 0.47 of its 0.56 ms: no cheap check is complete, so `structure` is a choice of the user's.
    """
    try:
        decode_eighth(data, size, strict=True)
        with _pil():  # PIL's own parser is who reads it in the end, and it is strict in other ways
            return Image.open(io.BytesIO(data), formats=FORMATS).size == size
    except Exception:
        return False


def is_cut_short(data: bytes, size: Size) -> bool:
    """Whether the last row of blocks is what libjpeg puts where there is no data: gray."""
    return bool((decode_eighth(data, size, strict=False)[-1] == 128).all())


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


_PIL_STATE = threading.Lock()


@contextmanager
def _pil(lenient: bool = False) -> Iterator[None]:
    """PIL without its warnings (broken EXIF, odd palettes: none is our user's business), strict or not on truncated
    files. Both are states of the process, hence the lock."""
    with _PIL_STATE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, lenient
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_pil(
    data: bytes, repairs: set[str], check_size: Callable[[Size], object], keep_truncated: bool, upright: bool
) -> tuple[np.ndarray, int]:
    """RGB pixels (height, width, 3) of an image of any format, and its EXIF orientation (1 unless `upright`).

    Adds the codes of what was repaired to `repairs`. `check_size` sees the size before anything is decoded, and may
    raise. Raises ImageRejected.
    """
    try:
        return _load(data, repairs, check_size, upright, lenient=False)
    except ImageRejected as error:
        if error.reason != "truncated" or not keep_truncated:
            raise
    repairs.add("truncated")
    return _load(data, repairs, check_size, upright, lenient=True)


def _load(
    data: bytes, repairs: set[str], check_size: Callable[[Size], object], upright: bool, lenient: bool
) -> tuple[np.ndarray, int]:
    size: Size | tuple[None, None] = (None, None)
    try:
        with _pil(lenient), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            check_size(image.size)
            raw_mode = str(image.tile)
            image.load()
            orientation = image.getexif().get(0x0112, 1) if upright else 1
            pixels = np.array(_to_rgb(image, data, raw_mode, repairs))
            return pixels, orientation if orientation in range(1, 9) else 1
    except ImageRejected:
        raise
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_large", str(error)) from None
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error... for damaged files
        if HTML.match(data[:4096]):
            raise ImageRejected("html", "a web page, not an image") from None
        reason = "truncated" if "truncated" in str(error).lower() or _ends_early(data) else "undecodable"
        unknown = isinstance(error, Image.UnidentifiedImageError)
        detail = f"no image of a known format, begins {data[:8]!r}" if unknown else str(error) or type(error).__name__
        raise ImageRejected(reason, detail, *size) from None


def _ends_early(data: bytes) -> bool:
    """Whether the container says that there should be more; of formats where PIL's words do not tell."""
    if data.startswith(SOI + b"\xff"):
        return EOI not in data
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return False


def _to_rgb(image: Image.Image, data: bytes, raw_mode: str, repairs: set[str]) -> Image.Image:
    mode = image.mode
    if image.format in ("JPEG", "MPO"):
        frame = jpeg_frame(data)
        repairs |= codings(frame) if frame else set()
        if mode == "CMYK":
            repairs.add("ycck" if image.info.get("adobe_transform") == 2 else "cmyk")
            if "adobe" not in image.info:  # PIL takes all ink as inverted, which only Adobe's files are
                return ImageChops.invert(image).convert("RGB")
    else:
        repairs.add(str(image.format).lower())
        if mode == "CMYK":
            repairs.add("cmyk")
    wide = mode.startswith(("I", "F"))
    if wide or re.search(r";16[BLN]", raw_mode):
        repairs.add("16bit")
    if mode in ("P", "PA"):
        repairs.add("palette")
    if wide or mode in ("1", "L", "LA", "La"):
        repairs.add("gray")
    if wide:
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        repairs.add("alpha")
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Gray of 16 or 32 bits or floating point to uint8; PIL would clip at 255, which makes a white image."""
    gray = np.nan_to_num(values.astype(np.float32), posinf=1)
    top = float(gray.max(initial=0))
    if top <= 1 and values.dtype.kind == "f":  # the convention of floating point: 0 to 1
        gray = gray * 255
    elif top > 255:
        gray = gray * (255 / max(top, 65535))
    return gray.clip(0, 255).round().astype(np.uint8)
