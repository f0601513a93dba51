"""FFCV decoders of our own: crops keyed by (seed, epoch, sample), and the whole image warped to the square.

This file needs FFCV to be imported, so it is imported only where a `.beton` is read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, CenterCropRGBImageDecoder, ResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.compiler import Compiler
from numba import njit

CentreCropDecoder = CenterCropRGBImageDecoder

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@njit
def keyed_uniform(key: int, draw: int) -> float:
    """Draw number `draw` of the stream `key`, uniform in [0, 1): SplitMix64 (Steele et al., 2014) as a counter."""
    x = np.uint64(key) + (np.uint64(draw) + np.uint64(1)) * _STEP
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    x = x ^ (x >> np.uint64(31))
    return float(x >> np.uint64(11)) / 9007199254740992.0  # 53 bits


@njit
def keyed_crop(height: int, width: int, area_min: float, key: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random-resized crop, distributed as torchvision's: area uniform in
    [area_min, 1], aspect ratio log-uniform in [3/4, 4/3], ten tries, then the largest centred crop."""
    ratio_min, ratio_max = 3.0 / 4.0, 4.0 / 3.0
    for attempt in range(10):
        area = height * width * (area_min + (1.0 - area_min) * keyed_uniform(key, 4 * attempt))
        log_ratio = np.log(ratio_min) + (np.log(ratio_max) - np.log(ratio_min)) * keyed_uniform(key, 4 * attempt + 1)
        w = int(np.sqrt(area * np.exp(log_ratio)) + 0.5)
        h = int(np.sqrt(area / np.exp(log_ratio)) + 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = int(keyed_uniform(key, 4 * attempt + 2) * (height - h + 1))
            left = int(keyed_uniform(key, 4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width < ratio_min * height:
        h = int(width / ratio_min + 0.5)
    elif width > ratio_max * height:
        w = int(height * ratio_max + 0.5)
    return (height - h) // 2, (width - w) // 2, h, w


class KeyedCropDecoder(ResizedCropRGBImageDecoder):
    """Decode and crop to uint8 (resolution, resolution, 3); each draw depends on (seed, epoch, sample) alone.

    FFCV hands a decoder nothing but the indices it was asked for. So the loader asks for epoch * samples + sample, and
    this decoder takes both apart again: compiled once, it serves every epoch. FFCV's resize is INTER_AREA.
    """

    def __init__(self, resolution: int, area_min: float, seed: int, samples: int) -> None:
        super().__init__((resolution, resolution))
        self.area_min, self.seed, self.samples = area_min, seed, samples

    get_crop_generator = None  # abstract in the base class; generate_code below does not ask for it

    def generate_code(self) -> Callable[..., np.ndarray]:
        read = self.memory_read
        parallel_range = Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        jpeg = IMAGE_MODES["jpg"]
        samples, area_min = np.uint64(self.samples), float(self.area_min)
        stream = np.uint64(self.seed) * np.uint64(0x2545F4914F6CDD1D)

        def decode(batch_indices, storage, metadata, storage_state):
            destination, scratch = storage
            for slot in parallel_range(len(batch_indices)):
                virtual = np.uint64(batch_indices[slot])
                field = metadata[virtual % samples]
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                data = read(field["data_ptr"], storage_state)
                if field["mode"] == jpeg:
                    pixels = scratch[slot]
                    decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    pixels = pixels.reshape(-1)[: 3 * height * width].reshape(height, width, 3)
                else:
                    pixels = data.reshape(height, width, 3)
                # An odd multiplier is a bijection on 64 bits, so distinct (epoch, sample) never share a stream.
                key = stream ^ (virtual * np.uint64(0xD1342543DE82EF95))
                top, left, h, w = keyed_crop(int(height), int(width), area_min, key)
                resize(pixels, top, top + h, left, left + w, destination[slot])
            return destination[: len(batch_indices)]

        decode.__dict__["is_parallel"] = True  # FFCV's mark for functions that numba may run in threads
        return decode


def _whole_image(height, width, scale, ratio):
    return 0, 0, height, width


class WarpDecoder(ResizedCropRGBImageDecoder):
    """The whole image resized to the square without cropping: uint8 (resolution, resolution, 3)."""

    def __init__(self, resolution: int) -> None:
        super().__init__((resolution, resolution))
        self.scale = self.ratio = None

    @property
    def get_crop_generator(self) -> Callable[..., tuple[int, int, int, int]]:
        return _whole_image
