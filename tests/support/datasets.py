"""Two small data sets, built by the real command line."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.support.runs import run_module

# Real synsets, so that lemmas and label maps mean something; two of the four are in both sets.
SYNSETS_22K = ("n02084071", "n02121620", "n02958343", "n07739125")
SYNSETS_1K = ("n02121620", "n02958343", "n03782006")


def has_ffcv() -> bool:
    return importlib.util.find_spec("ffcv") is not None


needs_ffcv = pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed (`make setup` says what it needs)")


def drawing(wnid: str, seed: int, side: int = 48) -> bytes:
    """JPEG of a noisy picture whose shape and hue tell the class: learnable, never twice the same."""
    rng = np.random.default_rng((int(wnid[1:]), seed))
    kind = sum(map(int, wnid[1:]))
    background = Image.fromarray(rng.integers(90, 160, (side, side, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(background)
    x, y = rng.integers(4, side // 3, 2)
    box = (int(x), int(y), int(x) + side // 2, int(y) + side // 2)
    colour = tuple(int(v) for v in np.roll([230, 60, 20], kind) + rng.integers(-20, 20, 3))
    (draw.ellipse if kind % 2 else draw.rectangle)(box, fill=colour)
    file = io.BytesIO()
    background.save(file, "JPEG", quality=90)
    return file.getvalue()


def archive(
    path: Path,
    synsets: tuple[str, ...],
    count: int,
    first_seed: int = 0,
    picture: Callable[[str, int], bytes] = drawing,
) -> Path:
    """A tar of per-synset tars, as ImageNet comes. picture: a JPEG of a synset and a seed."""

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w") as outer:
        for wnid in synsets:
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for i in range(count):
                    add(inner, f"{wnid}_{i}.JPEG", picture(wnid, first_seed + i))
            add(outer, f"{wnid}.tar", inner_file.getvalue())
    return path


@dataclass(frozen=True)
class Datasets:
    """Folders of two small data sets, sharing two classes."""

    in22k: Path
    in1k: Path


def build_datasets(folder: Path) -> Datasets:
    """Both sets, by the real command line."""
    folder.mkdir(exist_ok=True)
    for name, synsets in (("in22k", SYNSETS_22K), ("in1k", SYNSETS_1K)):
        train = archive(folder / f"{name}.tar", synsets, 24)
        val = archive(folder / f"{name}-val.tar", synsets, 7, first_seed=1000)
        done = run_module(
            *("data_prep", "shard", "--source", str(train), "--val-source", str(val), "--workers", "1"),
            *("--output", str(folder / name), "--samples-per-shard", "40"),
            *("--format", "both" if has_ffcv() else "webdataset"),
        )
        assert done.returncode == 0, done.stderr
    return Datasets(folder / "in22k", folder / "in1k")
