"""Writes what lies beside this file, by the code of a checkout given by its folder: see README.md.

    python tests/former/make.py FOLDER

It runs in FOLDER, with the Python that runs this, and takes a few minutes. FOLDER/data and FOLDER/runs must not exist;
they are gone at the end.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from gzip import compress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from former_commands import (
    evaluated,
    finetuning,
    indexing,
    libraries,
    log_lines,
    odd_build,
    pretraining,
    shards_build,
)
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent

IN22K = ("n07739125", "n02958343", "n02121620", "n02084071")  # not sorted in the archive; labels are by sorted id
IN1K = ("n03782006", "n02121620", "n02958343")  # class numbers 0, 1, 2; two of them are in both sets
ODD = ("n00000002", "n00000001")
STOP_FROM = 10  # a signal goes to a rank when log.jsonl has this step


def picture(wnid: str, seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A shape on a smooth background, both of the class."""
    rng = np.random.default_rng((int(wnid[1:]), seed))
    kind = sum(map(int, wnid[1:]))
    image = Image.fromarray(rng.integers(90, 160, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    x, y = int(rng.integers(2, size[0] // 3)), int(rng.integers(2, size[1] // 3))
    colour = tuple(int(v) for v in np.roll([230, 60, 20], kind) + rng.integers(-20, 20, 3))
    draw = ImageDraw.Draw(image)
    (draw.ellipse if kind % 2 else draw.rectangle)((x, y, x + size[0] // 2, y + size[1] // 2), fill=colour)
    return image


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **({"quality": 85} if form == "JPEG" else {}), **options)
    return file.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    """The same members give the same bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue().rstrip(b"\0") + bytes(1024)  # without tarfile's padding to 10 KB


def write_sources(folder: Path) -> None:
    """The archives that are built from, and tars as somebody else would write them."""
    folder.mkdir(parents=True)
    train = {wnid: {f"{wnid}_{i}.JPEG": encoded(picture(wnid, i)) for i in range(13)} for wnid in IN22K}
    val = {wnid: {f"{wnid}_{1000 + i}.JPEG": encoded(picture(wnid, 1000 + i)) for i in range(4)} for wnid in IN22K}
    whole = encoded(picture("n00000009", 0))
    train[IN22K[0]] |= {
        "zipped.JPEG": compress(encoded(picture(IN22K[0], 50)), mtime=0),
        "dots.in.name.JPEG": encoded(picture(IN22K[0], 51)),
        "dots_in_name.JPEG": encoded(picture(IN22K[0], 52)),  # the same key, were it not for the check
        "sub/folder/deep name.JPEG": encoded(picture(IN22K[0], 53)),
        "x" * 120 + ".JPEG": encoded(picture(IN22K[0], 54)),  # needs a GNU long-name header
        "cut.JPEG": whole[: len(whole) // 2],
        "empty.JPEG": b"",
        "page.JPEG": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "tiny.JPEG": encoded(picture(IN22K[0], 55, (20, 12))),
        "leak.JPEG": val[IN22K[1]][f"{IN22K[1]}_1000.JPEG"],
        "unwanted.JPEG": encoded(picture(IN22K[0], 56)),
    }
    train[IN22K[1]]["twice.JPEG"] = train[IN22K[1]][f"{IN22K[1]}_0.JPEG"]
    for name, classes in (("in22k", train), ("in22k-val", val)):
        (folder / f"{name}.tar").write_bytes(tar({f"{wnid}.tar": tar(images) for wnid, images in classes.items()}))
    (folder / "exclude.txt").write_text(f"# near-duplicates\n{IN22K[0]}\tunwanted.JPEG\n")

    odd = {f"{wnid}/{i}.jpg": encoded(picture(wnid, i, (64, 48))) for wnid in ODD for i in range(3)}
    first = ODD[0]
    odd |= {
        f"{first}/png.jpg": encoded(picture(first, 20), "PNG"),
        f"{first}/palette.jpg": encoded(picture(first, 21).convert("P"), "PNG"),
        f"{first}/alpha.jpg": encoded(picture(first, 22).convert("RGBA"), "PNG"),
        f"{first}/gray.jpg": encoded(picture(first, 23).convert("L")),
        f"{first}/cmyk.jpg": encoded(picture(first, 24).convert("CMYK")),
        f"{first}/progressive.jpg": encoded(picture(first, 25), progressive=True),
        f"{first}/large.jpg": encoded(picture(first, 26, (200, 150))),
    }
    (folder / "odd.tar").write_bytes(tar(odd))

    foreign = folder.parent / "data" / "in1k"
    foreign.mkdir(parents=True)
    (folder / "in1k-classes.txt").write_text("\n".join(IN1K) + "\n")
    told: dict[str, bytes] = {}  # by a name and a JSON
    numbered: dict[str, bytes] = {}  # by a number alone
    for i in range(12):
        label, other = i % 3, (i + 1) % 3
        told[f"{IN1K[label]}_{i}.jpg"] = encoded(picture(IN1K[label], 200 + i))
        told[f"{IN1K[label]}_{i}.json"] = json.dumps({"filename": f"{IN1K[label]}_{i}.JPEG", "width": 48}).encode()
        numbered[f"a/{i:04d}.jpg"] = encoded(picture(IN1K[other], 300 + i))
        numbered[f"a/{i:04d}.cls"] = str(other).encode()
    val_tar: dict[str, bytes] = {}
    for i in range(9):
        val_tar[f"{i:04d}.cls"], val_tar[f"{i:04d}.jpg"] = str(i % 3).encode(), encoded(picture(IN1K[i % 3], 1200 + i))
    for name, members in (("train-00", told), ("train-01", numbered), ("val-00", val_tar)):
        (foreign / f"{name}.tar").write_bytes(tar(members))


class Former:
    """The checkout, and what is run in it by relative paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "RANKS": "2", "VENV": sys.prefix, "PYTHONPATH": str(HERE / "tiny")}

    def python(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(arguments)} ended with {done.returncode}")
        return done.stdout

    def check(self) -> str:
        """The commit, where the packages of this folder are those that run."""
        code = "import pipeline, data_prep; print(pipeline.__file__); print(data_prep.__file__)"
        for file in self.python("-c", code).splitlines():
            if Path(file).resolve().parents[1] != self.folder:
                sys.exit(f"{file} would run, and not {self.folder}")
        if self.python("-c", "from pipeline.data.decode import COMPILED; print(COMPILED)").strip() != "True":
            sys.exit(f"{self.folder}/pipeline/data lacks the compiled decoder, whose pixels tests have: `make setup`")
        git = ["git", "-C", str(self.folder)]
        if subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout:
            sys.exit(f"{self.folder} is not as it was committed")
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    def pretrain(self, stop: bool) -> None:
        """The run, to its end, or with a signal to rank 1 on the way."""
        command = ["launch/deepspeed.sh", *pretraining()]
        process = subprocess.Popen(command, cwd=self.folder, env=self.environment)
        log = self.folder / "runs" / "pretrain" / "log.jsonl"
        while stop and process.poll() is None:
            if log.exists() and f'"step": {STOP_FROM}' in log.read_text():
                os.kill(rank_1_of(process.pid), signal.SIGUSR1)
                break
            time.sleep(0.01)
        if process.wait() != (75 if stop else 0):
            sys.exit(f"the run ended with {process.returncode}")


def rank_1_of(launcher: int) -> int:
    for process in psutil.Process(launcher).children(recursive=True):
        if "pipeline" in process.cmdline() and process.environ().get("RANK") == "1":
            return process.pid
    sys.exit("there is no rank 1")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.*"))}


def keep(source: Path, name: str, *, without: Iterable[str] = ()) -> None:
    """Copy a folder here; a lock names a host."""
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(".lock", *without))
    for beton in target.rglob("*.beton"):  # 8 MB pages, nearly empty
        beton.with_name(f"{beton.name}.xz").write_bytes(lzma.compress(beton.read_bytes(), preset=9))
        beton.unlink()


def leaks(folder: Path) -> Iterator[str]:
    """Files here that name this machine, its user, or a folder of it."""
    words = {str(folder), str(HERE.parents[1]), str(Path.home()), sys.prefix, socket.gethostname(), "/tmp/"}
    pattern = re.compile("|".join(re.escape(word) for word in words if len(word) > 3).encode())
    for path in HERE.rglob("*"):
        if not path.is_file() or path.suffix in (".py", ".pyc", ".md"):
            continue
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        elif path.suffix == ".parquet":
            content = repr(pq.read_table(path).to_pylist()).encode()
        found = pattern.search(content)
        if found:
            yield f"{path}: {found[0]!r}"


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    if (folder / "data").exists() or (folder / "runs").exists():
        sys.exit(f"{folder} holds data/ or runs/: give a fresh checkout")
    former = Former(folder)
    commit = former.check()
    data, runs = folder / "data", folder / "runs"
    try:
        write_sources(folder / "raw")
        former.python("-m", "data_prep", *shards_build())
        former.python("-m", "data_prep", *odd_build())
        former.python("-m", "data_prep", *indexing())
        former.pretrain(stop=True)
        keep(runs / "pretrain", "runs/pretrain")
        stopped = evaluated(former.python("-m", "pipeline", "evaluate", "runs/pretrain"))
        former.pretrain(stop=False)
        ended = evaluated(former.python("-m", "pipeline", "evaluate", "runs/pretrain"))
        former.python("-m", "pipeline", *finetuning())
        shutil.copy(runs / "finetune" / "config.yaml", HERE / "finetune.yaml")
        older = sorted((runs / "pretrain" / "checkpoints").glob("step-*"))[:-1]
        keep(runs / "pretrain", "ended/pretrain", without=[path.name for path in older] + (["best"] if older else []))
        expected = {
            "commit": commit,
            "libraries": libraries(),
            "odd_build": digests(data / "odd"),
            "evaluated": {"stopped": stopped, "ended": ended},
            "finetuned": [
                {key: line[key] for key in ("step", "loss", "lr", "grad_norm", "val_loss", "top1") if key in line}
                for line in log_lines(runs / "finetune" / "log.jsonl")
            ],
        }
        (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        keep(folder / "raw", "raw")
        keep(data, "data", without=("odd",))
    finally:
        for made in ("raw", "data", "runs", "mlruns", "mlartifacts"):
            shutil.rmtree(folder / made, ignore_errors=True)
    if found := list(leaks(folder)):
        sys.exit("not to be committed: " + "; ".join(found))


if __name__ == "__main__":
    main()
