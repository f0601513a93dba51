"""A sample's bytes to a training view of it, and what happens when they are no image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.storage import atomic_write
from pipeline.config.data import Data
from pipeline.config.load import Config
from pipeline.data.decode import DecodeError
from pipeline.data.keyed import uniform_one, view_keys
from pipeline.data.order import MicroBatch
from pipeline.data.shards import DataError, EncodedReader
from pipeline.data.stream.shard import LostSample, StreamedImage
from pipeline.ranks.log_file import LogFile

_STAND_IN_DRAW = 1 << 20  # far from the draws of augmentation
_STAND_INS = 8


class BadSample(NamedTuple):
    """A training sample that does not decode, and the one that took its place."""

    sample: int
    epoch: int
    error: str
    stand_in: int


class Batch(NamedTuple):
    """A micro-batch of one rank.

    images: float32 (B, 3, H, W) normalised, or uint8 (B, 3, H, W) where the device does the rest: in training the
    augmentation but for crop and mirroring, in evaluation the normalisation; labels int64 (B,); samples int64 (B,), the
    sample ids; views int64 (B,), what the augmentation is keyed by (order.py); bad: the samples of this batch that
    others stand in for.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    views: torch.Tensor
    bad: tuple[BadSample, ...] = ()


Drawn = tuple[int, int, list[BadSample]]  # sample, label, the bad samples in whose place it stands


class Views:
    """Draws the views of a micro-batch one by one, and finds stand-ins for samples that do not decode.

    With data.on_bad_sample=skip a bad sample's place is taken by another, drawn from the view's key: the number of
    steps stays the same on all ranks, and a run that is resumed draws the same one. It is any sample of the set, but
    one of the same micro-batch where the set is read as a stream.
    """

    def __init__(self, config: Config, reader: EncodedReader) -> None:
        self.reader, self.seed = reader, config.seed
        self.skip = config.data.on_bad_sample == "skip"

    def keys(self, micro: MicroBatch) -> list[int]:
        """The 64-bit keys of the views, as Python's integers."""
        return view_keys(self.seed, micro.views).tolist()

    def draw(
        self,
        sample: int,
        micro: MicroBatch,
        key: int,
        data: bytes | DataError,
        render: Callable[[bytes, int], None],
        others: Sequence[bytes | DataError] | None,
    ) -> Drawn:
        """Call render(bytes, key) with the sample's `data`, or a stand-in's; returns its (sample, label, bad samples).

        `others`: the data of the whole micro-batch, where it was read at once. `render` raises DecodeError for what is
        no image. Raises DataError where samples may not be skipped, eight stand-ins are bad too, or bytes cannot be
        read: a network that is down must not change what is trained on.
        """
        bad: list[BadSample] = []
        wanted = sample
        if isinstance(data, StreamedImage) and data.lost:
            bad.append(BadSample(sample, micro.epoch, data.lost, data.stand_in))
            sample = data.stand_in
        for attempt in range(_STAND_INS + 1):
            if isinstance(data, LostSample):
                damage: DataError = data
            elif isinstance(data, DataError):
                raise data
            else:
                try:
                    render(data, key)
                    return sample, self.reader.label_of(sample, data), bad
                except DecodeError as error:
                    damage = self.reader.damaged(sample, error, data)
            if not self.skip:
                raise damage
            stand_in, data = self._stand_in(uniform_one(key, _STAND_IN_DRAW + attempt), micro, others)
            bad.append(BadSample(sample, micro.epoch, str(damage), stand_in))
            sample = stand_in
        raise DataError(
            f"sample {wanted} and the {_STAND_INS} drawn to stand in for it do not decode; the last: {bad[-1].error}"
        )

    def _stand_in(
        self, drawn: float, micro: MicroBatch, others: Sequence[bytes | DataError] | None
    ) -> tuple[int, bytes | DataError]:
        if not self.reader.random_access:
            assert others is not None
            slot = int(drawn * len(others))
            return int(micro.samples[slot]), others[slot]
        sample = int(drawn * len(self.reader))
        return sample, self.reader.encoded_many([sample])[0]


class BadSampleLedger:
    """What was skipped: one JSON line a sample in `folder`, a file for each rank, and the count of this epoch.

    A run that goes on from `first_step` drops the lines of the steps that it runs again; rank 0 does so for all ranks,
    and counts what their files hold of the epoch under way. No rank may add before that.
    """

    def __init__(self, folder: Path, rank: int, first_step: int = 0, epoch: int = 0) -> None:
        self.path = folder / f"rank-{rank:05}.jsonl"
        self.epoch, self.count = epoch, 0
        self._file: LogFile | None = None  # made by the first `add`: rank 0 cuts all ranks' files before
        for path in sorted(folder.glob("rank-*.jsonl")) if rank == 0 else ():
            lines = []
            for text in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # the last line of a killed run may be cut
                    lines.append(json.loads(text))
            kept = [line for line in lines if line["step"] < first_step]
            with atomic_write(path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            self.count += sum(line["epoch"] == epoch for line in kept)

    def begin(self, epoch: int) -> None:
        """The steps that follow are of `epoch`."""
        if epoch != self.epoch:
            self.epoch, self.count = epoch, 0

    def add(self, step: int, bad: tuple[BadSample, ...]) -> None:
        """Note the bad samples of one micro-batch of the run's step `step`."""
        if not bad:
            return
        self.count += len(bad)
        if self._file is None:
            with suppress(OSError):  # a disk that is full: lines wait
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = LogFile(self.path)
            self._file.cut(lambda line: True)
        for sample in bad:
            self._file.append(json.dumps({"step": step, **sample._asdict()}))


def check_bad_samples(count: int, data: Data, folder: Path) -> None:
    """Raise DataError when an epoch has had more bad samples, over all ranks, than data.bad_samples_max."""
    if count > data.bad_samples_max:
        raise DataError(
            f"{count} training samples of this epoch could not be read, data.bad_samples_max is "
            f"{data.bad_samples_max}: {folder} lists them; {data.how_to_check}"
        )


def numbers_of(drawn: list[Drawn], views: np.ndarray) -> tuple[np.ndarray, tuple[BadSample, ...]]:
    """(labels, samples, views as int64 (3, B); bad samples) of what `Views.draw` returned for each of `views`."""
    samples, labels, bad = zip(*drawn, strict=True)
    return np.array([labels, samples, views], np.int64), tuple(sample for each in bad for sample in each)


def assemble(images: torch.Tensor, numbers: np.ndarray, bad: tuple[BadSample, ...] = ()) -> Batch:
    """The batch of images (B, 3, H, W) and the rows of `numbers` (3, B): labels, samples, views."""
    labels, samples, views = torch.from_numpy(numbers)
    return Batch(images, labels, samples, views, bad)
