"""One scene of the demo: cut-outs put on a photograph, with the exact pixels that each of them shows.

All that is drawn by chance follows from (seed, split, number of the scene): the same scene on every machine, in any
process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.demo.archive import unit_hash
from data_prep.demo.cutouts import SOLID, open_store

SIDES = (128, 200)  # of the longer side
ASPECT = (0.62, 1.0)  # shorter to longer side
OBJECTS = 6  # at most; a few scenes have none
EMPTY_SHARE = 0.02
OBJECT_SIDE = (0.18, 0.62)  # of an object's longer side, to the scene's
TURN_DEGREES = 20
ZOOM = (0.2, 1.0)  # what part of a photograph is seen
LIGHT = (0.7, 1.1)  # its brightness, times that of each channel
TINT = (0.75, 1.25)
ATTEMPTS = 8  # to find a place where an object shows, and hides no other one
LEAST_PIXELS = 48  # that an object must show
LEAST_SHOWN = 0.5  # share of its pixels that must be seen


@dataclass(frozen=True)
class SceneTask:
    """Which scene; `store` is the folder of the cut-outs, `classes` how many there are."""

    store: str
    seed: int
    split: str
    number: int
    classes: int


@dataclass(frozen=True)
class Scene:
    """`pixels` uint8 (height, width, 3); `masks`: bool (height, width), what is seen of each object; `place`: the
    photograph's name.
    """

    pixels: np.ndarray
    labels: tuple[int, ...]
    masks: tuple[np.ndarray, ...]
    place: str


class Draw:
    """Numbers by name, from the key of a scene."""

    def __init__(self, key: str):
        self.key = key

    def __call__(self, what: str, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * unit_hash(f"{self.key}/{what}")

    def choice(self, what: str, count: int) -> int:
        """0 to count - 1."""
        return min(int(self(what) * count), count - 1)


def compose(task: SceneTask) -> Scene:
    """The scene of a task."""
    store, draw = open_store(task.store), Draw(f"scenes/{task.seed}/{task.split}/{task.number}")
    longer = round(draw("side", *SIDES))
    shorter = round(longer * draw("aspect", *ASPECT))
    size = (shorter, longer) if draw("tall") < 0.4 else (longer, shorter)
    photographs = store.photographs[task.split]
    photograph = photographs[draw.choice("photograph", len(photographs))]
    pixels = _background(store.image(photograph), size, draw)
    placed: list[_Placed] = []
    wanted = 0 if draw("empty") < EMPTY_SHARE else 1 + draw.choice("objects", OBJECTS)
    for number in range(wanted):
        label = draw.choice(f"{number}/label", task.classes)
        entries = store.cutouts[task.split, label]
        if entries:
            picture = store.image(entries[draw.choice(f"{number}/picture", len(entries))])
            _place(_turned(picture, longer, draw, number), label, draw, number, pixels, placed)
    labels, masks = tuple(each.label for each in placed), tuple(each.mask for each in placed)
    return Scene(pixels, labels, masks, photograph.name)


@dataclass
class _Placed:
    """An object in the scene: the pixels of it that are seen, and how many these were before others came."""

    label: int
    mask: np.ndarray
    shown: int


def _background(photograph: Image.Image, size: tuple[int, int], draw: Draw) -> np.ndarray:
    """A part of the photograph of the scene's aspect, maybe mirrored, darker or lighter, and of another tint.

    There are few photographs: a net that has them by heart finds every object in front of them.
    """
    fit = min(photograph.width / size[0], photograph.height / size[1]) * draw("zoom", *ZOOM)
    width, height = size[0] * fit, size[1] * fit
    left, top = draw("left") * (photograph.width - width), draw("top") * (photograph.height - height)
    part = photograph.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    if draw("mirror") < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw("upside") < 0.25:
        part = part.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    light = draw("light", *LIGHT)
    gains = np.array([round(256 * light * draw(f"tint/{channel}", *TINT)) for channel in "rgb"], np.int32)
    return np.minimum(np.asarray(part, np.int32) * gains >> 8, 255).astype(np.uint8)


def _place(image: Image.Image, label: int, draw: Draw, number: int, pixels: np.ndarray, placed: list[_Placed]) -> None:
    """Draw one object onto `pixels`, in front of the others, where there is a place for it."""
    height, width = pixels.shape[:2]
    drawn = np.asarray(image, np.int32)
    solid = drawn[:, :, 3] >= SOLID
    for attempt in range(ATTEMPTS):
        # Up to a third of its width, and of its height, may lie outside.
        left = round(draw(f"{number}/left{attempt}", -image.width / 3, width - image.width * 2 / 3))
        top = round(draw(f"{number}/top{attempt}", -image.height / 3, height - image.height * 2 / 3))
        rows, columns = slice(max(top, 0), top + image.height), slice(max(left, 0), left + image.width)
        part = (slice(max(-top, 0), height - top), slice(max(-left, 0), width - left))
        mask = np.zeros((height, width), bool)
        mask[rows, columns] = solid[part]
        shown = int(np.count_nonzero(mask))
        seen = [(int(np.count_nonzero(other.mask & ~mask)), other.shown) for other in placed]
        seen.append((shown, int(np.count_nonzero(solid))))
        if all(now >= max(LEAST_PIXELS, LEAST_SHOWN * whole) for now, whole in seen):
            alpha, under = drawn[part][:, :, 3:], pixels[rows, columns].astype(np.int32)
            pixels[rows, columns] = (drawn[part][:, :, :3] * alpha + under * (255 - alpha) + 127) // 255
            for other in placed:
                other.mask &= ~mask
            placed.append(_Placed(label, mask, shown))
            return


def _turned(image: Image.Image, longer: int, draw: Draw, number: int) -> Image.Image:
    """The cut-out at its size in the scene, turned, maybe mirrored, without empty borders."""
    if draw(f"{number}/mirror") < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(draw(f"{number}/turn", -TURN_DEGREES, TURN_DEGREES), Image.Resampling.BICUBIC, expand=True)
    factor = longer * draw(f"{number}/side", *OBJECT_SIDE) / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= SOLID)).getbbox()
    return image.crop(box) if box else image
