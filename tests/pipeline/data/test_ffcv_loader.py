"""FFCV's hangs and leaks: each an error within seconds, with threads and memory given back."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.manifest import Manifest
from pipeline.data.decode import decode_rgb
from pipeline.data.keyed import crop_box, uniform_one
from pipeline.data.loader import Ranks, training_batches
from pipeline.data.shards import DataError
from pipeline.data.views import Batch
from tests.support.datasets import Datasets, needs_ffcv
from tests.support.image_kinds import PHOTOS, encoded
from tests.support.loading import ON_DEVICE, configured, expected, numbers, read
from tests.support.processes import PATIENCE_SECONDS

pytestmark = needs_ffcv
FFCV = ("data.format=ffcv", "data.workers_per_rank=1", ON_DEVICE)


@pytest.fixture
def changed(datasets: Datasets, tmp_path: Path):
    """A copy of the set, and a function that zeroes the first bytes of a sample of its training `.beton`."""
    copy = tmp_path / "copy"
    shutil.copytree(datasets.in22k, copy)
    path = copy / Manifest.load(copy).split("train").betons[0].file

    def change(sample: int, zeros: int) -> str:
        from ffcv.reader import Reader

        reader = Reader(str(path))
        content = bytearray(path.read_bytes())
        pointer = int(reader.metadata["f0"]["data_ptr"][sample])
        content[pointer : pointer + zeros] = bytes(zeros)
        path.write_bytes(content)
        return f"data.path={copy}"

    return change


def test_a_record_that_does_not_decode(datasets: Datasets, changed) -> None:
    """FFCV itself hands out what its buffer held. Raised, or another image of the batch stands in."""
    changed(7, zeros=100)
    option = changed(50, zeros=100)
    with pytest.raises(DataError, match=r"train\.beton: sample (7|50) does not decode"):
        read(datasets, 0, 6, option, *FFCV)
    batches = read(datasets, 0, 6, option, *FFCV, "data.on_bad_sample=skip")
    assert {bad.sample for batch in batches for bad in batch.bad} == {7, 50}
    found, wanted = numbers(batches), expected(datasets, 0, 6)
    places = np.isin(wanted[0], [7, 50])
    assert (found[:, ~places] == wanted[:, ~places]).all()
    assert not set(found[0, places]) & {7, 50}


def test_a_thread_that_dies(datasets: Datasets, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV's consumer would wait for it for ever. What it had read before is still given."""
    from ffcv.loader.epoch_iterator import EpochIterator

    run = EpochIterator.run_pipeline

    def fails(self: EpochIterator, number: int, *rest: Any) -> Any:
        if number == 2:
            raise RuntimeError("a reading thread that fails, as its test wants it")
        return run(self, number, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", fails)  # the data worker is forked from this process
    config, manifest, order = configured(datasets, *FFCV)
    found: list[Batch] = []
    with pytest.raises(DataError, match=r"train\.beton: FFCV's reading thread died"):
        found.extend(training_batches(config, manifest, order, Ranks(), 0, 6))
    assert (numbers(found) == expected(datasets, 0, 6)[:, :8]).all()


def test_an_epoch_left_early_gives_its_thread_back(datasets: Datasets) -> None:
    from pipeline.data.ffcv_decoders import training_decoder
    from pipeline.data.ffcv_loader import OrderedLoader

    path = datasets.in22k / Manifest.load(datasets.in22k).split("train").betons[0].file
    loader = OrderedLoader(path, training_decoder(32, 0.1, 0, 0.5, 96), batch=4, threads=1, cache="process")
    before = threading.active_count()
    for epoch in range(3):
        batches = loader.batches(np.arange(96) + 96 * epoch)
        next(batches)
        batches.close()
    # The page readers of FFCV's process cache end by themselves a moment later.
    for thread in threading.enumerate():
        if type(thread).__name__ == "PageReader":
            thread.join(PATIENCE_SECONDS)
    assert threading.active_count() == before
    assert [len(pixels) for pixels, _ in loader.batches(np.arange(10))] == [4, 4, 2]


def test_compiled_draws_are_the_interpreted_ones() -> None:
    from pipeline.data.ffcv_decoders import keyed_crop, keyed_uniform

    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, key = *map(int, rng.integers(8, 800, 2)), int(rng.integers(0, 2**63))
        assert keyed_uniform(np.uint64(key), 5) == uniform_one(key, 5)
        assert keyed_crop(height, width, 0.08, np.uint64(key)) == crop_box(height, width, 0.08, key)


def test_ffcv_decodes_with_the_fast_dct() -> None:
    """Near Pillow's pixels, but not these, as configs/README.md says; ours are."""
    from ffcv.libffcv import imdecode

    for photo in PHOTOS:
        for quality in (75, 90, 95):
            data = encoded(photo, quality=quality)
            width, height = photo.size
            pixels = np.zeros((height, width, 3), np.uint8)
            assert imdecode(np.frombuffer(data, np.uint8), pixels, *2 * (height, width), 0, 0, 1, 1, False, False) == 0
            off = np.abs(pixels.astype(int) - decode_rgb(data))
            assert 1 <= off.max() <= 16
            assert 0 < off.mean() < 2
