"""The images of a run before they are there: how many, of how many classes and bytes; and what reading them takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.manifest import MANIFEST_NAME
from pipeline.config.dense import SegmentConfig
from pipeline.config.load import Config
from pipeline.config.run import RunConfig
from pipeline.config.sections import ConfigError
from pipeline.data.mixture import MixedManifest
from pipeline.data.opened import open_manifest, training_order
from pipeline.dense.opened import dense_order, open_dense

# What is assumed where data.path is not there: a word of its path or the run's name, then images, classes, bytes an
# image of shards made with the default settings (data_prep/README.md), what it is called.
_KNOWN: tuple[tuple[str, int, int, float, str], ...] = (
    ("demo-22k", 4_500, 50, 6e3, "about the demo's"),
    ("demo-1k", 1_100, 24, 6e3, "about the demo's"),
    ("fall11", 14_197_122, 21_841, 102e3, "ImageNet-22K, fall 2011"),
    ("1k", 1_281_167, 1_000, 114e3, "ImageNet-1K"),
    ("22k", 13_153_500, 19_167, 91e3, "ImageNet-22K, winter 2021"),
    ("", 13_153_500, 19_167, 91e3, "ImageNet-22K, winter 2021"),
)
# The same of sets with masks; their bytes are an image's and its mask's.
_KNOWN_DENSE: tuple[tuple[str, int, int, float, str], ...] = (
    ("demo", 2_000, 25, 24e3, "about the demo's"),
    ("", 20_210, 150, 42e3, "ADE20K"),
)
# CPU seconds of an image by side, measured on one core of a server (tests/bench/RESULTS.md, images of 68 kB); and how
# many times as long another way takes.
_CPU_SECONDS = {224: 1.54e-3, 384: 1.79e-3}
_HOST_AUGMENT = {224: 3.0, 384: 6.6}
_STREAMED = {224: 1.1, 384: 1.35}
_FFCV = {224: 2.0, 384: 1.7}
_DENSE_PIXEL_SECONDS = 6.1e-8  # decoded, resized, cropped, colours: of the crop's pixels (RESULTS.md)
_OPENED_TWICE = 1.02  # of what it trains on, a node reads so much (RESULTS.md, the order of samples)


@dataclass(frozen=True)
class Images:
    """Training images of an epoch, classes, bytes of one; `known_by`: where that is from."""

    count: int
    classes: int
    bytes_each: float
    steps_per_epoch: int
    known_by: str


def images_of(config: RunConfig, count: int | None, classes: int | None) -> Images:
    """From the manifest where data.path is a folder that is there, else assumed; `count` and `classes` go before both.

    Raises ManifestError for a folder that is no data set, ConfigError where the images do not fill a global batch, or
    of a set that cannot be trained on.
    """
    if not isinstance(config, Config):
        return _dense_images(config, count, classes)
    data, batch = config.data, config.train.global_batch
    local = all("://" not in each.path and Path(each.path).exists() for each in data.sets)
    if local and data.reader == "indexed" and count is None:
        manifest = open_manifest(data)
        split = manifest.split("train")
        steps = training_order(config, manifest).steps_per_epoch
        total = sum(entry.bytes for entry in split.shards)
        if data.format == "ffcv" and split.betons:
            total = sum(entry.bytes for entry in split.betons)
        known_by = f"{MANIFEST_NAME} of {data.shown_path}"
        if isinstance(manifest, MixedManifest):
            known_by += " (mixed)"
        return Images(split.samples, classes or manifest.num_classes, total / max(1, split.samples), steps, known_by)
    text = f"{data.shown_path} {config.name}".lower()
    _, images, known_classes, size, what = next(row for row in _KNOWN if row[0] in text)
    known_by = "--images"
    if data.stream_samples_per_epoch is not None and count is None:
        count, known_by = data.stream_samples_per_epoch, "data.stream_samples_per_epoch"
    if count is None:
        here = local or "://" in data.shown_path or data.reader != "indexed"
        why = f"{data.shown_path} is not {'read' if here else 'here'} (--images, --classes)"
        known_by = f"assumed: {what}; {why}"
    else:
        known_by += ", --classes" if classes is not None else f"; classes assumed: {what} (--classes)"
    found = images if count is None else count
    return Images(found, classes or known_classes, size, _steps(found, batch), known_by)


def _steps(images: int, batch: int) -> int:
    """Of an epoch."""
    if images < batch:
        raise ConfigError(
            f"{images:,} training images do not fill one global batch of {batch}; lower train.global_batch"
        )
    return images // batch


def _dense_images(config: RunConfig, count: int | None, classes: int | None) -> Images:
    """Of a set with masks."""
    path, batch = config.data.path, config.train.global_batch
    if Path(path).exists() and count is None and isinstance(config, SegmentConfig):
        manifest = open_dense(config)
        split, steps = manifest.split("train"), dense_order(config, manifest).steps_per_epoch
        size = sum(entry.bytes for entry in split.shards) / max(1, split.samples)
        return Images(split.samples, classes or manifest.num_classes, size, steps, f"{MANIFEST_NAME} of {path}")
    _, images, known_classes, size, what = next(
        row for row in _KNOWN_DENSE if row[0] in f"{path} {config.name}".lower()
    )
    if count is None:
        known_by = f"assumed: {what}; {path} is not {'read' if Path(path).exists() else 'here'} (--images, --classes)"
    else:
        known_by = "--images" + (", --classes" if classes is not None else f"; classes assumed: {what} (--classes)")
    found = images if count is None else count
    return Images(found, classes or known_classes, size, _steps(found, batch), known_by)


@dataclass(frozen=True)
class LoaderNeed:
    """What one node's loader has to give for `images_per_second`."""

    images_per_second: float
    cores: float
    disk_bytes_per_second: float
    network_bytes_per_second: float


def loader_need(config: RunConfig, images: Images, images_per_second: float) -> LoaderNeed:
    """`images_per_second`: what the GPUs of one node take. Network: where the set is behind a URL, else none."""
    read = images_per_second * images.bytes_each * _OPENED_TWICE
    if not isinstance(config, Config):
        cores = images_per_second * _DENSE_PIXEL_SECONDS * config.data.resolution**2
        return LoaderNeed(images_per_second, cores, read, 0.0)
    side = config.data.largest_resolution
    seconds = _between(_CPU_SECONDS, side)
    if config.data.format == "ffcv":
        seconds *= _between(_FFCV, side)
    elif config.augment.where == "host":
        seconds *= _between(_HOST_AUGMENT, side)
    if config.data.reader == "stream":
        seconds *= _between(_STREAMED, side)
    remote = config.data.is_remote
    return LoaderNeed(images_per_second, images_per_second * seconds, read, read if remote else 0.0)


def _between(known: dict[int, float], side: int) -> float:
    """A line through the two sides that were measured, and level outside of them."""
    (small, low), (large, high) = known.items()
    share = min(1.0, max(0.0, (side - small) / (large - small)))
    return low + share * (high - low)
