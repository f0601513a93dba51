"""What is known of a set before its shards are read: which shards, how many samples, which classes."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator
from rich.console import Console
from rich.progress import track

from data_prep.credentials import without_credentials
from data_prep.labels.spaces import label_space
from data_prep.manifest import MANIFEST_NAME, Manifest, ManifestError, ShardEntry, Split, dataset_folder
from data_prep.storage import Folder
from pipeline.config.data import Data
from pipeline.config.fields import is_stream_of_urls
from pipeline.config.sections import ConfigError
from pipeline.data.opened import open_manifest
from pipeline.data.shards import DataError
from pipeline.data.stream.shard import Classes, LostSample, samples_of
from pipeline.data.stream.urls import Opener, beside, expand, is_local, names, open_url, read_json, shard_name

INFO_NAME = "_info.json"  # of timm's reader of WebDataset, and of the Hugging Face sets for it
_NO_SHA256 = "0" * 64


class StreamedSplit(Split):
    """A split of which nobody has counted the classes, nor perhaps the samples of each shard: then `shards` is one."""

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        return self


class StreamedManifest(Manifest):
    """A manifest made from what is known of tars that have none: sample counts and classes, no checksums."""

    splits: dict[str, StreamedSplit]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        return self


@dataclass(frozen=True)
class StreamedSet:
    """A set as streams have it. urls: the shards of each split; counted: the splits of which every shard's samples are
    known, in whose manifest the shards stand one by one.
    """

    manifest: Manifest
    urls: Mapping[str, tuple[str, ...]]
    counted: frozenset[str]


def load_manifest(data: Data, count_val: bool = True) -> Manifest:
    """The manifest of `data.path`, for either reader; made from what there is where a stream's shards have none.

    `count_val`: read the validation shards of data.stream_val, where nothing else tells how many samples are in them.
    Raises ConfigError, ManifestError, DataError, LabelError.
    """
    if data.reader == "indexed":
        return open_manifest(data)
    if is_stream_of_urls(data.folder):
        return _of_urls(data, count_val)
    folder = Folder(dataset_folder(data.folder))
    return Manifest.load(data.folder) if folder.exists(MANIFEST_NAME) else _of_info(data, folder)


def streamed_set(data: Data, manifest: Manifest) -> StreamedSet:
    """The shards of a set whose manifest is loaded. Raises ConfigError."""
    if not is_stream_of_urls(data.folder):
        folder = Folder(manifest.shards_folder(data.folder))
        urls = {
            name: tuple(_opened_as(folder, entry.file) for entry in split.shards)
            for name, split in manifest.splits.items()
        }
        return StreamedSet(manifest, urls, frozenset(urls))
    urls = {"train": expand("data.path", data.folder)}
    if data.stream_val is not None:
        urls["val"] = expand("data.stream_val", data.stream_val)
    counted = frozenset(name for name in urls if name == "val" or data.stream_samples_per_epoch is None)
    return StreamedSet(manifest, urls, counted)


def _opened_as(folder: Folder, name: str) -> str:
    return str(Path(folder.url) / name) if folder.is_local else folder.join(name)


def _of_info(data: Data, folder: Folder) -> Manifest:
    where = folder.join(INFO_NAME)
    try:
        told = _splits(read_json(_opened_as(folder, INFO_NAME)), where)
    except FileNotFoundError:
        raise ManifestError(
            f"{folder.url} holds neither {MANIFEST_NAME} nor {INFO_NAME}: for data.reader=stream give the shards' URLs "
            f"in data.path, with braces ({folder.url}/NAME-{{000000..000123}}.tar), or set data.reader=indexed"
        ) from None
    if data.stream_classes is None:
        raise ConfigError(
            f"{where} has no WordNet ids: set data.stream_classes to a file with one a line in the order of the class "
            "numbers, or to a name of `python -m data_prep labels --list`"
        )
    splits = {"val" if name in ("validation", "valid") else name: lengths for name, lengths in told.items()}
    if "train" not in splits:
        raise ManifestError(f"{where} has no split train; it has {', '.join(told) or 'none'}")
    files = {name: tuple(lengths) for name, lengths in splits.items()}
    return _made(data, files, {name: tuple(lengths.values()) for name, lengths in splits.items()}, folder.url)


def _of_urls(data: Data, count_val: bool) -> Manifest:
    urls = {"train": expand("data.path", data.folder)}
    lengths = {"train": _lengths_beside(urls["train"]) if data.stream_samples_per_epoch is None else None}
    if lengths["train"] is None and data.stream_samples_per_epoch is None:
        next(samples_of(urls["train"][0], open_url, Classes(())), None)  # nothing there at all: that is said first
        raise ConfigError(
            f"nothing tells how many samples are in {shard_name(urls['train'][0])}, ...: put an {INFO_NAME} beside the "
            "shards, in each of their folders (splits with filenames and shard_lengths), or set "
            "data.stream_samples_per_epoch"
        )
    if data.stream_val is not None:
        urls["val"] = expand("data.stream_val", data.stream_val)
        lengths["val"] = _lengths_beside(urls["val"])
        if lengths["val"] is None:
            lengths["val"] = _counted(urls["val"], data) if count_val else (1,) * len(urls["val"])
    return _made(data, urls, lengths, urls["train"][0])


def _made(
    data: Data, urls: dict[str, tuple[str, ...]], lengths: Mapping[str, tuple[int, ...] | None], name: str
) -> Manifest:
    assert data.stream_classes is not None
    synsets = label_space(data.stream_classes)
    total = data.stream_samples_per_epoch
    splits: dict[str, StreamedSplit] = {}
    for split, shards in urls.items():
        each = lengths[split]
        rows = (
            list(zip(names(shards), each, strict=True)) if each is not None else [(shard_name(shards[0]), total or 0)]
        )
        entries = [ShardEntry(file=file, samples=count, bytes=0, sha256=_NO_SHA256) for file, count in rows]
        splits[split] = StreamedSplit(samples=sum(count for _, count in rows), class_counts=[], shards=entries)
    # Not the places of the shards: a set that was copied is the same set.
    content = [*synsets, *(f"{split} {names(shards)}" for split, shards in sorted(urls.items()))]
    content.append(f"train {lengths['train'] or total}")
    return StreamedManifest(
        name=shard_name(name) if is_stream_of_urls(name) else name.rstrip("/").rpartition("/")[2],
        dataset_id=hashlib.sha256("\n".join(content).encode()).hexdigest()[:32],
        synsets=synsets,
        splits=splits,
        settings={"streamed": True},
    )


def _lengths_beside(urls: Sequence[str]) -> tuple[int, ...] | None:
    """Samples of each shard, by the _info.json beside it; None where there is none, or not in every folder."""
    told: dict[str, dict[str, int]] = {}
    lengths = []
    for url, name in zip(urls, names(urls), strict=True):
        where = beside(url, INFO_NAME)
        if where is None:
            return None
        if where not in told:
            try:
                splits = _splits(read_json(where), without_credentials(where))
            except FileNotFoundError:
                return None
            told[where] = {file: length for each in splits.values() for file, length in each.items()}
        if name not in told[where]:
            raise DataError(f"{without_credentials(where)} does not name {name}: write it again, or leave that out")
        lengths.append(told[where][name])
    return tuple(lengths)


def _splits(info: Any, where: str) -> dict[str, dict[str, int]]:
    """File name -> samples, of each split of an _info.json. Raises ManifestError."""
    try:
        splits = {}
        for name, split in info["splits"].items():
            files, lengths = split["filenames"], split["shard_lengths"]
            splits[name] = {str(file): int(length) for file, length in zip(files, lengths, strict=True)}
            total = sum(splits[name].values())
            if min(splits[name].values(), default=0) < 0 or split.get("num_samples", total) != total:
                raise ValueError(f"shard_lengths of {name} are below 0, or do not add up to its num_samples")
        return splits
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(
            f"{where} is not as timm's reader of WebDataset takes it ({type(error).__name__}: {error}): splits of "
            "filenames and shard_lengths"
        ) from None


def _counted(urls: Sequence[str], data: Data) -> tuple[int, ...]:
    opener, classes = Opener(data), Classes(label_space(data.stream_classes or ""))
    screen = Console(stderr=True)
    told = track(urls, "counting data.stream_val", console=screen, transient=True, disable=not screen.is_terminal)
    lengths = []
    for url in told:
        lengths.append(0)
        for sample in samples_of(url, opener, classes):
            if isinstance(sample, LostSample):
                raise sample
            lengths[-1] += 1
    if not screen.is_terminal:
        print(f"counted data.stream_val: {sum(lengths):,} samples in {len(urls):,} shards", file=sys.stderr, flush=True)
    return tuple(lengths)


def look_into(found: StreamedSet, data: Data, split: str, say: Callable[[str], None]) -> None:
    """Look whether local shards are there, and read the first sample of a split's first and last shard.

    What a run would do without, by data.on_bad_sample, is only said. Raises DataError.
    """
    opener, classes, urls = Opener(data), Classes(found.manifest.synsets), found.urls[split]
    missing = {url for url in urls if is_local(url) and not Path(url.removeprefix("file:")).is_file()}
    skip = split == "train" and data.on_bad_sample == "skip"
    for url in dict.fromkeys((*sorted(missing), urls[0], urls[-1])):
        try:
            first = next(samples_of(url, opener, classes), None)
            if isinstance(first, LostSample):
                raise first
        except DataError as error:
            if not skip:
                raise
            say(str(error))
            continue
        if first is None:
            say(f"shard {without_credentials(url)} holds no sample")
