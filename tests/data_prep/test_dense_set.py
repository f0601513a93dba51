"""dataset.json of kind "dense" and its indexes: round trips, what they refuse; the two kinds know each other."""

import json

import numpy as np
import pytest

from data_prep.dense_set import DenseIndex, DenseManifest, DenseSplit
from data_prep.manifest import Manifest, ManifestError, ShardEntry, Split

ENTRY = ShardEntry(file="train-000000.tar", samples=2, bytes=3000, sha256="0" * 64)


def manifest() -> DenseManifest:
    split = DenseSplit(samples=2, class_images=[1, 2], class_annotations=[3, 4], shards=[ENTRY])
    return DenseManifest(
        name="m",
        dataset_id="d",
        task="instance",
        classes=["cat", "dog"],
        category_ids=[17, 18],
        splits={"train": split},
    )


def index(**changes: list[int]) -> DenseIndex:
    columns = {
        "image_offset": [512, 1600],
        "image_bytes": [20, 30],
        "json_offset": [1100, 2900],
        "json_bytes": [7, 100],
        "mask_offset": [0, 0],
        "mask_bytes": [0, 0],
        "width": [4, 5],
        "height": [6, 7],
    }
    return DenseIndex(np.array(["a", "bc"]), **{k: np.array(v) for k, v in (columns | changes).items()})


def test_round_trip_and_what_it_refuses(tmp_path):
    manifest().save(tmp_path)
    assert DenseManifest.load(tmp_path) == manifest()
    assert DenseManifest.load(tmp_path / "dataset.json") == manifest()
    raw = manifest().model_dump()
    train = raw["splits"]["train"]

    def refused(match: str, **changes) -> None:
        (tmp_path / "dataset.json").write_text(json.dumps({**raw, **changes}))
        with pytest.raises(ManifestError, match=match):
            DenseManifest.load(tmp_path)

    refused("1 category_ids, there are 2 classes", category_ids=[17])
    refused(r"category_ids listed twice: \[17\]", category_ids=[17, 17])
    refused("format_version 2, this code reads 1", format_version=2)
    refused("class_pixels has 0 entries, a semantic set of 2", task="semantic")
    refused("hold 2 samples together, samples is 3", splits={"train": {**train, "samples": 3}})
    refused("class_images has 3, there are 2 samples", splits={"train": {**train, "class_images": [3, 0]}})
    with pytest.raises(ManifestError, match="no split 'val'; it has train"):
        manifest().split("val")


def test_each_kind_is_told_from_the_other(tmp_path):
    manifest().save(tmp_path)
    with pytest.raises(ManifestError, match="is a data set of masks or boxes") as told:
        Manifest.load(tmp_path)
    assert "\n" not in str(told.value)
    split = Split(samples=2, class_counts=[2], shards=[ENTRY])
    Manifest(name="m", dataset_id="d", synsets=["n00000001"], splits={"train": split}).save(tmp_path)
    with pytest.raises(ManifestError, match="is a data set of images of classes"):
        DenseManifest.load(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(ManifestError, match="is no manifest of a dense"):
        DenseManifest.load(tmp_path)


def test_index_round_trip_and_what_it_refuses(tmp_path):
    path = tmp_path / "train-000000.index.npz"
    index().save(path)
    first = path.read_bytes()
    loaded = manifest().load_index(tmp_path, ENTRY)
    assert loaded.keys.tolist() == ["a", "bc"]
    assert loaded.json_offset.dtype == np.int64
    assert loaded.width.dtype == np.int32
    assert loaded.end() == 3000
    loaded.save(path)
    assert path.read_bytes() == first

    index(json_bytes=[7, 101]).save(path)
    with pytest.raises(ManifestError, match="points past the end"):
        manifest().load_index(tmp_path, ENTRY)
    index(mask_offset=[1, 1], mask_bytes=[1, 1]).save(path)
    with pytest.raises(ManifestError, match="is not of a set of the task instance"):
        manifest().load_index(tmp_path, ENTRY)
    with pytest.raises(ManifestError, match="lists 2 samples"):
        manifest().load_index(tmp_path, ENTRY.model_copy(update={"samples": 3}))
    path.write_bytes(first[:50])
    with pytest.raises(ManifestError, match="damaged"):
        DenseIndex.load(path)
    with pytest.raises(ManifestError, match="negative"):
        index(image_offset=[-1, 0])
    empty = DenseIndex.from_bytes(DenseIndex(*[np.array([])] * 9).to_bytes(), path)
    assert (len(empty), empty.end()) == (0, 0)
