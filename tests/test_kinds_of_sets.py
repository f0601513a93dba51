"""Every command that takes a data set, on every kind of set: it works, or says in one line why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from data_prep.__main__ import main
from data_prep.manifest import Manifest
from tests.data_prep.foreign.test_index import write_tar
from tests.support.archives import archive, shard
from tests.support.datasets import SYNSETS_22K, drawing
from tests.support.former import FORMER, unpack_former
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT


def ours(folder: Path) -> Path:
    source = archive(folder / "source.tar", 8)
    assert shard(source, folder / "set", "--val-per-class", "2") == 0
    return folder / "set"


def former(folder: Path) -> Path:
    return unpack_former(folder, ["data"]) / "data" / "in22k"


def upgraded(folder: Path) -> Path:
    assert main(["index", "--upgrade", str(former(folder))]) == 0
    return folder / "data" / "in22k"


def plain(folder: Path, said: Callable[[int], tuple[str, bytes]], *options: str) -> Path:
    """Tars as somebody else writes them; `said`: extension and content of what tells the class of a number."""
    tars = folder / "set"
    tars.mkdir(parents=True)
    for split, count, first in (("train", 20, 0), ("val", 8, 100)):
        members = []
        for i in range(first, first + count):
            extension, content = said(i % 4)
            members += [(f"{i:04d}.jpg", drawing(SYNSETS_22K[i % 4], i)), (f"{i:04d}.{extension}", content)]
        write_tar(tars / f"{split}-0.tar", members)
    (folder / "classes.txt").write_text("\n".join(SYNSETS_22K))
    assert main(["index", str(tars), *options]) == 0
    return tars


def plain_with_cls(folder: Path) -> Path:
    return plain(folder, lambda i: ("cls", b"%d" % i), "--classes", str(folder / "classes.txt"))


def plain_with_json(folder: Path) -> Path:
    return plain(folder, lambda i: ("json", json.dumps({"label": SYNSETS_22K[i]}).encode()))


def plain_elsewhere(folder: Path) -> Path:
    plain(folder, lambda i: ("cls", SYNSETS_22K[i].encode()), "--index-folder", str(folder / "at"))
    return folder / "at"


# A new kind of set is a function here: it makes one in the folder given, and returns what `data.path` takes.
KINDS = {
    "ours": ours,
    "former": former,
    "upgraded": upgraded,
    "plain-cls": plain_with_cls,
    "plain-json": plain_with_json,
    "plain-elsewhere": plain_elsewhere,
}

# Read otherwise, which is of the pipeline alone: the kind of set, and overrides in which {folder} is its.
WAYS = {
    "streamed": ("ours", ["data.reader=stream"]),
    "streamed-plain": ("plain-cls", ["data.reader=stream"]),
    "streamed-info": ("info", ["data.reader=stream", "data.stream_classes={folder}/../classes.txt"]),
    "streamed-urls": (
        "info",
        [
            *("data.reader=stream", "data.stream_classes={folder}/../classes.txt"),
            "data.path=pipe:cat {folder}/train-000000.tar",
            "data.stream_val=pipe:cat {folder}/val-000000.tar",
        ],
    ),
    "mixed": ("ours", ["data.path=[{{path: {folder}, weight: 2}}, {{path: {folder}/../other, weight: 1}}]"]),
}

# Of data_prep: {data} is the set, {other} one of ours; the exit code, 1 where there is nothing to do.
PREP = {
    "verify": ["verify", "{data}", "--workers", "1"],
    "verify --fast": ["verify", "{data}", "--workers", "1", "--fast"],
    "duplicates --within": ["duplicates", "{data}", "--within", "--output", "{out}", "--workers", "1"],
    "duplicates --against": ["duplicates", "{data}", "--against", "{other}", "--output", "{out}", "--workers", "1"],
    "duplicates of ours": ["duplicates", "{other}", "--against", "{data}", "--output", "{out}", "--workers", "1"],
    "index": ["index", "{data}"],
    "index --upgrade": ["index", "--upgrade", "{data}"],
    "labels": ["labels", "{data}", "imagenet-1k"],
    "plan": ["plan", "--source", "{data}"],
}
REFUSED = {
    ("index", "ours"): "built by `shard`",
    ("index", "former"): "built by `shard`",
    ("index", "upgraded"): "built by `shard`",
    ("index", "plain-cls"): "--force makes another",
    ("index", "plain-json"): "--force makes another",
    ("index", "plain-elsewhere"): "has a dataset.json already",
    ("index --upgrade", "plain-cls"): "tars of others, which stay as they are",
    ("index --upgrade", "plain-json"): "tars of others, which stay as they are",
    ("index --upgrade", "plain-elsewhere"): "tars of others, which stay as they are",
    **{("plan", kind): "source " for kind in KINDS},  # of raw images, not of what was made of them
}

# Of the pipeline, one after the other in one process, which imports torch once; {run} is a run folder.
SMALL = ["data.resolution=32", "data.workers_per_rank=0", "model.name=hornet_former_gf", "tracking.uri=null"]
SMALL += ["train.global_batch=8", "train.micro_batch=8", "train.epochs=1", "optimizer.warmup_epochs=0.5"]
SMALL += ["evaluate.every_epochs=1", "evaluate.micro_batch=8", "name=run"]
PIPELINE = {
    "check": ["pretrain", "configs/demo_pretrain.yaml", "data.path={data}", "output_root={out}", *SMALL, "--check"],
    "train": ["pretrain", "configs/demo_pretrain.yaml", "data.path={data}", "output_root={out}", *SMALL],
    "evaluate": ["evaluate", "{out}/run"],
    "bench-data": ["bench-data", "configs/demo_pretrain.yaml", "data.path={data}", *SMALL, "--seconds", "0.3"],
}
PROGRAM = """
import json, os, sys
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
import torch.distributed
from pipeline.__main__ import main
torch.distributed.destroy_process_group = lambda: None
for command in json.load(sys.stdin):
    print("== exit code", main(command), flush=True)
"""


class Sets(NamedTuple):
    """Folders by kind, and what the pipeline said of each: (exit code, text) by (command, kind)."""

    folders: dict[str, Path]
    said: Callable[[], dict[tuple[str, str], tuple[str, str]]]


def filled(command: list[str], data: Path, out: Path, other: Path) -> list[str]:
    return [word.format(data=data, out=out, other=other) for word in command]


def asked_of(kind: str, name: str, folders: dict[str, Path], out: Path) -> list[str]:
    """A command of the pipeline for a set of a kind, or read in one of WAYS."""
    base, more = WAYS.get(kind, (kind, []))
    command = filled(PIPELINE[name], folders[base], out, folders["ours"])
    return command if name == "evaluate" else [*command, *(word.format(folder=folders[base]) for word in more)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sets]:
    root = tmp_path_factory.mktemp("kinds")
    folders = {}
    for kind, make in KINDS.items():
        (root / kind).mkdir()
        folders[kind] = make(root / kind)
    info = Path(shutil.copytree(folders["ours"], root / "info" / "set"))
    (root / "info" / "classes.txt").write_text("".join(f"{w}\n" for w in Manifest.load(info).synsets))
    (info / "dataset.json").unlink()
    shutil.copytree(folders["plain-json"], folders["ours"].parent / "other")
    asked = [(name, kind) for kind in (*KINDS, *WAYS) for name in PIPELINE]
    read_as = {**folders, "info": info}
    commands = [asked_of(kind, name, read_as, root / "runs" / kind) for name, kind in asked]
    path = os.pathsep.join([str(ROOT), str(FORMER / "tiny")])
    with open(root / "said.txt", "w+b") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(commands).encode())
        process.stdin.close()

        def ended() -> dict[tuple[str, str], tuple[str, str]]:
            process.wait(PATIENCE_SECONDS)
            parts = re.split(r"^== exit code (.*)\n", (root / "said.txt").read_text(), flags=re.MULTILINE)
            assert len(parts) == 2 * len(asked) + 1, parts[-1]
            return dict(zip(asked, zip(parts[1::2], parts[::2], strict=False), strict=True))

        yield Sets(folders, ended)
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PREP)
def test_data_prep(sets: Sets, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = sets.folders[kind]
    if name == "index --upgrade":  # the pipeline reads the set
        data = Path(shutil.copytree(data, tmp_path / "set"))
    before = {path.name: path.read_bytes() for path in data.iterdir() if path.is_file()}
    command = filled(PREP[name], data, tmp_path / "out", sets.folders["ours"])
    if name.startswith("duplicates") and kind == "ours" and "--against" in command:
        command += ["--split", "train", "--against-split", "val"]
    capsys.readouterr()
    code = main(command)
    said = capsys.readouterr()
    refusal = REFUSED.get((name, kind))
    assert code == (1 if refusal else 0), said.err
    if refusal:
        assert refusal in said.err.splitlines()[-1]
        assert said.err.splitlines()[-1].startswith("error: ")
        assert {path.name: path.read_bytes() for path in data.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("kind", [*KINDS, *WAYS])
@pytest.mark.parametrize("name", PIPELINE)
def test_pipeline(sets: Sets, name: str, kind: str) -> None:
    code, said = sets.said()[name, kind]
    assert code == "0", said[-3000:]
    assert "Traceback" not in said
    if name == "evaluate" and kind in KINDS:
        assert f"{Manifest.load(sets.folders[kind]).split('val').samples}" in said
