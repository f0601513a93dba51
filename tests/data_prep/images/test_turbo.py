"""What libjpeg-turbo is asked for: a stand-in records it. No file here is one that the library could not bear."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import JpegImagePlugin

from data_prep.duplicates.hashing import hash_image
from data_prep.duplicates.report import _thumbnails
from data_prep.images.jpeg import jpeg_frame, jpeg_header
from data_prep.images.pixels import check_image, decode_image
from data_prep.images.prepare import ImagePolicy, prepare_image
from data_prep.images.rejection import ImageRejected
from data_prep.images.turbo import TurboRefused, decode, decode_eighth, is_cut_short
from pipeline.data import decode as reader
from pipeline.data.decode import DecodeError, crop_resize, decode_rgb
from tests.support.image_kinds import BAD, GOOD, JPEG, ask_safely, rare

OF_BLOCKS = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}


class Recorder:
    """In place of simplejpeg.decode_jpeg: notes (frame marker, whether a scale was asked for), and returns gray."""

    def __init__(self, complaint: str = "") -> None:
        self.asked: list[tuple[int, bool]] = []
        self.complaint = complaint

    def __call__(self, data: bytes, colorspace: str = "RGB", **options: Any) -> np.ndarray:
        frame = jpeg_frame(data)
        assert frame is not None
        self.asked.append((frame.marker, any(options.get(side, 0) for side in ("min_height", "min_width"))))
        if self.complaint and options.get("strict", True):
            raise ValueError(self.complaint)
        return np.full((frame.height, frame.width, 3 if colorspace == "RGB" else 1), 128, np.uint8)


class Stored:
    """In place of a data set, for thumbnails."""

    def __init__(self, data: bytes) -> None:
        self.data, self.dataset, self.file, self.offset, self.size = data, self, "", 0, 0

    def read_ranges(self, ranges: list[Any]) -> list[bytes]:
        return [self.data for _ in ranges]


# Everything that decodes, at a scale where it may.
READERS: dict[str, Callable[[bytes], object]] = {
    "shard": lambda data: prepare_image(data, ImagePolicy(short_side_px=4, min_side_px=0)),
    "shard, keep": lambda data: prepare_image(data, ImagePolicy(short_side_px=4, min_side_px=0, truncated="keep")),
    "verify": check_image,
    "duplicates": hash_image,
    "thumbnails": lambda data: _thumbnails(Stored(data), [Stored(data)]),  # type: ignore[arg-type,list-item]
    "training": lambda data: crop_resize(data, (0, 0, 32, 32), 4),
    "evaluation": decode_rgb,
    "at 1/8": lambda data: decode_image(data, 8),
}


@pytest.fixture(params=["", "Corrupt JPEG data: premature end of data segment"], ids=["clean", "complaint"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(request.param)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", recorder)
    monkeypatch.setattr(reader, "COMPILED", False)
    return recorder


@pytest.mark.parametrize("who", READERS)
def test_only_codings_with_scales_are_asked_for_one(
    who: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_draft(*_: object) -> None:
        raise AssertionError("PIL was asked for a scale")

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", no_draft)
    for data in [*GOOD.values(), *BAD.values()]:
        with suppress(ImageRejected, DecodeError, ValueError):
            READERS[who](data)
    scaled = {marker for marker, scale in recorder.asked if scale}
    assert scaled <= OF_BLOCKS
    assert {marker for marker, _ in recorder.asked} <= OF_BLOCKS | {0xC3}
    if who != "evaluation":
        assert {0xC0, 0xC2, 0xC9} <= scaled, "the stand-in was not used"
        assert (0xC3, False) in recorder.asked


@pytest.mark.parametrize("marker", [m for m in range(0xC0, 0xD0) if m not in (0xC4, 0xC8, 0xCC)])
def test_by_the_frame_marker(marker: int, recorder: Recorder) -> None:
    """The same bytes under each of the 13 frame markers."""
    data = JPEG.replace(b"\xff\xc0", bytes((0xFF, marker)), 1)
    header = jpeg_header(data)
    assert header is not None
    calls: list[Callable[[], object]] = [
        lambda: decode(data, header, (12, 8), strict=False),
        lambda: decode_eighth(data, header, strict=False),
        lambda: is_cut_short(data, header),
    ]
    for call in calls:
        with suppress(TurboRefused):
            call()
    if marker in OF_BLOCKS:
        assert recorder.asked == [(marker, True)] * 3
    else:
        assert recorder.asked == ([(marker, False)] * 3 if marker == 0xC3 else [])


def test_what_is_not_asked_at_all(recorder: Recorder) -> None:
    for name in ("12 bits", "hundreds of scans", "SOF5", "SOF11"):
        for call in READERS.values():
            with suppress(ImageRejected, DecodeError, ValueError):
                call(BAD[name])
    assert recorder.asked == []


@pytest.mark.skipif(not reader.COMPILED, reason="pipeline.data._jpeg is not built")
def test_the_compiled_decoder_asks_for_ordinary_files_alone() -> None:
    """It says so itself, before its library sees them."""
    refused = {
        **{name: rare(name) for name in ("lossless", "arithmetic", "12bit")},
        **{name: GOOD[name] for name in ("cmyk", "YCCK", "png")},
        **{name: BAD[name] for name in ("SOF3", "SOF5", "SOF11", "junk before", "three bytes", "empty")},
        "a second frame": JPEG[:2] + JPEG[JPEG.index(b"\xff\xc0") :][:19] + JPEG[2:],
        "a gap in the header": JPEG[: JPEG.index(b"\xff\xdb")] + b"\0" + JPEG[JPEG.index(b"\xff\xdb") :],
    }
    assert reader._jpeg is not None
    for name, data in refused.items():
        out = np.empty((4, 4, 3), np.uint8)
        found = reader._jpeg.crop_resize(data, out, 0, 0, 32, 32, 4, 4, True, False)
        assert found is not None, name
        assert found[1] == "not an ordinary JPEG", name
        assert reader._jpeg.size(data) is None
    assert reader._jpeg.crop_resize(JPEG, np.empty((4, 4, 3), np.uint8), 0, 0, 32, 32, 4, 4, True, False) is None


def test_a_lossless_file_is_shrunk_from_its_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_safely(monkeypatch)
    data = rare("lossless")
    assert decode_image(data, 8).pixels.shape == (40, 40, 3)
    assert prepare_image(data, ImagePolicy(short_side_px=8, min_side_px=0)).width == 8
