"""Image files of every kind that image sets hold: good ones, odd ones, broken ones. By name, 96 x 64 pixels mostly."""

import base64
import gzip
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.images.jpeg import jpeg_frame, jpeg_header

# 40x40, red = 6 x, green = 6 y, blue = 100, by libjpeg-turbo 3.1: arithmetic coding, lossless (SOF3), 12 bits,
# and sampling factors of 2x1, 1x1, 2x1.
RARE = {
    "arithmetic": (
        "c-s4a<NpH&0WUXCHwH#V1_nkTWcYuZ!I?pTn}?5wOMs7;Pe@QeSVBWeLQG7;P+3)0!^+s!#?sir+`%Kp&%q_!)!ZT=H!wUtDLo_I&bP3#Af+"
        "NEH9Z+*2&15okc6m&zLb=HvXg~VGRffoNd`d<1`P%cW=16jCP7AKLB{`Q7`PY&1Xvjb1X=&zV&GwB1WGUqGT1ZxXPDEGX_$J@mzCdhQ#W@{r"
        "}F&5XGgE4eLwr?@`N8eaVvh$RIXL)Ne+&*E6V7fZ&mfDD`dO9VTG9HnTWZQ%yv&bqFCX?o1Yets{G>oe+J2_nzzsGeVN*ha6jCl{l?4T|4jh"
        "lSz~w"
    ),
    "lossless": (
        "c-s4a<NrGbKF5^&q*R6!1`zmvm_d+(L4!eqIY^MfU68>^km3Ik25|;PAYecS%p9!$Z!z#N2Qj!aI57a_&j0++(4KU(TTCZnBOWSpRLQ84Q6-"
        "~FMwL)c$^V-GVDwtk"
    ),
    "12bit": (
        "c-s4a<NpH&0WUXCHwH#V1_nkTWcYuZ!I?pTn}?5wOMs7;Pe@QeSVBWeLQG7;P+3)0!^+s!#?sir+`%Kp&%q_!)!ZT=H!wUtDLo_I&bP3#Af+"
        "NEH9Z+*2&15okc6m&zLb=HvXg~VGRffoK?Xq{1`P%cW=16jCP7AKLB{__7{q~21vwT0*cmvufD)1d42-M{D1eP!#b_Z=N{W$ziHR9S4<`#3D"
        ";oz;PFawFk(r5&nGso=5=$T>6RWbJv9O}5=>J;`JV0qCL1sY)dxpn*<*r<^<IDKAY~qJJ_pK)V&9iJ*E~&A$b$U>29GgB@Zs!d_u<#_1u=K^"
        "ZzRC}t^=D<uGibFQc$S<6Rv`dV(UPZ99qjSLA!_e|d&iQ^Ja^fftDMmSDP=bSNti3&n&p1*EXX>6D|+n48cFA^Y>PK2AgNdkSHTd<-FW8MC4"
        ">r&J02h>Hf*hK+}m?3Z*oapp685EgxfpLtSDV|zDQ%=d5!FE&l67~$uNOsq=Ri1uD?CE9c+_}L)8ALHJ_6eXRBN>{m(FaQu_a!08%i%eg"
    ),
    "subsampling": (
        "c-s4a<NpH&0WUXCHwH#V1_nkTWcYuZ!I?pTn}?5wOMs7;Pe@QeSVBWeLQG7;P+3)0!^+s!#?sir+`%Kp&%q_!)!ZT=H!wUtDLo_I&bP3#Af+"
        "NEH9Z+*2&15okc6m&zLb=HvXg~VGRffo0R}-11`P%cW=2H@CP7AKMaKU}7{q~21vwT0m{}OuKoSDz5)4eti9iWSMhHNNvoJHTF|h)r!~`+4F"
        "fjhV#lXYN2(*z|kinke@nYp;{)?tQuuMEJsnOH!l~8neo>5AvH{TV(iH}t$?U?Yi-6my`k)vkfX}*e+6RsLq2e`TSO!s=kJWbXmrQ$@%GIkx"
        "y$7=2&8{Rrf${9U68RJoOctuaYq{5U9&)98JPGn7!U7@ThIO%1K1ITEb6sut7X)+%tE3b+u+yDP205F|%j{"
    ),
}
PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]  # 640 x 427, real
SMALL = PHOTOS[0].resize((96, 64))


def rare(name: str) -> bytes:
    return zlib.decompress(base64.b85decode(RARE[name]))


def encoded(image: Image.Image = SMALL, fmt: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def opened(jpeg: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(jpeg))
    image.load()
    return image


def psnr(a, b) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))))


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    """The JPEG with one more segment after its JFIF one."""
    end = jpeg_header(jpeg).segments[0].end
    return jpeg[:end] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + jpeg[end:]


def without_marker(jpeg: bytes, marker: int) -> bytes:
    (segment,) = [s for s in jpeg_header(jpeg).segments if s.marker == marker]
    return jpeg[: segment.begin] + jpeg[segment.end :]


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    data[0x010F] = "a maker with a name of more than four bytes"
    return data.tobytes()


JPEG = encoded(quality=90)
# By the repairs that they need.
FORMATS = {
    ("png",): encoded(SMALL, "PNG"),
    ("bmp",): encoded(SMALL, "BMP"),
    ("webp",): encoded(SMALL, "WEBP"),
    ("avif",): encoded(SMALL, "AVIF"),
    ("tiff",): encoded(SMALL, "TIFF"),
    ("ppm",): encoded(SMALL, "PPM"),
    ("gif", "palette"): encoded(SMALL.quantize(64), "GIF"),
    ("png", "palette"): encoded(SMALL.quantize(64), "PNG"),
    ("png", "palette", "alpha"): encoded(SMALL.quantize(64), "PNG", transparency=0),
    ("png", "alpha"): encoded(SMALL.convert("RGBA"), "PNG"),
    ("png", "alpha", "gray"): encoded(SMALL.convert("LA"), "PNG"),
    ("png", "gray"): encoded(SMALL.convert("1"), "PNG"),
    ("tiff", "cmyk"): encoded(SMALL.convert("CMYK"), "TIFF"),
    ("tiff", "16bit", "gray"): encoded(SMALL.convert("F"), "TIFF"),
    ("webp", "alpha"): encoded(Image.merge("RGBA", (*SMALL.split(), Image.new("L", (96, 64), 250))), "WEBP"),
    ("cmyk",): encoded(SMALL.convert("CMYK")),
    ("gray",): encoded(SMALL.convert("L")),
    ("progressive",): encoded(progressive=True),
    ("gray", "progressive"): encoded(SMALL.convert("L"), progressive=True),
    ("gzip",): gzip.compress(JPEG),
    ("gzip", "png", "alpha"): gzip.compress(encoded(SMALL.convert("RGBA"), "PNG")),
    ("gzip", "gray", "progressive"): gzip.compress(encoded(SMALL.convert("L"), progressive=True)),
}


def orientation_of_kind(kind: int, orientation: int, order: str = ">") -> bytes:
    """The JPEG with EXIF whose orientation is an integer of a TIFF type other than SHORT."""
    form = order + {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}[kind]
    value = struct.pack(form, orientation).ljust(4, b"\0")
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LHHHL", 8, 1, 0x0112, kind, 1) + value
    return with_segment(JPEG, 0xE1, b"Exif\0\0" + tiff + bytes(4))


def turned_411() -> bytes:
    """4:4:1, what a 4:1:1 file becomes when it is rotated without loss; here the same blocks in another order."""
    jpeg = bytearray(simplejpeg.encode_jpeg(np.asarray(SMALL), 90, "RGB", "411"))
    (frame,) = [s.begin for s in jpeg_header(bytes(jpeg)).segments if s.marker == 0xC0]
    assert jpeg[frame + 11] == 0x41
    jpeg[frame + 11] = 0x14
    return bytes(jpeg)


def png_of_16_bits(colour: np.ndarray) -> bytes:
    """A PNG of 3 x 16 bits, uint16 (height, width, 3), which PIL cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))

    height, width, _ = colour.shape
    rows = b"".join(b"\0" + row.tobytes() for row in colour.astype(">u2"))
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def lost_data(jpeg: bytes) -> bytes:
    """Without some of its data, as the number of a restart marker shows: libjpeg warns, PIL does not."""
    return jpeg.replace(b"\xff\xd1", b"\xff\xd5", 1)


def stray_bytes() -> bytes:
    jpeg = encoded(restart_marker_blocks=3)
    at = jpeg.index(b"\xff\xd0")
    return jpeg[:at] + b"\x12\x34\x56" + jpeg[at:]


def odd_adobe() -> bytes:
    """An Adobe segment of an unknown kind."""
    return without_marker(with_segment(JPEG, 0xEE, b"Adobe" + bytes(6) + b"\x07"), 0xE0)


INK = np.asarray(SMALL.convert("CMYK"))
WIDE = np.linspace(0, 65535, 96 * 64).reshape(64, 96)
HALF_SEEN = Image.merge("RGBA", (*SMALL.split(), Image.linear_gradient("L").resize((96, 64))))
HTML = b"\xef\xbb\xbf \n<!-- a --> <!DOCTYPE html>\n<html>not found</html>"
RESTARTS = encoded(restart_marker_rows=1)
PROGRESSIVE = encoded(progressive=True)


def ask_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale asked of a coding that has none fails the test before it reaches the library, which might end the run."""
    library = simplejpeg.decode_jpeg

    def decode_jpeg(data: bytes, *args: Any, **options: Any) -> np.ndarray:
        frame = jpeg_frame(data)
        if frame is None or frame.marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
            assert not {"min_height", "min_width", "min_factor"} & set(options), "asked for a scale"
            assert len(args) <= 1, "asked for a scale"
        return library(data, *args, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)


GOOD: dict[str, bytes] = {
    **{"+".join(repairs): data for repairs, data in FORMATS.items()},
    **{name: rare(name) for name in RARE if name != "12bit"},
    "plain": JPEG,
    "4:4:4": encoded(subsampling=0),
    "4:2:2": encoded(subsampling=1),
    "4:1:1": simplejpeg.encode_jpeg(np.asarray(SMALL), 90, "RGB", "411"),
    "4:4:0": simplejpeg.encode_jpeg(np.asarray(SMALL), 90, "RGB", "440"),
    "4:4:1": turned_411(),
    "restart markers": encoded(restart_marker_blocks=2),
    "RGB, not YCbCr": encoded(keep_rgb=True),
    "EXIF": encoded(exif=exif(6)),
    "EXIF with a LONG": orientation_of_kind(4, 6),
    "broken EXIF": with_segment(JPEG, 0xE1, b"Exif\0\0nonsense"),
    "broken profile": with_segment(JPEG, 0xE2, b"ICC_PROFILE\0"),
    "comment": encoded(comment=b"hello"),
    "bytes after the end": JPEG + b"garbage \xff\xd9 garbage",
    "bytes before the end marker": JPEG[:-2] + b"\0\0\0" + JPEG[-2:],
    "a preview in its EXIF": with_segment(JPEG, 0xE1, exif(1) + JPEG),
    "fill bytes": JPEG[:2] + b"\xff\xff" + JPEG[2:],
    "several pictures": encoded(SMALL, "MPO", save_all=True, append_images=[SMALL]),
    "stray bytes": stray_bytes(),
    "odd Adobe segment": odd_adobe(),
    "extended": JPEG.replace(b"\xff\xc0", b"\xff\xc1", 1),
    "16 bits gray, PNG": encoded(Image.fromarray(WIDE.astype(np.uint16)), "PNG"),
    "16 bits gray, PPM": encoded(Image.fromarray(WIDE.astype(np.uint16)), "PPM"),
    "16 bits gray, TIFF": encoded(Image.fromarray(WIDE.astype(np.uint16)), "TIFF"),
    "32 bits gray, TIFF": encoded(Image.fromarray((WIDE * 1000).astype(np.int32)), "TIFF"),
    "float of 0 to 1, TIFF": encoded(Image.fromarray((WIDE / 65535).astype(np.float32)), "TIFF"),
    "16 bits of colour, PNG": png_of_16_bits(np.repeat(WIDE.astype(np.uint16)[..., None], 3, 2)),
    "CMYK without Adobe's marker": without_marker(encoded(Image.fromarray(255 - INK, "CMYK")), 0xEE),
    "YCCK": simplejpeg.encode_jpeg(INK, 90, "CMYK", "444"),
    "half transparent, PNG": encoded(HALF_SEEN, "PNG"),
    "half transparent, WebP": encoded(HALF_SEEN, "WEBP"),
    "half transparent, AVIF": encoded(HALF_SEEN, "AVIF"),
    "half transparent, TIFF": encoded(HALF_SEEN, "TIFF"),
    "half transparent gray, PNG": encoded(HALF_SEEN.convert("LA"), "PNG"),
    "transparent palette, GIF": encoded(SMALL.quantize(64), "GIF", transparency=3),
    "transparent colour, PNG": encoded(SMALL, "PNG", transparency=SMALL.getpixel((5, 5))),
    "one bit, TIFF": encoded(SMALL.convert("1"), "TIFF"),
    "lossless WebP": encoded(SMALL, "WEBP", lossless=True),
    "two frames, GIF": encoded(SMALL.quantize(8), "GIF", save_all=True, append_images=[SMALL.rotate(90).quantize(8)]),
    "EXIF, PNG": encoded(SMALL, "PNG", exif=exif(6)),
    "one pixel": encoded(SMALL.resize((1, 1))),
    "large": encoded(PHOTOS[0]),
    "large, progressive": encoded(PHOTOS[1], progressive=True),
    "large, PNG": encoded(PHOTOS[1], "PNG"),
}
# `--truncated keep` keeps them.
CUT: dict[str, bytes] = {
    "jpeg": JPEG[: len(JPEG) // 2],
    "jpeg with an end marker": JPEG[: len(JPEG) // 2] + b"\xff\xd9",
    "restart": RESTARTS[: len(RESTARTS) // 2] + b"\xff\xd9",
    "progressive": PROGRESSIVE[:1000],
    "no end marker": JPEG[:-2],
    "lossless": rare("lossless")[:700],
    "lossless with an end marker": rare("lossless")[:700] + b"\xff\xd9",
    "lossless without end marker": rare("lossless")[:-2],
    "4:4:1": turned_411()[:1500],
    "png": FORMATS["png",][:3000],
    "gif": FORMATS["gif", "palette"][:2000],
    "bmp": FORMATS["bmp",][:5000],
    "gzip": gzip.compress(JPEG)[:1500],
}
DAMAGED: dict[str, bytes] = {
    "lost data": lost_data(RESTARTS),
    "lost data, progressive": lost_data(encoded(restart_marker_rows=1, progressive=True)),
}
BAD: dict[str, bytes] = {
    **{f"cut {name}": data for name, data in CUT.items()},
    **DAMAGED,
    "empty": b"",
    "html": HTML,
    "html in gzip": gzip.compress(HTML),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zeros": bytes(5000),
    "three bytes": b"\xff\xd8\xff",
    "junk before": b"junk before" + JPEG,
    "gzip twice": gzip.compress(gzip.compress(JPEG)),
    "wrong checksum": gzip.compress(JPEG)[:-8] + bytes(8),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n",
    "12 bits": rare("12bit"),
    "cut AVIF": FORMATS["avif",][:900],
    **{f"SOF{marker & 15}": JPEG.replace(b"\xff\xc0", bytes((0xFF, marker)), 1) for marker in (0xC3, 0xC5, 0xCB)},
    "hundreds of scans": PROGRESSIVE[:-2] + PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2] * 600 + b"\xff\xd9",
}
