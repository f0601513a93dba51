"""One built set, read by everybody's readers with nothing but the folder: the same images and labels, each once."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.manifest import Manifest
from pipeline.config.load import load
from pipeline.data.shards import ShardReader
from tests.support.archives import archive, shard
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT

Seen = Counter[tuple[str, int]]  # digest of the pixels, label


def seen(samples: Iterable[tuple[Any, int]]) -> Seen:
    """Of (picture, label) pairs; a picture is what numpy takes for uint8 (height, width, 3)."""
    return Counter((hashlib.sha256(np.ascontiguousarray(image, np.uint8)).hexdigest(), int(y)) for image, y in samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("readers")
    assert shard(archive(at / "source.tar", 17), at / "set", "--val-per-class", "3") == 0
    return at / "set"


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, Seen]:
    """As our own reader finds them."""
    config = load(ROOT / "configs" / "demo_pretrain.yaml", [f"data.path={folder}"])
    found = {}
    for split in ("train", "val"):
        reader = ShardReader(config.data, Manifest.load(folder), split)
        found[split] = seen((pil(reader.encoded(i)), reader.label(i)) for i in range(len(reader)))
    assert [sum(found[split].values()) for split in ("train", "val")] == [42, 9]
    assert len(found["train"]) == 42
    return found


def pil(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def test_webdataset(folder: Path, truth: dict[str, Seen]) -> None:
    import webdataset as wds

    for split, braces in (("train", "train-{000000..000004}.tar"), ("val", "val-000000.tar")):
        dataset = wds.WebDataset(str(folder / braces), shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
        assert seen(dataset) == truth[split]


RANK = """
import json, sys
import torch, webdataset as wds
from tests.data_prep.shards.test_readers import seen
urls, out, rank = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{out}-meet", rank=int(rank), world_size=2)
dataset = wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node)
loader = wds.WebLoader(dataset.decode("pil").to_tuple("jpg", "cls"), batch_size=None, num_workers=2)
found = [[*key, count] for key, count in seen(loader).items()]
torch.distributed.barrier()
with open(f"{out}-{rank}", "w") as file:
    json.dump(found, file)
"""


def test_webdataset_on_two_ranks(folder: Path, truth: dict[str, Seen], tmp_path: Path) -> None:
    """gloo, two workers each; shards go to ranks and workers by the library's split_by_node and split_by_worker."""
    command = [sys.executable, "-c", RANK, str(folder / "train-{000000..000004}.tar"), str(tmp_path / "rank")]
    ranks = [subprocess.Popen([*command, f"{rank}"], cwd=ROOT) for rank in range(2)]
    assert [rank.wait(PATIENCE_SECONDS) for rank in ranks] == [0, 0]
    parts = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert all(parts)
    union: Seen = Counter()
    for digest, label, count in (row for part in parts for row in part):
        union[digest, label] += count
    assert union == truth["train"]


@pytest.mark.parametrize("is_training", [False, True])
def test_timm(folder: Path, truth: dict[str, Seen], is_training: bool) -> None:
    """Nothing is told but the folder and timm's own names of splits; it looks for validation where none is named."""
    from timm.data import create_dataset

    for split, ours in (({}, "val"), ({"split": "validation"}, "val"), ({"split": "train"}, "train")):
        dataset = create_dataset("wds/set", root=str(folder), is_training=is_training, **split)
        assert len(dataset) == sum(truth[ours].values())
        assert seen(dataset) == truth[ours]


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets(folder: Path, truth: dict[str, Seen], tmp_path: Path, streaming: bool) -> None:
    """By its name for the format, and by the folder alone, where it finds the format and the splits itself."""
    datasets = pytest.importorskip("datasets")
    options = {"cache_dir": str(tmp_path), "streaming": streaming}
    files = {split: str(folder / f"{split}-*.tar") for split in truth}
    named = datasets.load_dataset("webdataset", data_files=files, **options)
    alone = datasets.load_dataset(str(folder), **options)
    assert sorted(alone) == ["train", "validation"]
    for split, ours in (("train", "train"), ("validation", "val")):
        for found in (alone[split], named[ours]):
            assert seen((row["jpg"], row["cls"]) for row in found) == truth[ours]


def test_dali(folder: Path, truth: dict[str, Seen]) -> None:
    """fn.readers.webdataset, on the CPU, which makes its indexes itself."""
    fn = pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    from nvidia.dali import pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read(paths: list[str]) -> Any:
        return tuple(fn.readers.webdataset(paths=paths, ext=["jpg", "cls"], missing_component_behavior="error"))

    def samples(split: str) -> Iterator[tuple[Image.Image, int]]:
        pipe = read(sorted(map(str, folder.glob(f"{split}-*.tar"))))
        pipe.build()
        (size,) = pipe.epoch_size().values()
        for _ in range(size):
            image, number = (np.asarray(output[0]).tobytes() for output in pipe.run())
            yield pil(image), int(number)

    for split, expected in truth.items():
        assert seen(samples(split)) == expected
