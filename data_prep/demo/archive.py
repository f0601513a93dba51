"""What both sources of demo pictures share: package clients, picture hashes, ImageNet-shaped archives."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data_prep.storage import DataPrepError

JPEG_QUALITY = 90

T = TypeVar("T")
R = TypeVar("R")


class DemoError(DataPrepError):
    """The demo pictures cannot be built; the message says why and what else there is."""


@dataclass(frozen=True)
class Picture:
    """One finished picture: its synset, a name unique within the synset, JPEG bytes, perceptual hashes."""

    wnid: str
    name: str
    group: str  # pictures of one group never lie on both sides of a split
    jpeg: bytes
    hashes: tuple[int, ...]  # of the picture and of its variants (mirrored, silhouette)


def say(text: str) -> None:
    """A line that is seen at once, also in a log: what follows takes a minute."""
    print(text, flush=True)


def ways_on(failed: str) -> str:
    """The ways on when the source `failed` ("icons", "clipart" or "scenes") cannot be had."""
    if failed == "scenes":
        return (
            "The scenes need these packages of Debian's; images of your own with masks or boxes are read by "
            "`python -m data_prep shard-dense`."
        )
    other = "clipart" if failed == "icons" else "icons"
    return (
        f"Two ways on: `make pretrain ONLY={other}` (`python -m data_prep demo --only {other}`) builds both demo sets "
        "from the other source; `make pretrain SOURCE=your-folder-or-archive` trains on your own images."
    )


def require(client: str, source: str) -> None:
    """Refuse to start where a package client is missing."""
    if shutil.which(client) is None:
        pictures = {"icons": "icons", "clipart": "clip-art pictures", "scenes": "scenes"}[source]
        raise DemoError(f"`{client}` is not installed, and the demo's {pictures} come through it. {ways_on(source)}")


def run_client(command: Sequence[str], cwd: Path, source: str, hint: str = "") -> str:
    """Run a package client in `cwd` and return its output; failure is a DemoError in the client's words."""
    client = command[0]
    require(client, source)
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"`{' '.join(command)}` did not end within 900 s. {ways_on(source)}") from error
    if done.returncode:
        said = " / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        hint = f" {hint}" if hint else ""
        raise DemoError(f"`{' '.join(command)}` failed: {said}.{hint} {ways_on(source)}")
    return done.stdout


def cached_download(cache: Path, pattern: str, download: Callable[[Path], None]) -> Path:
    """The file of `cache` that matches `pattern`; if there is none, `download(folder)` must fetch it.

    It is fetched into a folder of its own and renamed when whole, so a killed run leaves no half file behind.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if found := sorted(cache.glob(pattern)):
        return found[-1]
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        download(Path(folder))
        fetched = sorted(Path(folder).glob(pattern))
        if not fetched:
            raise DemoError(f"the package client ended well but left no file named {pattern} in {folder}")
        return fetched[-1].replace(cache / fetched[-1].name)


def in_processes(function: Callable[[T], R], items: Sequence[T], label: str) -> Iterator[R]:
    """`map(function, items)` over all cores of this process, in order, with a progress bar on a terminal."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or len(items) < 200:  # starting workers costs about as much as 200 pictures
        yield from tqdm(map(function, items), total=len(items), desc=label, unit="image", disable=None)
        return
    # spawn, not fork: the caller may hold threads
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(function, items, chunksize=16)
        yield from tqdm(results, total=len(items), desc=label, unit="image", disable=None)


def jpeg_bytes(image: Image.Image) -> bytes:
    """`image` as an RGB JPEG, the same bytes each time."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def perceptual_hash(gray: Image.Image) -> int:
    """64-bit pHash of a gray picture, as a number."""
    return int(str(imagehash.phash(gray)), 16)


def near(left: NDArray[np.uint64], right: NDArray[np.uint64], bits: int) -> NDArray[np.bool_]:
    """Which hashes of `left` differ from some hash of `right` in at most `bits` bits."""
    found = np.zeros(len(left), dtype=bool)
    if len(right):
        for start in range(0, len(left), 512):  # (512, len(right)) at a time keeps this within megabytes
            apart = np.bitwise_count(left[start : start + 512, None] ^ right[None, :])
            found[start : start + 512] = apart.min(axis=1) <= bits
    return found


def hash_array(pictures: Sequence[Picture]) -> NDArray[np.uint64]:
    """The first hash of each picture."""
    return np.array([picture.hashes[0] for picture in pictures], dtype=np.uint64)


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime 0, no owner: the same pictures give the same bytes
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_archive(path: Path, pictures: Iterable[Picture]) -> str:
    """Write a tar of `n01234567.tar`, each holding `n01234567_NAME.JPEG`; returns one line about it.

    The archive appears under its name only when it is whole.
    """
    synsets: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        synsets[picture.wnid].append(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as outer:
                for wnid in sorted(synsets):
                    buffer = io.BytesIO()
                    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as inner:
                        for picture in sorted(synsets[wnid], key=lambda picture: picture.name):
                            _add(inner, f"{wnid}_{picture.name}.JPEG", picture.jpeg)
                    _add(outer, f"{wnid}.tar", buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    counts = Counter({wnid: len(members) for wnid, members in synsets.items()})
    return (
        f"{path.name}: {len(counts)} synsets, {counts.total()} images "
        f"({min(counts.values(), default=0)}-{max(counts.values(), default=0)} each), {path.stat().st_size:,} bytes"
    )
