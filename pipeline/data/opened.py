"""What a configuration's `data.path` opens, of one set or of several: manifest, order of training, reader."""

from __future__ import annotations

from data_prep.manifest import Manifest
from pipeline.config.data import Data
from pipeline.config.load import Config
from pipeline.config.sections import ConfigError
from pipeline.data.mixture import MixedManifest, MixedReader, TrainingOrder, joined, mixed_order
from pipeline.data.order import SampleOrder
from pipeline.data.shards import ShardReader, check_remote_files


def open_manifest(data: Data) -> Manifest:
    """The manifest of the indexed set, or of the sets, in `data.path`. Raises ManifestError."""
    if isinstance(data.path, str):
        return Manifest.load(data.path)
    return joined(data.sets, [Manifest.load(each.path) for each in data.sets])


def training_order(config: Config, manifest: Manifest) -> TrainingOrder:
    """The order of the training split. Raises ConfigError where it does not fill a global batch."""
    data, train = config.data, config.train
    try:
        if isinstance(manifest, MixedManifest):
            return mixed_order(manifest, data, train.global_batch, config.seed, config.augment.repeats)
        return SampleOrder(
            tuple(entry.samples for entry in manifest.split("train").shards),
            train.global_batch,
            config.seed,
            data.shuffle_lanes,
            data.shuffle_window_shards,
            config.augment.repeats,
            data.stream_shuffle_samples if data.reader == "stream" else None,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def open_reader(data: Data, manifest: Manifest, split: str) -> ShardReader | MixedReader:
    """The reader of an indexed split. Raises ManifestError; DataError where a local shard is not as it should be."""
    if isinstance(manifest, MixedManifest):
        return MixedReader(data, manifest, split)
    return ShardReader(data, manifest, split)


def parts_of(data: Data, manifest: Manifest) -> list[tuple[Data, Manifest]]:
    """Each set by itself."""
    if isinstance(manifest, MixedManifest):
        each = [data.model_copy(update={"path": one.path}) for one in data.sets]
        return list(zip(each, manifest.parts, strict=True))
    return [(data, manifest)]


def check_remote(data: Data, manifest: Manifest) -> None:
    """`check_remote_files` of each set that lies behind a URL. Raises DataError."""
    for part, part_manifest in parts_of(data, manifest):
        if "://" in part_manifest.shards_folder(part.folder):
            check_remote_files(part, part_manifest)
