"""What can be known to be wrong before ranks are started: configuration, files, batch, checkpoints, start weights.

Nothing here imports torch or timm, which take seconds, unless the configuration asks for what they alone can judge.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.foreign.index import ensure_indexed
from data_prep.manifest import Manifest
from data_prep.storage import Folder, is_url, refuse_unwritable
from pipeline.checkpoints.choice import check_model, find_source, newest_of_run
from pipeline.checkpoints.files import locate, read_meta
from pipeline.config.load import Config
from pipeline.data.beton_file import beton_path
from pipeline.data.opened import check_remote, open_manifest, open_reader, parts_of, training_order
from pipeline.data.order import validation_samples
from pipeline.records.address import probe
from pipeline.records.run_id import CONFIG_FILE, SUMMARY_FILE
from pipeline.training.initial import fetch, local_init

# RandAugment that is read here and on the device for certain; what else may be, and why not, timm has to say.
_PLAIN_RAND_AUGMENT = re.compile(r"rand(-[mn]\d+|-(p|mstd)\d+(\.\d+)?|-inc[01])*")


def note(text: str) -> None:
    """What will work, but not as well as it could."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def _any_remote(config: Config, manifest: Manifest) -> bool:
    return any(is_url(part.shards_folder(data.folder)) for data, part in parts_of(config.data, manifest))


def _tell_of_lanes(config: Config, manifest: Manifest, nodes: int) -> None:
    data, split = config.data, manifest.split("train")
    if data.reader == "stream":
        return
    if data.shuffle_lanes > 1 and data.shuffle_lanes % nodes:
        note(
            f"{nodes} nodes share {data.shuffle_lanes} lanes (data.shuffle_lanes) unevenly: each reads shards of "
            f"others too, up to 1.5 times its part; a multiple of {nodes} is best"
        )
    used = data.shuffle_lanes / nodes * (data.shuffle_window_shards + 1) / max(1, len(split.shards))
    used_gb = min(1.0, used) * sum(entry.bytes for entry in split.shards) / 1e9
    if _any_remote(config, manifest) and 0 < data.cache_gb < used_gb:
        note(
            f"the shards that a node reads from at a time take some {used_gb:.0f} GB, data.cache_gb is "
            f"{data.cache_gb:g}: what does not fit is read image by image over the network"
        )


def _check_stream(config: Config, manifest: Manifest, ranks: int | None, splits: Sequence[str]) -> None:
    """The lanes, and the first samples: the rest of a stream shows when it is read."""
    stream = importlib.import_module("pipeline.data.stream.manifest")
    found = stream.streamed_set(config.data, manifest)
    importlib.import_module("pipeline.data.stream.reader").check_lanes(config, found, ranks)
    for split in splits:
        stream.look_into(found, config.data, split, note)


def tell_of_unfinished(path: Path) -> None:
    """A run that was stopped is no less a source: that is wanted seldom, and seen late."""
    if (path / CONFIG_FILE).is_file() and not (path / SUMMARY_FILE).exists():
        step = read_meta(locate(path)).step
        note(f"init.checkpoint {path} is a run that has not finished: its weights are those of step {step:,}")


def preflight(config: Config, ranks: int | None, nodes: int, resume: bool) -> None:
    """Check what a run of `config` would trip over on every rank, before any is started. Raises the same errors.

    `ranks` is their number, where it is known before the launch, on `nodes` hosts.
    """
    refuse_unwritable(Folder(config.run_dir), "set another output_root")
    streamed = config.data.reader == "stream"
    if not streamed:
        for each in config.data.sets:
            ensure_indexed(each.path)
        manifest = open_manifest(config.data)
    else:  # by way of webdataset, which imports torch
        manifest = importlib.import_module("pipeline.data.stream.manifest").load_manifest(config.data, count_val=False)
    if streamed:
        if config.data.stream_cache:
            refuse_unwritable(Folder(config.data.cache_folder.expanduser()), "set another data.cache_folder")
    elif _any_remote(config, manifest) and config.data.cache_gb:
        refuse_unwritable(Folder(config.data.cache_folder.expanduser()), "set another data.cache_folder")
    training_order(config, manifest)
    splits = ("train", "val") if validation_samples(config, manifest) else ("train",)
    if ranks is not None:
        config.train.accumulation_steps(ranks)
    _tell_of_lanes(config, manifest, nodes)
    if config.data.format == "webdataset" and importlib.util.find_spec("pipeline.data._jpeg") is None:
        note("the compiled JPEG decoder is missing: decoding takes a third more time; see launch/setup.sh")
    if streamed:
        _check_stream(config, manifest, ranks, splits)
    elif config.data.format == "webdataset":
        for split in splits:
            open_reader(config.data, manifest, split)
        check_remote(config.data, manifest)
    last, _ = newest_of_run(config, manifest.dataset_id, resume, hashes=False)
    if last is None and config.init.checkpoint is not None:
        fetch(config)
        source = find_source(local_init(config))
        check_model(source, config.model.name)
        tell_of_unfinished(config.init.checkpoint)
        if not source.is_ours:
            importlib.import_module("pipeline.checkpoints.transfer").check_fit(config, source, manifest.synsets)
    probe(config, note)
    policy = config.augment.rand_augment
    if policy and not _PLAIN_RAND_AUGMENT.fullmatch(policy):
        if config.augment.where == "device":
            importlib.import_module("pipeline.data.device_augment").DeviceAugment(config.augment)
        else:
            importlib.import_module("pipeline.data.augment").training_transform(config.augment, config.data.resolution)
    if config.data.format == "ffcv":  # last: it imports FFCV, and with it torch
        for split in splits:
            beton_path(config.data.folder, manifest, split)
