"""FFCV decoders of our own: boxes keyed by the view, for training, and fixed boxes, for evaluation.

FFCV's own random crop draws from a generator that no resume can bring back, and no FFCV decoder notices a JPEG that
does not decode. This file needs FFCV to be imported, so it is imported only where a `.beton` is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, ResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from numba import njit

from pipeline.data import keyed

Box = tuple[int, int, int, int]  # top, left, height, width

_GOLDEN, _MIX_1, _MIX_2 = np.uint64(keyed.GOLDEN), np.uint64(keyed.MIX_1), np.uint64(keyed.MIX_2)
_LOG_MIN, _LOG_MAX = np.log(keyed.RATIO_MIN), np.log(keyed.RATIO_MAX)
_RATIO_MIN, _RATIO_MAX, _TRIES = keyed.RATIO_MIN, keyed.RATIO_MAX, keyed.CROP_TRIES


@njit
def keyed_uniform(key: int, draw: int) -> float:
    """`keyed.uniform_one`, compiled."""
    x = np.uint64(key) + (np.uint64(draw) + np.uint64(1)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    x = x ^ (x >> np.uint64(31))
    return float(x >> np.uint64(11)) / 9007199254740992.0


@njit
def keyed_crop(height: int, width: int, area_min: float, key: int) -> Box:
    """`keyed.crop_box`, compiled."""
    for attempt in range(_TRIES):
        area = height * width * (area_min + (1.0 - area_min) * keyed_uniform(key, 4 * attempt))
        ratio = np.exp(_LOG_MIN + (_LOG_MAX - _LOG_MIN) * keyed_uniform(key, 4 * attempt + 1))
        w = int(np.sqrt(area * ratio) + 0.5)
        h = int(np.sqrt(area / ratio) + 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = int(keyed_uniform(key, 4 * attempt + 2) * (height - h + 1))
            left = int(keyed_uniform(key, 4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width < _RATIO_MIN * height:
        h = int(width / _RATIO_MIN + 0.5)
    elif width > _RATIO_MAX * height:
        w = int(height * _RATIO_MAX + 0.5)
    return (height - h) // 2, (width - w) // 2, h, w


@njit
def _centre(height: int, width: int, ratio: float, key: int) -> Box:
    side = int(ratio * min(height, width))
    return (height - side) // 2, (width - side) // 2, side, side


@njit
def _whole(height: int, width: int, ratio: float, key: int) -> Box:
    return 0, 0, height, width


class BoxDecoder(ResizedCropRGBImageDecoder):
    """A box of each image, resized by area (FFCV has nothing else): uint8 (resolution + 1, resolution, 3).

    The first byte of the last row is 0 where the image decoded, else 1. Indices are view numbers (keyed.py).
    """

    def __init__(self, box: Any, parameter: float, resolution: int, seed: int, flip: float, samples: int) -> None:
        super().__init__((resolution, resolution))
        self.box, self.parameter, self.resolution = box, parameter, resolution
        self.seed, self.flip, self.samples = seed, flip, samples

    get_crop_generator = None  # abstract in the base class; generate_code below does not ask for it

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        state, (_, scratch) = super().declare_state_and_memory(previous_state)
        shape = (self.resolution + 1, self.resolution, 3)
        return replace(state, shape=shape), (AllocationQuery(shape, np.dtype("<u1")), scratch)

    def generate_code(self) -> Callable[..., np.ndarray]:
        read = self.memory_read
        parallel_range = Compiler.get_iterator()
        decode_jpeg, resize, draw_box = Compiler.compile(imdecode), Compiler.compile(resize_crop), self.box
        jpeg, samples, parameter = IMAGE_MODES["jpg"], np.uint64(self.samples), float(self.parameter)
        stream = np.uint64((self.seed * keyed.SEED_FACTOR) % (1 << 64))
        view_factor, side, flip, flip_draw = np.uint64(keyed.VIEW_FACTOR), self.resolution, self.flip, keyed.FLIP_DRAW

        def decode(batch_indices, storage, metadata, storage_state):
            destination, scratch = storage
            for slot in parallel_range(len(batch_indices)):
                view = np.uint64(batch_indices[slot])
                field = metadata[view % samples]
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                data = read(field["data_ptr"], storage_state)
                failed = 0
                if field["mode"] == jpeg:
                    pixels = scratch[slot]
                    failed = decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    pixels = pixels.reshape(-1)[: 3 * height * width].reshape(height, width, 3)
                else:
                    pixels = data.reshape(height, width, 3)
                key = stream ^ (view * view_factor)
                top, left, h, w = draw_box(int(height), int(width), parameter, key)
                image = destination[slot][:side]
                resize(pixels, top, top + h, left, left + w, image)
                if keyed_uniform(key, flip_draw) < flip:
                    for row in range(side):
                        for column in range(side // 2):
                            for channel in range(3):
                                other = image[row, side - 1 - column, channel]
                                image[row, side - 1 - column, channel] = image[row, column, channel]
                                image[row, column, channel] = other
                destination[slot, side, 0, 0] = 0 if failed == 0 else 1
            return destination[: len(batch_indices)]

        decode.__dict__["is_parallel"] = True  # FFCV's mark: numba may run it in threads, with num_workers > 1
        return decode


def training_decoder(resolution: int, area_min: float, seed: int, flip: float, samples: int) -> BoxDecoder:
    """Random-resized crop and flip, keyed."""
    return BoxDecoder(keyed_crop, area_min, resolution, seed, flip, samples)


def evaluation_decoder(resolution: int, resize: str, crop_ratio: float, samples: int) -> BoxDecoder:
    """`resize` crop: the central square of crop_ratio of the shorter side; warp: the whole image."""
    return BoxDecoder(_centre if resize == "crop" else _whole, crop_ratio, resolution, 0, 0.0, samples)
