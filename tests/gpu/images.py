"""Data sets of drawn pictures, sharded by the real command line: nothing is downloaded."""

import io
import os
import subprocess
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.datasets import SYNSETS_22K, archive, drawing
from tests.support.runs import ROOT

FIRST_VAL = 100_000  # seeds
FEW = 200  # are drawn before other processes have started


def photograph(wnid: str, seed: int, side: int = 500) -> bytes:
    """A JPEG about as large as a photograph of that size: smooth shapes under a grain (70 kB at 500 px)."""
    rng = np.random.default_rng((int(wnid[1:]), seed, side))
    shapes = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    grain = rng.integers(-9, 10, (side, side, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((np.asarray(shapes, np.int16) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_set(folder: Path, train: int, val: int, side: int) -> Path:
    """Shards of `train` and `val` pictures of each of four classes, of `side` pixels; made once."""
    done = folder / "set"
    if done.exists():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    keys = [(wnid, seed) for wnid in SYNSETS_22K for seed in (*range(train), *range(FIRST_VAL, FIRST_VAL + val))]
    cores = os.cpu_count() or 1 if len(keys) > FEW else 1
    draw = partial(photograph if side > 100 else drawing, side=side)
    if cores > 1:
        with get_context("spawn").Pool(cores) as pool:
            drawn = pool.starmap(draw, keys, chunksize=8)
    else:
        drawn = [draw(*key) for key in keys]
    pictures = dict(zip(keys, drawn, strict=True))
    sources = []
    for name, count, first in (("train", train, 0), ("val", val, FIRST_VAL)):
        sources.append(archive(folder / f"{name}.tar", SYNSETS_22K, count, first, lambda *key: pictures[key]))
    command = [sys.executable, "-m", "data_prep", "shard", "--source", sources[0], "--val-source", sources[1]]
    command += ["--output", done, "--workers", str(cores), "--samples-per-shard", "256"]
    told = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode:
        raise RuntimeError(f"data_prep shard: {told.stderr[-2000:]}")
    return done
