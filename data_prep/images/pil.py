"""Image files of any format to RGB pixels by PIL: wide samples, ink and transparency become what they look like."""

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageChops, ImageFile

from data_prep.images.jpeg import EOI, ORIENTATION, SOI, JpegFrame, jpeg_frame
from data_prep.images.rejection import ImageRejected, words
from data_prep.images.turbo import Size

# Formats found in image sets. Left to itself PIL would also run Ghostscript on an EPS. AVIF came with Pillow 11.3.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", *(("AVIF",) if find_spec("PIL._avif") else ()))
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


def codings(frame: JpegFrame) -> set[str]:
    """What sets this JPEG apart from baseline and colour: codes of repairs."""
    return CODINGS.get(frame.marker & 0x0F, set()) | ({"gray"} if frame.components == 1 else set())


class _State:
    """PIL without its warnings (broken EXIF, odd palettes: none is our user's business), strict or not on truncated
    files. Both are states of the process: threads of one kind share them, those of the other kind wait."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.users, self.lenient = 0, False

    @contextmanager
    def __call__(self, lenient: bool = False) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.users or self.lenient == lenient)
            if not self.users:
                self.quiet = warnings.catch_warnings()
                self.quiet.__enter__()
                warnings.simplefilter("ignore")
                self.before = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = self.lenient = lenient
            self.users += 1
        try:
            yield
        finally:
            with self.changed:
                self.users -= 1
                if not self.users:
                    ImageFile.LOAD_TRUNCATED_IMAGES = self.before
                    self.quiet.__exit__(None, None, None)
                    self.changed.notify_all()


pil = _State()


def pil_size(data: bytes) -> Size:
    """(width, height) from the header alone. Raises ImageRejected."""
    with _rejecting(data), pil(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.size


def decode_png_labels(data: bytes) -> np.ndarray:
    """The numbers in a mask, uint8 (height, width): grey values, or positions in a palette. Raises ImageRejected, with
    the reason "not_8_bit" where its pixels are something else.
    """
    with _rejecting(data), pil(), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        coding = str(image.tile[0][3] if image.tile else "")
        # PIL spreads grey of 1, 2 and 4 bits over 0 to 255, which are no numbers of classes then.
        if image.mode not in ("L", "P") or (image.mode == "L" and coding != "L"):
            raise ImageRejected("not_8_bit", f"its pixels are {coding or image.mode}", *image.size)
        return np.array(image)


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
    size: list[Size] = []
    with _rejecting(data, size), pil(lenient), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        size.append(image.size)
        check_size(image.size)
        raw_mode = str(image.tile)
        image.load()
        orientation = image.getexif().get(ORIENTATION, 1) if upright else 1
        if isinstance(orientation, bytes) and len(orientation) == 1:  # a tag of the kind BYTE
            orientation = orientation[0]
        pixels = np.array(_to_rgb(image, data, raw_mode, repairs))
        return pixels, orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


@contextmanager
def _rejecting(data: bytes, size: list[Size] | None = None) -> Iterator[None]:
    """Whatever PIL raises becomes ImageRejected."""
    try:
        yield
    except (ImageRejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_large", str(error)) from None
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error... for damaged files
        if HTML.match(data[:4096]):
            raise ImageRejected("html", "a web page, not an image") from None
        reason = "truncated" if "truncated" in str(error).lower() or _ends_early(data) else "undecodable"
        unknown = isinstance(error, Image.UnidentifiedImageError)
        detail = f"no image of a known format, begins {bytes(data[:8])!r}" if unknown else words(error)
        raise ImageRejected(reason, detail, *(size[0] if size else (None, None))) from None


def _ends_early(data: bytes) -> bool:
    """Whether the container says that there should be more; of formats where PIL's words do not tell."""
    if data.startswith(SOI + b"\xff"):
        return EOI not in data
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data[4:8] == b"ftyp":  # AVIF: boxes, each begins with its length
        at = 0
        while at + 8 <= len(data):
            length = int.from_bytes(data[at : at + 4], "big")
            if length < 8:  # to the end of the file, or a length of 64 bits
                return False
            at += length
        return at != len(data)
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
