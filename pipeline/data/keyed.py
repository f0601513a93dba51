"""Random draws that are a pure function of (seed, epoch, sample): no generator, no state, any draw in O(1).

Each view of a sample (a sample in an epoch; with repeated augmentation, one of its repeats) has a 64-bit key, and draw
number i of a key is SplitMix64 (Steele, Lea, Flood, 2014) read as a counter. So an image is augmented alike on any
rank, worker, file format and device, and after a resume. Draws 0 to 47 are the crop's, 48 the flip's; those from 64 on
are of the augmentation on the device.
"""

from __future__ import annotations

import math

import numpy as np

FLIP_DRAW = 48
DEVICE_DRAWS = 64  # the first draw that the augmentation on the device may use

# One set of constants for numpy, for Python's integers and for numba (ffcv_decoders.py).
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
VIEW_FACTOR, SEED_FACTOR = 0xD1342543DE82EF95, 0x2545F4914F6CDD1D  # odd: bijections of 64 bits
_MASK = (1 << 64) - 1
RATIO_MIN, RATIO_MAX, CROP_TRIES = 3.0 / 4.0, 4.0 / 3.0, 10


def view_numbers(epoch: int, repeat: np.ndarray, repeats: int, sample: np.ndarray, samples: int) -> np.ndarray:
    """The numbers of views, int64 (N,), distinct for each (epoch, repeat, sample) of a set of `samples`."""
    return (epoch * repeats + repeat) * samples + sample


def view_keys(seed: int, views: np.ndarray) -> np.ndarray:
    """Keys, uint64 (N,), of view numbers (N,)."""
    with np.errstate(over="ignore"):
        stream = np.uint64((seed * SEED_FACTOR) & _MASK)
        return stream ^ (np.asarray(views).astype(np.uint64) * np.uint64(VIEW_FACTOR))


def uniform(keys: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """Draw number `draw` of each key, float64, uniform in [0, 1); the two arguments broadcast."""
    with np.errstate(over="ignore"):
        x = keys + (np.asarray(draw, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 9007199254740992.0  # 53 bits


def uniform_one(key: int, draw: int) -> float:
    """`uniform` of one key as a Python integer: faster than numpy for single draws."""
    x = (key + (draw + 1) * GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * MIX_2) & _MASK
    return ((x ^ (x >> 31)) >> 11) / 9007199254740992.0


def crop_box(height: int, width: int, area_min: float, key: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random-resized crop, distributed as torchvision's and timm's: area uniform in
    [area_min, 1] of the image, aspect ratio log-uniform in [3/4, 4/3], ten tries, then the largest centred crop.
    """
    log_min, log_max = math.log(RATIO_MIN), math.log(RATIO_MAX)
    for attempt in range(CROP_TRIES):
        area = height * width * (area_min + (1.0 - area_min) * uniform_one(key, 4 * attempt))
        ratio = math.exp(log_min + (log_max - log_min) * uniform_one(key, 4 * attempt + 1))
        w = int(math.sqrt(area * ratio) + 0.5)
        h = int(math.sqrt(area / ratio) + 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform_one(key, 4 * attempt + 2) * (height - h + 1))
            left = int(uniform_one(key, 4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width < RATIO_MIN * height:
        h = int(width / RATIO_MIN + 0.5)
    elif width > RATIO_MAX * height:
        w = int(height * RATIO_MAX + 0.5)
    return (height - h) // 2, (width - w) // 2, h, w


def flipped(key: int, probability: float) -> bool:
    """Whether the view is mirrored."""
    return uniform_one(key, FLIP_DRAW) < probability
