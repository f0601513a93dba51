"""How one sample of a shard stands in a `.beton`: the shard's own JPEG, a smaller JPEG, or pixels."""

import hashlib
import io
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from data_prep.beton.file import JPG, MAX_SIDE_PX, RAW, BetonError
from data_prep.images.jpeg import jpeg_frame
from data_prep.manifest import BetonEntry

MODES = ("jpg", "proportion", "raw")


@dataclass(frozen=True)
class BetonSettings:
    """What decides the content of a `.beton`.

    mode: 'jpg' stores JPEGs, 'raw' pixels (uint8, H x W x 3), 'proportion' a JPEG with `jpeg_probability` and pixels
    otherwise, by a hash of the sample's key. Images whose longer side is above `max_side_px` (0: no bound) are shrunk
    to it. JPEGs that need no shrinking are the shard's own bytes; the others are encoded with `quality`.
    """

    mode: str = "jpg"
    max_side_px: int = 0
    jpeg_probability: float = 0.5
    quality: int = 90

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BetonError(f"FFCV write mode {self.mode!r} is not one of {', '.join(MODES)}")
        if not 0 <= self.max_side_px <= MAX_SIDE_PX:
            raise BetonError(f"maximum resolution {self.max_side_px} is not in 0..{MAX_SIDE_PX} (0: as in the shards)")
        if not 0 <= self.jpeg_probability <= 1:
            raise BetonError(f"JPEG probability {self.jpeg_probability} is not in 0..1")
        if not 1 <= self.quality <= 95:
            raise BetonError(f"JPEG quality {self.quality} is not in 1..95")

    @property
    def copies(self) -> bool:
        """Whether every sample is the shard's own bytes."""
        return self.mode == "jpg" and not self.max_side_px

    def described(self) -> dict[str, Any]:
        """The settings that matter in this mode: equal for settings that give the same file."""
        found: dict[str, Any] = {"mode": self.mode}
        if self.max_side_px:
            found["max_side_px"] = self.max_side_px
            if self.mode != "raw":
                found["quality"] = self.quality
        if self.mode == "proportion":
            found["jpeg_probability"] = self.jpeg_probability
        return found

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.described().items())

    @classmethod
    def of(cls, entry: BetonEntry) -> "BetonSettings":
        """The settings a `.beton` was written with. Raises BetonError for those of a newer version."""
        try:
            return cls(**{"mode": entry.write_mode, **entry.settings})
        except TypeError:
            raise BetonError(
                f"{entry.file} was written with unknown settings {entry.settings}: update the code"
            ) from None


class Plan(NamedTuple):
    """How a sample is stored: `mode` is JPG or RAW; `copied`: the shard's own bytes."""

    mode: int
    width: int
    height: int
    copied: bool


class Stored(NamedTuple):
    """A sample as it stands in the file."""

    mode: int
    width: int
    height: int
    data: bytes


def plan_sample(jpeg: bytes, key: str, where: str, settings: BetonSettings) -> Plan:
    """How this sample is stored. Reads only the JPEG's header. Raises BetonError where FFCV cannot hold it."""
    frame = jpeg_frame(jpeg)
    if frame is None or frame.components != 3 or not 0 < max(frame.width, frame.height) <= MAX_SIDE_PX:
        raise BetonError(
            f"{where}: {key} is not an RGB JPEG that FFCV can hold ({frame}): rebuild the dataset with --force"
        )
    width, height, longer = frame.width, frame.height, max(frame.width, frame.height)
    shrink = 0 < settings.max_side_px < longer
    if shrink:  # rounded down, as FFCV does
        width, height = (max(1, side * settings.max_side_px // longer) for side in (width, height))
    as_jpeg = settings.mode == "jpg"
    if settings.mode == "proportion":
        drawn = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
        as_jpeg = drawn < settings.jpeg_probability
    return Plan(JPG if as_jpeg else RAW, width, height, as_jpeg and not shrink)


def store_sample(jpeg: bytes, key: str, where: str, settings: BetonSettings) -> Stored:
    """The sample as it is stored. Raises BetonError where it cannot be decoded, or FFCV cannot hold it."""
    plan = plan_sample(jpeg, key, where, settings)
    if plan.copied:
        return Stored(plan.mode, plan.width, plan.height, jpeg)
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as opened:
            image: Image.Image = opened.convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error... for damaged files
        raise BetonError(f"{where}: {key} cannot be decoded ({error}): rebuild the dataset with --force") from None
    if image.size != (plan.width, plan.height):
        image = image.resize((plan.width, plan.height), Image.Resampling.BICUBIC)
    if plan.mode == RAW:
        return Stored(plan.mode, plan.width, plan.height, image.tobytes())
    image.info.clear()  # otherwise PIL carries comments over
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=settings.quality)
    return Stored(plan.mode, plan.width, plan.height, encoded.getvalue())
