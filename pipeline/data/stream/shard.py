"""The samples of one shard, by webdataset's expander of tars, in the order they stand in."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_expander

from data_prep.credentials import without_credentials
from data_prep.foreign.classes import IMAGES, Told, class_of, is_of_sample
from pipeline.data.shards import DataError
from pipeline.data.stream.urls import Opener
from pipeline.data.stream.whole import WholeTar


class LostSample(DataError):
    """A sample that a shard should hold, and does not or not whole. data.on_bad_sample=skip does without it."""


class StreamedImage(bytes):
    """The file of an image, with its class number, and where it was found, for messages.

    lost: the fault of a shard that cannot be read, in whose sample's place it stands, or behind which it comes;
    stand_in: its own number then.
    """

    label: int
    where: str
    lost: str = ""
    stand_in: int = -1

    @classmethod
    def of(cls, data: bytes, label: int, where: str) -> StreamedImage:
        image = cls(data)
        image.label, image.where = label, where
        return image


class Classes:
    """From what a sample says of its class to the class number in `synsets`."""

    def __init__(self, synsets: Sequence[str]) -> None:
        self.count = len(synsets)
        self._numbers: Mapping[str, int] = {wnid: number for number, wnid in enumerate(synsets)}

    def number(self, told: Told) -> int:
        """-1 for a class that is none of them. As in tars that are indexed, a WordNet id counts before a number."""
        if told.wnid:
            return self._numbers.get(told.wnid, -1)
        return told.number if told.number < self.count else -1


def samples_of(
    url: str, opener: Callable[[str], BinaryIO], classes: Classes
) -> Generator[StreamedImage | LostSample, None, None]:
    """Every sample of a shard that has an image or a class, once; a LostSample for one that lacks either.

    Raises DataError where the shard cannot be opened, or is not whole, when that is met.
    """
    with closing(WholeTar(opener(url), url)) as tar:
        source: Any = [{"url": url, "stream": tar}]
        try:
            for sample in group_by_keys(tar_file_expander(source, select_files=is_of_sample)):
                found = _image(sample, url, classes)
                if found is not None:
                    yield found
            tar.finish()
        except Exception as error:  # ours, tarfile's and webdataset's own
            if isinstance(opener, Opener):
                opener.forget(url)
            text = _without_stream(error, tar)
            if not isinstance(error, DataError):
                text = f"shard {without_credentials(url)}: {' '.join(text.split()) or type(error).__name__}"
            raise DataError(text) from None


def _without_stream(error: Exception, tar: WholeTar) -> str:
    """A message without what webdataset puts behind it: the stream as Python shows it, an address of each run's own."""
    return str(error.args[0] if error.args else error).removesuffix(f" @ {tar}")


def _image(sample: Mapping[str, Any], url: str, classes: Classes) -> StreamedImage | LostSample | None:
    data = next((sample[kind] for kind in IMAGES if kind in sample), None)
    told = class_of(sample["__key__"], sample.get("cls"), sample.get("json"))
    dotted = sorted(kind for kind in sample if kind.rpartition(".")[2] in IMAGES)
    if data is None and not dotted and not ({"cls", "json"} & sample.keys()):
        return None  # a note beside the samples
    where = f"shard {without_credentials(url)}: sample {sample['__key__']!r}"
    if data is None:
        why = f": it has {', '.join(dotted[:3])}, and a key ends at its first dot" if dotted else ""
        return LostSample(f"{where} has no image{why}")
    label = classes.number(told)
    if label < 0:
        has = f"has the class {told.wnid or told.number}, which is none of" if told else "has no class, of"
        return LostSample(f"{where} {has} the set's {classes.count:,}: see to data.stream_classes")
    return StreamedImage.of(data, label, where)
