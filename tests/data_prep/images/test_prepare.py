"""One image at a time: what passes, what is repaired, what is rejected, and that nothing else can happen."""

import gzip
import io
import pickle
import struct
import warnings

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep.images import prepare
from data_prep.images.jpeg import JpegFrame, jpeg_frame, jpeg_header, metadata
from data_prep.images.pixels import decode_unpacked, resize
from data_prep.images.prepare import REPAIRS, ImagePolicy, prepare_image
from data_prep.images.rejection import REASONS, ImageRejected, words
from data_prep.images.turbo import dct_scale
from tests.support.image_kinds import (
    CUT,
    DAMAGED,
    FORMATS,
    JPEG,
    PHOTOS,
    RARE,
    SMALL,
    ask_safely,
    encoded,
    exif,
    odd_adobe,
    opened,
    orientation_of_kind,
    png_of_16_bits,
    psnr,
    rare,
    stray_bytes,
    turned_411,
    with_segment,
    without_marker,
)

DEFAULT = ImagePolicy()


@pytest.fixture(autouse=True)
def _asked_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_safely(monkeypatch)


def rejection(data: bytes, **policy) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        prepare_image(data, ImagePolicy(**policy))
    assert caught.value.reason in REASONS
    return caught.value


@pytest.mark.parametrize("check", ["decode", "structure"])
def test_good_jpegs_pass_byte_for_byte(check):
    policy = ImagePolicy(check=check)
    adobe_rgb = encoded(keep_rgb=True)
    assert jpeg_frame(JPEG) == JpegFrame(0xC0, 96, 64, 3)
    good = {
        "plain": JPEG,
        "4:4:4": encoded(subsampling=0),
        "4:1:1": encoded(subsampling="4:1:1"),
        "restart markers": encoded(restart_marker_blocks=2),
        "RGB, not YCbCr": adobe_rgb,
        "EXIF": encoded(exif=exif(6)),
        "comment": encoded(comment=b"hello"),
        "bytes after the end": JPEG + b"garbage \xff\xd9 garbage",
        "bytes before the end marker": JPEG[:-2] + b"\0\0\0" + JPEG[-2:],
        "a preview in its EXIF": with_segment(JPEG, 0xE1, exif(1) + JPEG),
        "XMP": with_segment(JPEG, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
        "fill bytes": JPEG[:2] + b"\xff\xff" + JPEG[2:],
        "exactly the short side": encoded(SMALL.resize((768, 512))),
        "several pictures": encoded(SMALL, "MPO", save_all=True, append_images=[SMALL]),
    }
    for what, data in good.items():
        out = prepare_image(data, policy)
        size = (768, 512) if "exactly" in what else (96, 64)
        assert out == (data, *size, *size, False, ()), what


def test_what_libjpeg_merely_warns_of_passes():
    stray = stray_bytes()
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(stray)
    assert prepare_image(stray, DEFAULT) == (stray, 96, 64, 96, 64, False, ())
    # An Adobe segment of an unknown kind is another warning. Here the pixels do not pass, so PIL's are taken.
    odd = odd_adobe()
    with pytest.raises(ValueError, match="Adobe"):
        simplejpeg.decode_jpeg(odd)
    assert prepare_image(odd, DEFAULT).jpeg == odd
    assert prepare_image(odd, ImagePolicy(short_side_px=32))[1:] == (48, 32, 96, 64, True, ())


@pytest.mark.parametrize("repairs", FORMATS, ids="+".join)
def test_every_format_becomes_a_baseline_rgb_jpeg(repairs):
    for policy in (DEFAULT, ImagePolicy(reencode="always"), ImagePolicy(short_side_px=32)):
        out = prepare_image(FORMATS[repairs], policy)
        size = (48, 32) if policy.short_side_px == 32 else (96, 64)
        passed = repairs == ("gzip",) and policy == DEFAULT  # only unpacked
        assert out[1:] == (*size, 96, 64, not passed, repairs)
        assert jpeg_frame(out.jpeg) == JpegFrame(0xC0, *size, 3)
        image = opened(out.jpeg)
        assert (image.mode, image.format, image.size) == ("RGB", "JPEG", size)
        if not {"gray", "palette"} & set(repairs):
            assert psnr(SMALL.resize(size, Image.Resampling.BICUBIC), image) > 25
    assert prepare_image(FORMATS[repairs], policy) == out  # the same bytes each time


def test_reencode_policies():
    large, progressive = encoded(PHOTOS[0]), encoded(progressive=True)
    for data in (large, progressive):
        out = prepare_image(data, ImagePolicy(short_side_px=32, reencode="never"))
        assert out.jpeg == data
        assert out.repairs == ()
    gray = prepare_image(encoded(PHOTOS[0].convert("L")), ImagePolicy(short_side_px=32, reencode="never"))
    assert gray[1:] == (640, 427, 640, 427, True, ("gray",))
    always = prepare_image(JPEG, ImagePolicy(reencode="always"))
    assert always[1:] == (96, 64, 96, 64, True, ())
    for values in ({"reencode": "sometimes"}, {"quality": 0}, {"check": ""}, {"short_side_px": 0}):
        with pytest.raises(ValueError, match=next(iter(values))):
            ImagePolicy(**values)


def test_rare_jpeg_codings():
    for name in ("arithmetic", "lossless", "subsampling"):
        out = prepare_image(rare(name), DEFAULT)
        assert out[1:] == (40, 40, 40, 40, True, (name,))
        assert opened(out.jpeg).getpixel((20, 30)) == pytest.approx((120, 180, 100), abs=12)
        assert prepare_image(rare(name), ImagePolicy(short_side_px=8, min_side_px=0)).width == 8
        assert prepare_image(rare(name), ImagePolicy(check="structure")) == out
    assert rejection(rare("12bit")).reason == "undecodable"
    assert "12 bits" in str(rejection(rare("12bit")))
    extended = JPEG.replace(b"\xff\xc0", b"\xff\xc1", 1)
    assert prepare_image(extended, DEFAULT).repairs == ("extended",)
    for marker in (b"\xff\xc3", b"\xff\xc5", b"\xff\xcb"):  # they promise what the data does not hold
        assert rejection(JPEG.replace(b"\xff\xc0", marker, 1)).reason == "undecodable"


COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)], np.uint8)


def test_ink_becomes_the_right_colour():
    rgb = Image.fromarray(np.repeat(np.repeat(COLOURS[None], 64, 0), 64, 1))
    ink = 255 - np.asarray(rgb)
    cmyk = np.dstack([ink - ink.min(2, keepdims=True), ink.min(2)]).astype(np.float64)
    # K takes what all three share; the multiplicative model then needs the rest spread over what K leaves.
    cmyk[..., :3] *= 255 / np.maximum(1, 255 - cmyk[..., 3:])
    ink = cmyk.round().astype(np.uint8)
    adobe = encoded(Image.fromarray(ink, "CMYK"), quality=95, subsampling=0)  # PIL inverts, and says Adobe
    assert b"Adobe" in adobe
    inverted = encoded(Image.fromarray(255 - ink, "CMYK"), quality=95, subsampling=0)
    plain = without_marker(inverted, 0xEE)
    ycck = simplejpeg.encode_jpeg(255 - ink, 95, "CMYK", "444")
    assert ycck[ycck.index(b"Adobe") + 11] == 2
    for data, repairs in ((adobe, ("cmyk",)), (plain, ("cmyk",)), (ycck, ("ycck",))):
        out = prepare_image(data, ImagePolicy(quality=95))
        assert out.repairs == repairs
        middle = np.asarray(opened(out.jpeg))[32, 32::64]
        assert np.abs(middle.astype(int) - COLOURS).max() <= 8, (repairs, middle)


def test_depth_and_transparency():
    wide = np.linspace(0, 65535, 96 * 64).reshape(64, 96)
    levels = Image.fromarray((wide / 257).round().astype(np.uint8))
    for image, fmt in (
        (Image.fromarray(wide.astype(np.uint16)), "PNG"),
        (Image.fromarray(wide.astype(np.uint16)), "PPM"),
        (Image.fromarray((wide / 65535).astype(np.float32)), "TIFF"),
        (Image.fromarray((wide * 1000).astype(np.int32)), "TIFF"),
    ):
        out = prepare_image(encoded(image, fmt), DEFAULT)
        assert out.repairs == (fmt.lower(), "16bit", "gray")
        assert psnr(levels.convert("RGB"), opened(out.jpeg)) > 40

    out = prepare_image(png_of_16_bits(np.repeat(wide.astype(np.uint16)[..., None], 3, 2)), DEFAULT)
    assert out.repairs == ("png", "16bit")
    assert psnr(levels.convert("RGB"), opened(out.jpeg)) > 40

    for colour in ((0, 0, 0, 0), (255, 0, 0, 128)):
        out = prepare_image(encoded(Image.new("RGBA", (40, 40), colour), "PNG"), DEFAULT)
        expected = (255, 255, 255) if colour[3] == 0 else (255, 127, 127)
        assert opened(out.jpeg).getpixel((20, 20)) == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = PHOTOS[0].resize((96, 64))
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes it
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    jpeg = encoded(stored, exif=exif(orientation), quality=95, subsampling=0)
    assert prepare_image(jpeg, DEFAULT) == (jpeg, *stored.size, *stored.size, False, ())
    sources = {(): jpeg} if orientation == 1 else {(): jpeg, ("png",): encoded(stored, "PNG", exif=exif(orientation))}
    for repairs, data in sources.items():
        out = prepare_image(data, ImagePolicy(exif_orientation="apply", quality=95))
        assert (out.width, out.height, out.source_width, out.source_height) == (96, 64, *stored.size)
        assert out.repairs == (repairs if orientation == 1 else (*repairs, "exif_orientation"))
        assert psnr(upright, opened(out.jpeg)) > 30
        assert opened(out.jpeg).getexif().get(0x0112, 1) in (1, orientation if orientation == 1 else 1)
    assert prepare_image(jpeg, ImagePolicy(exif_orientation="apply", short_side_px=32)).width == 48


def test_broken_exif_and_profile_are_cut_out():
    good = exif(6)
    tiff = good[6:]
    profile = struct.pack(">L", 200) + bytes(32) + b"acsp" + bytes(160)
    icc = b"ICC_PROFILE\0\x01\x01"
    count = struct.unpack_from("<H", tiff, 8)[0] if tiff[:2] == b"II" else struct.unpack_from(">H", tiff, 8)[0]
    assert count == 2
    broken_exif = {
        "not TIFF": b"Exif\0\0nonsense",
        "empty": b"Exif\0\0",
        "directory outside": good[:10] + b"\xff\xff\xff\xf0"[:: 1 if tiff[:2] == b"MM" else -1] + good[14:],
        "cut in the directory": good[:20],
        "cut in a value": good[:-20],
    }
    assert prepare_image(with_segment(JPEG, 0xE1, good), DEFAULT).repairs == ()
    assert prepare_image(with_segment(JPEG, 0xE2, icc + profile), DEFAULT).repairs == ()
    for what, payload in broken_exif.items():
        data = with_segment(JPEG, 0xE1, payload)
        for check in ("decode", "structure"):
            out = prepare_image(data, ImagePolicy(check=check, exif_orientation="apply"))
            assert out == (JPEG, 96, 64, 96, 64, False, ("broken_exif",)), what
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened(out.jpeg).getexif()
    broken_icc = [profile[:100], profile[:150], profile.replace(b"acsp", b"abcd")]
    payloads = [icc + body for body in broken_icc] + [b"ICC_PROFILE\0\x01\x02" + profile, b"ICC_PROFILE\0"]
    for payload in payloads:
        data = with_segment(with_segment(JPEG, 0xE2, payload), 0xE1, b"Exif\0\0?")
        out = prepare_image(data, DEFAULT)
        assert out == (JPEG, 96, 64, 96, 64, False, ("broken_exif", "broken_icc"))
    two = with_segment(
        with_segment(JPEG, 0xE2, b"ICC_PROFILE\0\x02\x02" + profile[90:]), 0xE2, icc[:-1] + b"\x02" + profile[:90]
    )
    assert metadata(two, jpeg_header(two)).broken == ()
    assert prepare_image(data, ImagePolicy(short_side_px=32)).repairs == ("broken_exif", "broken_icc")


def test_truncated():
    for what, data in CUT.items():
        for policy in ({}, {"reencode": "always"}, {"reencode": "never"}, {"short_side_px": 32}):
            assert rejection(data, **policy).reason == "truncated", (what, policy)
        out = prepare_image(data, ImagePolicy(truncated="keep"))
        assert out.repairs[-1] == "truncated", what
        assert opened(out.jpeg).size == ((40, 40) if "lossless" in what else (96, 64))
    assert rejection(JPEG[: len(JPEG) // 2], check="structure").reason == "truncated"
    assert (rejection(JPEG[:-900]).width, rejection(JPEG[:-900]).height) == (96, 64)
    for data in (JPEG[:300], FORMATS["png",][:20], FORMATS["webp",][:200]):  # too little to keep
        assert rejection(data).reason == rejection(data, truncated="keep").reason == "truncated"


def test_what_lost_data_in_the_middle_is_damaged():
    """PIL shows garbage and does not complain; a training run would refuse it."""
    for what, data in DAMAGED.items():
        for policy in ({}, {"reencode": "always"}, {"reencode": "never"}, {"short_side_px": 32}):
            error = rejection(data, **policy)
            assert error.reason == "damaged", (what, policy)
            assert "Corrupt JPEG data" in error.detail
        assert prepare_image(data, ImagePolicy(truncated="keep")).repairs[-1] == "truncated"


def test_reasons_are_words():
    assert words(KeyError(6)) == "KeyError: 6"
    assert words(ValueError("6")) == "ValueError: 6"
    assert words(OSError("broken\n data stream")) == "broken data stream"
    assert words(ValueError()) == "ValueError"


def test_441_is_as_good_as_any():
    out = prepare_image(turned_411(), DEFAULT)
    assert out[1:] == (96, 64, 96, 64, True, ("subsampling",))
    assert psnr(opened(turned_411()), opened(out.jpeg)) > 25


@pytest.mark.parametrize("kind", [1, 3, 4, 6, 8, 9])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_an_integer_of_any_kind(kind, order):
    """As Pillow, OpenCV and torchvision take it, though the standard says SHORT."""
    policy = ImagePolicy(exif_orientation="apply", min_side_px=0)
    for orientation in range(1, 9):
        data = orientation_of_kind(kind, orientation, order)
        assert metadata(data, jpeg_header(data)) == (orientation, ())
    out = prepare_image(orientation_of_kind(kind, 6, order), policy)
    assert (out.width, out.height, out.repairs) == (64, 96, ("exif_orientation",))
    exif = Image.open(io.BytesIO(orientation_of_kind(kind, 6, order))).info["exif"]
    png = prepare_image(encoded(SMALL, "PNG", exif=exif), policy)
    assert (png.width, png.height) == (64, 96)


def test_reasons():
    zeros, page = bytes(5000), b"\xef\xbb\xbf \n<!-- a --> <!DOCTYPE html>\n<html>not found</html>"
    for data, reason in (
        (b"", "empty"),
        (gzip.compress(b""), "empty"),
        (page, "html"),
        (b"<HTML><head>", "html"),
        (gzip.compress(page), "html"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "undecodable"),
        (zeros, "undecodable"),
        (b"\xff\xd8\xff", "truncated"),
        (b"junk before" + JPEG, "undecodable"),
        (gzip.compress(gzip.compress(JPEG)), "undecodable"),
        (gzip.compress(JPEG)[:-8] + bytes(8), "undecodable"),  # a wrong checksum
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "undecodable"),
        (encoded(SMALL.resize((31, 90))), "too_small"),
        (encoded(SMALL.resize((90, 31)), "PNG"), "too_small"),
        (encoded(Image.new("1", (10_000, 9_000)), "PNG"), "too_large"),
        (encoded(Image.new("1", (20_000, 10_000)), "PNG"), "too_large"),  # where PIL itself raises
        (encoded(Image.new("1", (65_501, 40)), "PNG"), "too_long"),
        (encoded(Image.new("L", (65_500, 40))).replace(b"\0\x28\xff\xdc", b"\0\x28\xff\xff"), "too_long"),
    ):
        error = rejection(data)
        assert error.reason == reason, (data[:20], error)
        assert error.detail
        again = pickle.loads(pickle.dumps(error))  # from a worker process
        assert (again.reason, again.detail, again.width, str(again)) == (
            error.reason,
            error.detail,
            error.width,
            str(error),
        )
    small = rejection(encoded(SMALL.resize((31, 90))))
    assert (small.width, small.height) == (31, 90)
    tiny = prepare_image(encoded(SMALL.resize((1, 1))), ImagePolicy(min_side_px=0))
    assert (tiny.width, tiny.height, tiny.repairs) == (1, 1, ())
    assert prepare_image(encoded(Image.new("1", (65_500, 40)), "PNG"), DEFAULT).width == 65_500


def test_bombs_are_refused_at_once(monkeypatch):
    monkeypatch.setattr("data_prep.images.pixels.MAX_UNPACKED_BYTES", 1 << 20)
    bomb = gzip.compress(bytes(8 << 20))
    assert rejection(bomb).reason == "too_large"
    assert "more than 1048576 bytes" in rejection(bomb).detail
    progressive = encoded(progressive=True)
    scan = progressive.rindex(b"\xff\xda")
    scans = progressive[:scan] + progressive[scan:-2] * 600 + b"\xff\xd9"
    assert "scans" in rejection(scans).detail
    header = bytearray(JPEG)
    at = header.index(b"\xff\xc0")
    header[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    for name in ("decode_unpacked", "decodes_cleanly"):
        monkeypatch.setattr(prepare, name, None)  # nothing of it is decoded
    assert rejection(bytes(header)).reason == "too_large"


@pytest.mark.parametrize(("scale", "bound"), [(2, 36), (4, 37), (8, 37)])
def test_scaled_decoding_is_close_to_full_decoding(scale, bound):
    """Against PIL: full decoding, bicubic. At the least margin, where the scaled picture is smallest."""
    for photo in PHOTOS:
        for size in ((640, 427), (637, 421), (960, 640)):  # also sizes that the scale does not divide
            data = encoded(photo.resize(size), quality=92)
            short = int(min(size) / (1.25 * scale))
            policy = ImagePolicy(short_side_px=short, quality=95, min_side_px=0)
            out = prepare_image(data, policy)
            full = opened(data).resize((out.width, out.height), Image.Resampling.BICUBIC)
            pixels = _decoded_by_turbo(data, (out.width, out.height))
            assert psnr(full, pixels) >= bound, (size, psnr(full, pixels))
            assert out.height == short
            assert abs(out.width - size[0] * short / size[1]) <= 0.5


def _decoded_by_turbo(data: bytes, target: tuple[int, int]) -> np.ndarray:
    header = jpeg_header(data)
    size = (header.frame.width, header.frame.height)
    found = decode_unpacked(data, header, dct_scale(min(size) / min(target)))
    assert found.pixels.shape[0] < header.frame.height  # it was scaled
    return resize(found.pixels, size, target)


def test_resize_is_pils_bicubic():
    data = encoded(PHOTOS[1], quality=92)
    out = prepare_image(data, ImagePolicy(short_side_px=300, quality=90))
    expected = opened(data).resize((450, 300), Image.Resampling.BICUBIC)
    theirs = encoded(expected, quality=90)
    assert psnr(opened(theirs), opened(out.jpeg)) > 45
    assert psnr(expected, opened(out.jpeg)) > psnr(expected, opened(theirs)) - 0.1
    assert 0.98 < len(out.jpeg) / len(theirs) < 1.02


def mutated(rng: np.random.Generator, sources: list[bytes]) -> bytes:
    data = bytearray(sources[rng.integers(len(sources))])
    for _ in range(rng.integers(1, 4)):
        # Half of it in the header, where most can go wrong.
        at = int(rng.integers(min(len(data), 700) if rng.random() < 0.5 else len(data)))
        kind = rng.integers(5)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.choice([0x00, 0xFF, 0xD8, 0xD9, 0xDA, 0xC0, 0xC4, 0x7F, int(rng.integers(256))]))
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 32)))
        else:
            del data[max(1, at) :]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_thousand_mutated_files(seed):
    tiny = PHOTOS[seed % 2].resize((48, 40))
    sources = [
        encoded(tiny),
        encoded(tiny, exif=exif(6), restart_marker_blocks=2),
        encoded(tiny, progressive=True),
        encoded(tiny.convert("L")),
        encoded(tiny.convert("CMYK")),
        encoded(tiny, "PNG"),
        encoded(tiny.quantize(32), "PNG", transparency=3),
        encoded(tiny.quantize(32), "GIF"),
        encoded(tiny, "BMP"),
        encoded(tiny, "WEBP"),
        encoded(tiny, "TIFF", compression="tiff_lzw"),
        gzip.compress(encoded(tiny)),
        *(rare(name) for name in RARE),
    ]
    jpegs = sources[:3] * 3  # what most files are
    rng = np.random.default_rng(seed)
    policies = [
        DEFAULT,
        ImagePolicy(reencode="always", short_side_px=16, exif_orientation="apply", min_side_px=0),
        ImagePolicy(truncated="keep", min_side_px=0),
        ImagePolicy(reencode="never", truncated="keep", min_side_px=0),
    ]
    ends: dict[str, int] = {}
    for number in range(1000):
        data = mutated(rng, jpegs + sources)
        try:
            out = prepare_image(data, policies[number % 4])
        except ImageRejected as error:
            ends[error.reason] = ends.get(error.reason, 0) + 1
            continue
        assert list(out.repairs) == [code for code in REPAIRS if code in out.repairs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = opened(out.jpeg)
        assert (image.mode, image.size) == ("RGB", (out.width, out.height))
        assert out.reencoded or number % 4 != 1
        ends["kept"] = ends.get("kept", 0) + 1
    assert set(ends) <= {"kept", *REASONS}
    assert ends["kept"] > 200
    assert ends["undecodable"] > 50
    assert ends["truncated"] > 50
