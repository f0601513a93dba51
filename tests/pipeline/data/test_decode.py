"""Decoding for the loader: PIL's pixels, from no more of the file than they need; errors; damaged files; threads."""

from __future__ import annotations

import importlib.util
import io
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.images.turbo import DCT_MARGIN
from pipeline.data import decode
from pipeline.data.decode import DecodeError, crop_resize, decode_region, decode_rgb, image_size

PHOTOS = [np.ascontiguousarray(photo) for photo in load_sample_images().images]  # 427 x 640 each
needs_compiled = pytest.mark.skipif(not decode.COMPILED, reason="pipeline.data._jpeg is not built")

Encoder = Callable[[np.ndarray, random.Random], bytes]


@pytest.fixture(params=[pytest.param(True, marks=needs_compiled, id="compiled"), pytest.param(False, id="fallback")])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(decode, "COMPILED", request.param)
    return request.param


def pil_jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def pil(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_pil(subsampling: int, **options: Any) -> Encoder:
    return lambda pixels, rng: pil_jpeg(pixels, quality=rng.choice([30, 90, 100]), subsampling=subsampling, **options)


def by_turbo(subsampling: str) -> Encoder:
    return lambda pixels, rng: simplejpeg.encode_jpeg(
        pixels, quality=rng.choice([30, 90, 100]), colorsubsampling=subsampling
    )


KINDS: dict[str, Encoder] = {
    "444": by_pil(0),
    "422": by_pil(1),
    "420": by_pil(2),
    "440": by_turbo("440"),
    "411": by_turbo("411"),
    "optimized": by_pil(2, optimize=True),  # Huffman tables of its own
    "noise": lambda pixels, rng: pil_jpeg(  # codes of all lengths
        np.frombuffer(rng.randbytes(pixels.size), np.uint8).reshape(pixels.shape), quality=100, subsampling=0
    ),
    "gray": lambda pixels, rng: pil_jpeg(pixels[..., 1]),
    "rgb": lambda pixels, rng: pil_jpeg(pixels, keep_rgb=True),
    "progressive-444": by_pil(0, progressive=True),
    "progressive-422": by_pil(1, progressive=True),
    "progressive-420": by_pil(2, progressive=True),
    "progressive-gray": lambda pixels, rng: pil_jpeg(pixels[..., 1], progressive=True),
    "restarts-by-row": by_pil(2, restart_marker_rows=1),
    "restarts-by-block": lambda pixels, rng: pil_jpeg(pixels, subsampling=1, restart_marker_blocks=rng.randint(1, 9)),
    "progressive-restarts": by_pil(2, restart_marker_rows=2, progressive=True),
}


def random_photo(rng: random.Random) -> np.ndarray:
    height, width = (rng.choice([rng.randint(1, 40), rng.randint(1, most)]) for most in (427, 640))
    top, left = rng.randint(0, 427 - height), rng.randint(0, 640 - width)
    return np.ascontiguousarray(rng.choice(PHOTOS)[top : top + height, left : left + width])


def random_box(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    rows, columns = (rng.choice([rng.randint(1, n), rng.randint(1, min(n, 9)), n]) for n in (height, width))
    return rng.randint(0, height - rows), rng.randint(0, width - columns), rows, columns


def cut(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def pil_resize(pixels: np.ndarray, size: int, interpolation: str, flip: bool) -> np.ndarray:
    resized = np.asarray(Image.fromarray(pixels).resize((size, size), decode.RESAMPLING[interpolation]))
    return resized[:, ::-1] if flip else resized


def off_by(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - two).max())


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - two) ** 2), 1e-9)))


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_pils_pixels(kind: str, compiled: bool) -> None:
    rng = random.Random(kind)
    for _ in range(25 if compiled else 5):
        data = KINDS[kind](random_photo(rng), rng)
        whole = pil(data)
        assert image_size(data) == whole.shape[:2]
        np.testing.assert_array_equal(decode_rgb(data), whole)
        for _ in range(10 if compiled else 3):
            box = random_box(rng, *whole.shape[:2])
            np.testing.assert_array_equal(decode_region(data, *box), cut(whole, box), f"{box} of {whole.shape}")


@needs_compiled
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_decoder_takes_them_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_whole", None)
    data = KINDS[kind](PHOTOS[0], random.Random(0))
    crop_resize(data, (50, 60, 300, 333), 32)
    assert decode_region(data, 70, 80, 90, 100).shape == (90, 100, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_resized_as_by_pil(kind: str, compiled: bool) -> None:
    rng = random.Random(kind)
    for _ in range(12 if compiled else 4):
        data = KINDS[kind](random_photo(rng), rng)
        whole = pil(data)
        for size in (1, rng.randint(2, 40), rng.randint(41, 300)):
            box, flip, interpolation = (
                random_box(rng, *whole.shape[:2]),
                rng.random() < 0.5,
                rng.choice(["bicubic", "bilinear"]),
            )
            got = crop_resize(data, box, size, None, flip, interpolation, scaled=False)
            expected = pil_resize(cut(whole, box), size, interpolation, flip)
            assert off_by(got, expected) <= (0 if compiled else 3), f"{box} of {whole.shape} to {size}, {interpolation}"
            assert np.mean(np.abs(got.astype(int) - expected) > 1) < 0.01


@needs_compiled
def test_scaled_decoding_is_the_same_without_the_compiled_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for kind, encode in KINDS.items():
        data = encode(PHOTOS[1], rng)
        for _ in range(6):
            box, flip = random_box(rng, 427, 640), rng.random() < 0.5
            size = max(1, int(min(box[2:]) / rng.uniform(2.5, 12)))
            if min(box[2:]) < 2 * DCT_MARGIN * size:
                continue
            monkeypatch.setattr(decode, "COMPILED", True)
            one = crop_resize(data, box, size, flip=flip)
            monkeypatch.setattr(decode, "COMPILED", False)
            np.testing.assert_array_equal(one, crop_resize(data, box, size, flip=flip), f"{kind} {box} to {size}")


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scaled_decoding_keeps_its_bound(scale: int, compiled: bool) -> None:
    rng = random.Random(scale)
    found = []
    for photo in PHOTOS:
        data = pil_jpeg(photo)
        for _ in range(20):
            size = rng.randint(16, int(427 / scale / DCT_MARGIN))
            side = -int(-scale * DCT_MARGIN * size // 1)  # the least that is decoded so: the worst
            box = (rng.randint(0, 427 - side), rng.randint(0, 640 - side), side, side)
            found.append(psnr(crop_resize(data, box, size), crop_resize(data, box, size, scaled=False)))
    assert min(found) >= 32
    assert np.mean(found) >= 36  # at the margin; 40 over all crops that are decoded at a scale
    assert min(found) < 60, "nothing was scaled"


def test_regions_much_taller_than_wide(compiled: bool) -> None:
    data = pil_jpeg(PHOTOS[0])
    box = (0, 100, 427, 2)  # PIL resizes downwards first
    expected = pil_resize(cut(pil(data), box), 50, "bicubic", False)
    assert off_by(crop_resize(data, box, 50, scaled=False), expected) <= (0 if compiled else 3)


def test_written_into_a_row_of_a_batch(compiled: bool) -> None:
    data = pil_jpeg(PHOTOS[0])
    for size in (1, 5, 224):
        batch = np.full((3, size, size, 3), 7, np.uint8)
        assert crop_resize(data, (3, 5, 211, 300), size, batch[1]) is not None
        np.testing.assert_array_equal(batch[1], crop_resize(data, (3, 5, 211, 300), size))
        assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize(
    "out",
    [np.empty((8, 9, 3), np.uint8), np.empty((8, 8, 3), np.int8), np.empty((8, 8, 6), np.uint8)[..., ::2]],
    ids=["shape", "type", "strides"],
)
def test_out_of_another_kind(out: np.ndarray, compiled: bool) -> None:
    with pytest.raises(ValueError, match="it has to be C-contiguous"):
        crop_resize(pil_jpeg(PHOTOS[0]), (0, 0, 9, 9), 8, out)


@pytest.mark.parametrize(
    "box", [(-1, 0, 9, 9), (0, -1, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0), (400, 0, 28, 9), (0, 0, 9, 641)]
)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_regions_outside_of_the_image(box: tuple[int, int, int, int], form: str, compiled: bool) -> None:
    file = io.BytesIO()
    Image.fromarray(PHOTOS[0]).save(file, form)
    for call in (lambda: decode_region(file.getvalue(), *box), lambda: crop_resize(file.getvalue(), box, 8)):
        with pytest.raises(ValueError, match="is not inside of the image of 427 x 640") as caught:
            call()
        assert not isinstance(caught.value, DecodeError)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "GIF", "CMYK"])
def test_other_formats_are_pils(form: str, compiled: bool) -> None:
    file = io.BytesIO()
    image = Image.fromarray(PHOTOS[0])
    image.convert("CMYK").save(file, "JPEG") if form == "CMYK" else image.save(file, form)
    data, box = file.getvalue(), (50, 60, 300, 200)
    whole = pil(data)
    assert image_size(data) == (427, 640)
    np.testing.assert_array_equal(decode_rgb(data), whole)
    np.testing.assert_array_equal(decode_region(data, *box), cut(whole, box))
    assert off_by(crop_resize(data, box, 64, flip=True), pil_resize(cut(whole, box), 64, "bicubic", True)) <= 1


def test_progressive_file_without_its_last_scans(compiled: bool) -> None:
    """libjpeg then guesses at coefficients from the neighbours: only a whole decode sees those of the border."""
    data = pil_jpeg(PHOTOS[0], progressive=True)
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    data = data[: scans[2]] + b"\xff\xd9"
    box = (40, 50, 60, 70)
    np.testing.assert_array_equal(decode_region(data, *box), cut(pil(data), box))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"not an image at all", b"<html></html>", b"\xff\xd8\xff\xe0" * 9])
def test_not_an_image(data: bytes, compiled: bool) -> None:
    for call in (image_size, decode_rgb, lambda data: crop_resize(data, (0, 0, 1, 1), 8)):
        with pytest.raises(DecodeError) as caught:
            call(data)
        assert str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.03, 0.5, 0.99, -2])
def test_truncated(kept: float, progressive: bool, compiled: bool) -> None:
    """The last lacks no pixel, only the end marker: PIL refuses it too."""
    data = pil_jpeg(PHOTOS[0], progressive=progressive)
    data = data[: int(kept) if kept < 0 else int(len(data) * kept)]
    with pytest.raises(OSError, match="truncated"):
        pil(data)
    for call in (decode_rgb, lambda data: crop_resize(data, (400, 0, 27, 640), 8)):
        with pytest.raises(DecodeError):
            call(data)


@needs_compiled
def test_damage_below_the_region_goes_unseen() -> None:
    data = pil_jpeg(PHOTOS[0])
    half, box = data[: len(data) // 2], (10, 20, 60, 300)
    np.testing.assert_array_equal(decode_region(half, *box), cut(pil(data), box))


def test_size_beyond_what_pil_takes(compiled: bool) -> None:
    data = bytearray(pil_jpeg(PHOTOS[0]))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"
    with pytest.raises(DecodeError, match="pixels"):
        decode_rgb(bytes(data))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files(compiled: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Pixels or DecodeError, and not a word on stderr. A crash would end the test run."""
    rng = random.Random(0)
    samples = [encode(np.ascontiguousarray(PHOTOS[0][100:180, 200:300]), rng) for encode in KINDS.values()]
    outcomes = {"pixels": 0, "error": 0}
    for number in range(2500 if compiled else 300):
        data = bytearray(samples[number % len(samples)])
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            at = rng.randrange(700) if rng.random() < 0.6 else rng.randrange(len(data))  # tables and headers, or data
            what = rng.random()
            if what < 0.7:
                data[at % len(data)] = rng.choice([0, 255, rng.randrange(256)])
            elif what < 0.85:
                del data[at : at + rng.randint(1, 9)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        damaged, box = bytes(data), random_box(rng, 80, 100)
        try:
            height, width = image_size(damaged)
            if number % 3 == 0:
                assert decode_region(damaged, *box).shape == (*box[2:], 3)
            elif number % 3 == 1 and height * width < 1e6:
                assert decode_rgb(damaged).shape == (height, width, 3)
            else:
                assert crop_resize(damaged, box, rng.randint(1, 40)).shape[2] == 3
            outcomes["pixels"] += 1
        except DecodeError:
            outcomes["error"] += 1
        except ValueError as error:
            if "is not inside of the image" not in str(error):  # which the damage may have made smaller
                raise
    assert min(outcomes.values()) > (2500 if compiled else 300) / 10, outcomes
    assert capfd.readouterr() == ("", "")


def test_threads(compiled: bool) -> None:
    rng = random.Random(0)
    samples = [encode(PHOTOS[i % 2], rng) for i, encode in enumerate(KINDS.values())] * 3
    boxes = [random_box(rng, 427, 640) for _ in samples]
    alone = [crop_resize(data, box, 96) for data, box in zip(samples, boxes, strict=True)]
    batch = np.empty((len(samples), 96, 96, 3), np.uint8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: crop_resize(samples[i], boxes[i], 96, batch[i]), range(len(samples))))
    np.testing.assert_array_equal(batch, alone)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.data._jpeg", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("decode_alone", str(decode.__file__))
    assert spec is not None
    assert spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert not alone.COMPILED
    data = pil_jpeg(PHOTOS[0])
    np.testing.assert_array_equal(alone.decode_region(data, 9, 8, 7, 6), cut(pil(data), (9, 8, 7, 6)))


@needs_compiled
def test_damaged_files_are_judged_by_the_other_decoder() -> None:
    """What our Huffman decoding takes has the library's pixels, bit for bit; at anything odd it gives up."""
    rng = random.Random(1)
    taken, reasons = 0, []
    for number in range(600):
        data = bytearray(KINDS[rng.choice(["444", "420", "optimized", "gray"])](PHOTOS[number % 2][:90, :120], rng))
        scan = data.index(b"\xff\xda") + 14
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(scan, len(data) - 2)] ^= 1 << rng.randrange(8)
        box = random_box(rng, 90, 120)
        out = np.empty((*box[2:], 3), np.uint8)
        assert decode._jpeg is not None
        if refused := decode._jpeg.region(bytes(data), out, *box):
            reasons.append(refused[1])
            continue
        taken += 1
        try:
            expected = pil(bytes(data))
        except OSError:  # damage below the region
            continue
        np.testing.assert_array_equal(out, cut(expected, box))
    assert min(taken, reasons.count("data out of order")) > 60, (taken, reasons)
