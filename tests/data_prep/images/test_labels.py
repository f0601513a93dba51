"""Numbers of classes in PNG masks: exactly those that are stored, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images.pil import decode_png_labels
from data_prep.images.rejection import ImageRejected


def grey_png(bits: int, row: bytes, width: int) -> bytes:
    """One row of grey pixels, as libpng writes them and PIL does not."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_grey_and_palette_give_their_numbers():
    values = np.arange(256, dtype=np.uint8).reshape(8, 32)
    palette = Image.fromarray(values, "P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    for image in (Image.fromarray(values), palette):
        file = io.BytesIO()
        image.save(file, "PNG")
        assert np.array_equal(decode_png_labels(file.getvalue()), values)
    assert decode_png_labels(grey_png(8, bytes([0, 1, 150]), 3)).tolist() == [[0, 1, 150]]
    few = palette.crop((1, 0, 5, 1))
    file = io.BytesIO()
    few.save(file, "PNG", bits=4)
    assert decode_png_labels(file.getvalue()).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("bits", "row"), [(4, b"\x01\x2f"), (2, b"\x1b"), (1, b"\x50"), (16, bytes(8))])
def test_other_depths_are_refused(bits, row):
    """PIL gives 0, 17, 34, 255 for the classes 0, 1, 2, 15 of four bits."""
    with pytest.raises(ImageRejected) as error:
        decode_png_labels(grey_png(bits, row, 4))
    assert error.value.reason == "not_8_bit"


def test_colours_and_other_files_are_refused():
    for image, reason in ((Image.new("RGB", (3, 2)), "not_8_bit"), (Image.new("LA", (3, 2)), "not_8_bit")):
        file = io.BytesIO()
        image.save(file, "PNG")
        with pytest.raises(ImageRejected) as error:
            decode_png_labels(file.getvalue())
        assert error.value.reason == reason
    file = io.BytesIO()
    Image.new("L", (3, 2)).save(file, "JPEG")
    with pytest.raises(ImageRejected) as error:
        decode_png_labels(file.getvalue())
    assert error.value.reason == "undecodable"
