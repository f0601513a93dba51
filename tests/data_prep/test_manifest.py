"""dataset.json and shard indexes: round trips, and what they refuse."""

import json

import numpy as np
import pytest

from data_prep.manifest import BetonEntry, Manifest, ManifestError, ShardEntry, ShardIndex, Split, index_path
from data_prep.storage import atomic_write


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines([b"half", None])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_manifest_round_trip_and_what_it_refuses(tmp_path):
    entry = ShardEntry(file="train-000000.tar", samples=2, bytes=10, sha256="0" * 64)
    beton = BetonEntry(**entry.model_dump(), page_size_bytes=1 << 23, max_height=3, max_width=4)
    split = Split(samples=2, class_counts=[1, 1], shards=[entry], betons=[beton])
    manifest = Manifest(name="m", dataset_id="d", synsets=["n00000001", "n00000002"], splits={"train": split})
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    raw = manifest.model_dump()

    def refused(match: str, **changes) -> None:
        (tmp_path / "dataset.json").write_text(json.dumps({**raw, **changes}))
        with pytest.raises(ManifestError, match=match):
            Manifest.load(tmp_path)

    refused("not a WordNet id", synsets=["dog", "n00000002"])
    refused("listed twice: n00000001", synsets=["n00000001", "n00000001"])
    refused("2 entries", synsets=["n00000001"])
    refused("format_version 3, this code reads 2", format_version=3)
    refused("extra: Extra inputs are not permitted", extra=1)
    refused(
        "hold 2 samples together, samples is 3",
        splits={"train": {**raw["splits"]["train"], "samples": 3, "class_counts": [1, 2]}},
    )
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ManifestError, match="not readable JSON"):
        Manifest.load(tmp_path)
    with pytest.raises(ManifestError, match="does not exist"):
        Manifest.load(tmp_path / "nowhere")


def test_shard_index_round_trip_and_what_it_refuses(tmp_path):
    path = index_path(tmp_path / "train-000000.tar")
    assert path.name == "train-000000.index.npz"
    index = ShardIndex(np.array(["a", "bc"]), np.array([512, 2048]), np.array([7, 9]), np.array([0, 1]))
    index.save(path)
    first = path.read_bytes()
    loaded = ShardIndex.load(path)
    loaded.save(path)
    assert path.read_bytes() == first
    assert loaded.keys.tolist() == ["a", "bc"]
    assert (loaded.offsets.dtype, loaded.sizes.dtype, loaded.labels.dtype) == (np.int64, np.int64, np.int32)
    ShardIndex(*(np.array([]) for _ in range(4))).save(path)
    assert len(ShardIndex.load(path)) == 0
    with pytest.raises(ManifestError, match="differ in length"):
        ShardIndex(index.keys, index.offsets, index.sizes, np.array([0]))
    path.write_bytes(first[:300])
    with pytest.raises(ManifestError, match="damaged"):
        ShardIndex.load(path)
    path.unlink()
    with pytest.raises(ManifestError, match="missing"):
        ShardIndex.load(path)
