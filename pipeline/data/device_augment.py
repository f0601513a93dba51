"""The recipe's augmentation after crop and flip, batched on the accelerator: RandAugment or colour jitter,
normalisation, random erasing, as timm's transforms do them one image at a time.

Every draw is a function of the view's key (keyed.py) and is made on the host. So the host knows which sample gets which
operation, groups the samples, and sends one small buffer to the device; nothing ever waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from pipeline.data import device_ops, keyed

if TYPE_CHECKING:
    from pipeline.config.sections import Augment

OPS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
NO_OP = -1
FILL = tuple(min(255, round(255 * mean)) for mean in IMAGENET_DEFAULT_MEAN)  # as create_transform passes it
TAPS = {"bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}

# The draws of a key, from keyed.DEVICE_DRAWS up.
ERASE_DRAWS = keyed.DEVICE_DRAWS  # whether, two noise seeds, then four a try: area, ratio, top, left
ERASE_TRIES = 10
JITTER_DRAWS = keyed.DEVICE_DRAWS + 64  # order, three factors
LAYER_DRAWS = keyed.DEVICE_DRAWS + 80  # each layer: operation, whether, two of the magnitude, sign
DRAWS_PER_LAYER = 5


class Layer(NamedTuple):
    """One operation for each sample. ops: (B,), positions in OPS or NO_OP; arguments: float64 (B,), what timm's
    operation takes (degrees, bits, threshold, addend, factor, slope, share of the side).
    """

    ops: np.ndarray
    arguments: np.ndarray


# timm's LEVEL_TO_ARG, vectorised: (level in tenths of the scale, sign) -> argument.
_Level = Callable[[np.ndarray, np.ndarray], np.ndarray]
_none: _Level = lambda level, sign: np.zeros_like(level)  # noqa: E731
_enhance: _Level = lambda level, sign: level * 1.8 + 0.1  # noqa: E731
_enhance_increasing: _Level = lambda level, sign: np.maximum(0.1, 1.0 + sign * (level * 0.9))  # noqa: E731
_shear: _Level = lambda level, sign: sign * (level * 0.3)  # noqa: E731
_translate: _Level = lambda level, sign: sign * (level * 0.45)  # noqa: E731
LEVELS: dict[str, _Level] = {
    "AutoContrast": _none,
    "Equalize": _none,
    "Invert": _none,
    "Rotate": lambda level, sign: sign * (level * 30.0),
    "Posterize": lambda level, sign: np.trunc(level * 4),
    "PosterizeIncreasing": lambda level, sign: 4 - np.trunc(level * 4),
    "Solarize": lambda level, sign: np.minimum(256, np.trunc(level * 256)),
    "SolarizeIncreasing": lambda level, sign: 256 - np.minimum(256, np.trunc(level * 256)),
    "SolarizeAdd": lambda level, sign: np.minimum(128, np.trunc(level * 110)),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), _enhance),
    **dict.fromkeys(
        ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"), _enhance_increasing
    ),
    **dict.fromkeys(("ShearX", "ShearY"), _shear),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), _translate),
}


class DeviceAugment:
    """Augmentation of uint8 batches; see `__call__`.

    Raises ValueError for an `augment.rand_augment` other than RandAugment over timm's two uniform sets of operations.
    """

    def __init__(self, augment: Augment, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.policy = _parse(augment.rand_augment) if augment.rand_augment else None
        self.color_jitter = augment.color_jitter if self.policy is None else 0.0
        self.erasing = RandomErasing(augment.random_erasing, mode="pixel", device="cpu")
        self.taps = TAPS[augment.interpolation]
        self.fill = torch.tensor(FILL, dtype=torch.uint8, device=self.device).view(3, 1, 1)
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGENET_DEFAULT_STD, device=self.device).view(1, 3, 1, 1)
        self.white = torch.tensor(255.0, device=self.device)
        self.normal = device_ops.normal_table().to(self.device)

    def __call__(self, images: torch.Tensor, keys: np.ndarray) -> torch.Tensor:
        """uint8 (B, 3, H, W) on the device, keys uint64 (B,) -> float32 (B, 3, H, W), contiguous, normalised.

        What becomes of a view depends on its pixels and its key, not on the batch. `images` is left as it is.
        """
        boxes = self.draw_boxes(keys, images.shape[2], images.shape[3])
        return self.apply(images, self.draw_layers(keys), boxes)

    def draw_layers(self, keys: np.ndarray) -> list[Layer]:
        """The operations of each view, in order of application."""
        if self.policy is not None:
            return [self.policy.draw(keys, LAYER_DRAWS + i * DRAWS_PER_LAYER) for i in range(self.policy.layers)]
        if not self.color_jitter:
            return []
        order, *amounts = keyed.uniform(keys, JITTER_DRAWS + np.arange(4)[:, None])
        low, high = max(0.0, 1.0 - self.color_jitter), 1.0 + self.color_jitter
        factors = low + (high - low) * np.stack(amounts)
        names = [OPS.index(name) for name in ("Brightness", "Contrast", "Color")]
        orders = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])[(order * 6).astype(int)]
        views = np.arange(len(keys))
        return [Layer(np.array(names)[which], factors[which, views]) for which in orders.T]

    def draw_boxes(self, keys: np.ndarray, height: int, width: int) -> np.ndarray:
        """int64 (E, 7), a row for each view that is erased: position in the batch, top, left, height, width, seeds."""
        first = keyed.uniform(keys[:, None], ERASE_DRAWS + np.arange(3))
        views = np.flatnonzero(first[:, 0] <= self.erasing.probability) if self.erasing.probability else np.arange(0)
        tries = keyed.uniform(keys[views, None], ERASE_DRAWS + 3 + np.arange(4 * ERASE_TRIES))
        area, ratio, top, left = tries.reshape(-1, ERASE_TRIES, 4).transpose(2, 0, 1)
        smallest, largest = self.erasing.min_area, self.erasing.max_area
        log_min, log_max = self.erasing.log_aspect_ratio
        area = (smallest + (largest - smallest) * area) * (height * width)
        ratio = np.exp(log_min + (log_max - log_min) * ratio)
        box_height, box_width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (box_height < height) & (box_width < width)
        top, left = np.floor(top * (height - box_height + 1)), np.floor(left * (width - box_width + 1))
        chosen = np.arange(len(views)), fits.argmax(1)  # the first that fits
        seeds = np.floor(first[views, 1:] * 2.0**32)
        boxes = np.column_stack([views, *(each[chosen] for each in (top, left, box_height, box_width)), seeds])
        return boxes[fits.any(1) & (boxes[:, 3] * boxes[:, 4] > 0)].astype(np.int64)

    def apply(self, images: torch.Tensor, layers: list[Layer], boxes: np.ndarray) -> torch.Tensor:
        """`__call__` with what was drawn given."""
        height, width = images.shape[2:]
        plans = [_plan(layer, height, width) for layer in layers]
        arrays = [array for plan in plans for array in plan.values()]
        sent = iter(_send([*arrays, boxes] if len(boxes) else arrays, self.device))
        work = images.clone(memory_format=torch.contiguous_format)
        for plan in plans:
            self._apply_layer(work, {name: next(sent) for name in plan})
        out = work.float().div_(self.white).sub_(self.mean).div_(self.std)  # timm's order: the same bits
        if len(boxes):
            device_ops.erase(out, next(sent), boxes[:, 3] * boxes[:, 4], self.normal)
        return out

    def _apply_layer(self, images: torch.Tensor, plan: dict[str, torch.Tensor]) -> None:
        """Apply what `_plan` made of a layer to `images`, in place. Each sample is in one family only."""
        tables = [plan["fixed"].unsqueeze(1).expand(-1, 3, -1)] if "fixed" in plan else []
        for name, make, *arguments in (
            ("AutoContrast", device_ops.autocontrast_tables),
            ("Equalize", device_ops.equalize_tables),
            ("Contrast", device_ops.contrast_tables, "contrast"),
        ):
            if name in plan:
                made = device_ops.in_chunks(images, make, plan[name], *(plan[each] for each in arguments))
                tables.extend(table for _, table in made)
        if tables:
            device_ops.update(images, device_ops.lookup, plan["tables"], torch.cat(tables))
        if "Color" in plan:
            device_ops.update(images, device_ops.color, plan["Color"], plan["color"])
        if "Sharpness" in plan:
            device_ops.update(images, device_ops.sharpness, plan["Sharpness"], plan["sharpness"])
        if "slide" in plan:
            device_ops.update(images, self._slide, plan["slide"], plan["vertical"], plan["slopes"], plan["shifts"])
        if "rotate" in plan:
            device_ops.update(images, self._affine, plan["rotate"], plan["matrices"])

    def _slide(
        self, images: torch.Tensor, vertical: torch.Tensor, slopes: torch.Tensor, shifts: torch.Tensor
    ) -> torch.Tensor:
        return device_ops.slide(images, vertical, slopes, shifts, self.fill, self.taps)

    def _affine(self, images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return device_ops.affine(images, matrices, self.fill, self.taps)


class _Policy(NamedTuple):
    """A RandAugment string, as timm reads it."""

    ops: tuple[str, ...]  # timm's names
    layers: int
    probability: float
    magnitude: float
    magnitude_std: float  # inf: magnitudes uniform in [0, magnitude]
    magnitude_max: float

    def draw(self, keys: np.ndarray, first_draw: int) -> Layer:
        """One layer's operations, drawn with replacement as timm draws them."""
        which, gate, one, two, sign = keyed.uniform(keys, first_draw + np.arange(DRAWS_PER_LAYER)[:, None])
        chosen = (which * len(self.ops)).astype(np.int64)
        magnitude = np.full(len(keys), float(self.magnitude))
        if self.magnitude_std == math.inf:
            magnitude = one * self.magnitude
        elif self.magnitude_std > 0:  # Box-Muller
            magnitude += self.magnitude_std * np.sqrt(-2.0 * np.log1p(-one)) * np.cos(2.0 * math.pi * two)
        level = np.clip(magnitude, 0.0, self.magnitude_max) / 10.0
        signs = np.where(sign > 0.5, -1.0, 1.0)
        ops, arguments = np.full(len(keys), NO_OP), np.zeros(len(keys))
        for number, name in enumerate(self.ops):
            mine = (chosen == number) & (gate <= self.probability)
            ops[mine] = OPS.index(name.removesuffix("Increasing"))
            arguments[mine] = LEVELS[name](level[mine], signs[mine])
        return Layer(ops, arguments)


def _parse(text: str) -> _Policy:
    """Let timm read a RandAugment string. Raises ValueError for what only timm's own transforms can do."""
    served = "it is not available on the device; augment.where=host serves it, or write it as in rand-m9-mstd0.5-inc1"
    if text.split("-")[0] != "rand" or "3a" in text:  # with "3a", timm adds colour jitter
        raise ValueError(f"augment.rand_augment {text!r} is not RandAugment over the standard operations: {served}")
    try:
        parsed = rand_augment_transform(text, {"img_mean": FILL})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"augment.rand_augment {text!r}: timm cannot read it ({error})") from error
    names = tuple(op.name for op in parsed.ops)
    if parsed.choice_weights is not None or not set(names) <= LEVELS.keys():
        raise ValueError(f"augment.rand_augment {text!r} weights its operations: {served}")
    op = parsed.ops[0]
    limit = op.magnitude_max or 10.0
    return _Policy(names, parsed.num_layers, op.prob, op.magnitude, op.magnitude_std, limit)


def _plan(layer: Layer, height: int, width: int) -> dict[str, np.ndarray]:
    """Group a layer's samples by how they are computed: name -> array, one row a sample; empty groups are left out."""
    where = {name: np.flatnonzero(layer.ops == number) for number, name in enumerate(OPS)}
    argument = {name: layer.arguments[samples] for name, samples in where.items()}
    plan: dict[str, np.ndarray] = {}
    fixed = [name for name in ("Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness") if len(where[name])]
    if fixed:
        plan["fixed"] = np.concatenate([_tables(name, argument[name]) for name in fixed])
    plan.update({name: where[name] for name in ("AutoContrast", "Equalize", "Contrast", "Color", "Sharpness")})
    plan["tables"] = np.concatenate([where[name] for name in (*fixed, "AutoContrast", "Equalize", "Contrast")])
    for name in ("Contrast", "Color", "Sharpness"):
        plan[name.lower()] = argument[name].astype(np.float32)
    slides = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
    plan["slide"] = np.concatenate([where[name] for name in slides])
    plan["vertical"] = np.concatenate([np.full(len(where[name]), "Y" in name) for name in slides])
    none = [np.zeros(len(where[name])) for name in slides]
    plan["slopes"] = np.concatenate([argument["ShearX"], argument["ShearY"], *none[2:]])
    shifts = argument["TranslateXRel"] * width, argument["TranslateYRel"] * height
    plan["shifts"] = np.concatenate([*none[:2], *shifts])
    plan["rotate"] = where["Rotate"]
    plan["matrices"] = np.array([_rotation(degrees, height, width) for degrees in argument["Rotate"]])
    return {name: array for name, array in plan.items() if len(array)}


def _tables(name: str, arguments: np.ndarray) -> np.ndarray:
    """uint8 (N, 256): what a byte becomes, for operations that need to know nothing of the image."""
    values, argument = np.arange(256), arguments[:, None]
    if name == "Brightness":
        return np.clip(argument.astype(np.float32) * values.astype(np.float32), 0.0, 255.0).astype(np.uint8)
    whole = argument.astype(np.int64)
    if name == "Posterize":  # bits to keep; all of them from 8 up
        out = values & ~((1 << (8 - np.clip(whole, 0, 8))) - 1)
    elif name == "SolarizeAdd":
        out = np.where(values < 128, np.minimum(255, values + whole), values)
    else:
        out = np.where(values < (0 if name == "Invert" else whole), values, 255 - values)
    return np.broadcast_to(out, (len(arguments), 256)).astype(np.uint8)


def _rotation(degrees: float, height: int, width: int) -> list[float]:
    """The matrix, output to input, of Pillow's rotation about the centre, which rounds to 15 digits."""
    angle = -math.radians(degrees % 360.0)
    cos, sin, minus_sin = (round(each, 15) for each in (math.cos(angle), math.sin(angle), -math.sin(angle)))
    x, y = width / 2, height / 2
    return [cos, sin, cos * -x + sin * -y + 0.0 + x, minus_sin, cos, minus_sin * -x + cos * -y + 0.0 + y]


def _send(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays, none of them empty, on the device, in one copy that the host does not wait for."""
    sizes = [-(-array.nbytes // 16) * 16 for array in arrays]  # aligned for every type
    starts = np.cumsum([0, *sizes])
    buffer = np.zeros(starts[-1], dtype=np.uint8)
    for array, start in zip(arrays, starts, strict=False):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    host = torch.from_numpy(buffer)
    there = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]
