"""Small archives for the tests of data prep: images, tars, and every kind of dirt that ImageNet has."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.__main__ import main
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT

WNIDS = ("n00000003", "n00000001", "n00000002")  # not sorted in the archive; labels are by sorted id


def image_bytes(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB", fmt: str = "JPEG", **options) -> bytes:
    """A smooth random picture in any format and mode."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, fmt, **options)
    return file.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def class_images(wnid: str, count: int) -> dict[str, bytes]:
    """Every fifth is larger than the tests' short side of 64 px."""
    start = int(wnid[1:]) * 1000
    return {
        f"{wnid}_{i}.JPEG": image_bytes(start + i, size=(120, 90) if i % 5 == 0 else (40, 30)) for i in range(count)
    }


def archive(path: Path, count: int = 12, extra: dict[str, bytes] | None = None) -> Path:
    """A tar of three synset tars; `extra` members go into the first."""
    classes = {wnid: class_images(wnid, count) for wnid in WNIDS}
    classes[WNIDS[0]].update(extra or {})
    path.write_bytes(tar_bytes({f"{wnid}.tar": tar_bytes(images) for wnid, images in classes.items()}))
    return path


def shard(source: Path | str, output: Path | str, *options: str) -> int:
    """`python -m data_prep shard` in this process, sized for the archives above."""
    return main(
        [
            *("shard", "--source", str(source), "--output", str(output), "--short-side", "64", "--name", "t"),
            *("--samples-per-shard", "10", "--workers", "1", "--min-side", "8", *options),
        ]
    )


def command(source: Path | str, output: Path | str, *options: str) -> list[str]:
    """`python -m data_prep shard`, for a process of its own."""
    fixed = ("--name", "t", "--samples-per-shard", "40", "--val-per-class", "5", "--short-side", "256")
    return [
        *(sys.executable, "-m", "data_prep", "shard", "--source", str(source), "--output", str(output)),
        *(*fixed, *options),
    ]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file right in the folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def gray16_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40), 32768, np.uint16)).save(file, "PNG")
    return file.getvalue()


def with_exif(jpeg: bytes, payload: bytes) -> bytes:
    """`jpeg` with an APP1 segment of that payload right after its start."""
    segment = b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload
    return jpeg[:2] + segment + jpeg[2:]


def dirt() -> dict[str, tuple[bytes, str, str]]:
    """name -> (bytes, action, reason): one of every kind that is planted, and what the ledger must say of it."""
    whole = image_bytes(900, size=(60, 50))
    return {
        "good.JPEG": (whole, "kept", ""),
        "large.JPEG": (image_bytes(901, size=(200, 150)), "kept", ""),
        "zipped.JPEG": (gzip.compress(image_bytes(902)), "repaired", "gzip"),
        "zipped_png.JPEG": (gzip.compress(image_bytes(903, fmt="PNG")), "repaired", "gzip+png"),
        "png.JPEG": (image_bytes(904, fmt="PNG"), "repaired", "png"),
        "bmp.JPEG": (image_bytes(905, fmt="BMP"), "repaired", "bmp"),
        "gif.JPEG": (image_bytes(906, mode="P", fmt="GIF"), "repaired", "gif+palette"),
        "webp.JPEG": (image_bytes(907, fmt="WEBP"), "repaired", "webp"),
        "palette.JPEG": (image_bytes(908, mode="P", fmt="PNG"), "repaired", "png+palette"),
        "alpha.JPEG": (image_bytes(909, mode="RGBA", fmt="PNG"), "repaired", "png+alpha"),
        "deep.JPEG": (gray16_png(), "repaired", "png+16bit+gray"),
        "gray.JPEG": (image_bytes(910, mode="L"), "repaired", "gray"),
        "cmyk.JPEG": (image_bytes(911, mode="CMYK"), "repaired", "cmyk"),
        "progressive.JPEG": (image_bytes(912, progressive=True), "repaired", "progressive"),
        "exif.JPEG": (with_exif(image_bytes(913), b"Exif\0\0II*\0\xff\xff\xff\xff"), "repaired", "broken_exif"),
        "cut.JPEG": (whole[: len(whole) // 2], "rejected", "truncated"),
        "empty.JPEG": (b"", "rejected", "empty"),
        "page.JPEG": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "rejected", "html"),
        "noise.JPEG": (np.random.default_rng(0).bytes(3000), "rejected", "undecodable"),
        "tiny.JPEG": (image_bytes(914, size=(20, 5)), "rejected", "too_small"),
        "bomb.JPEG": (image_bytes(915, size=(10_000, 9_000), mode="1", fmt="PNG"), "rejected", "too_large"),
        "dots.in.name.JPEG": (image_bytes(916), "kept", ""),
        "dots_in_name.JPEG": (image_bytes(917), "kept", ""),  # the same key, were it not for the check
        "sub/folder/deep name.JPEG": (image_bytes(918), "kept", ""),
        "x" * 120 + ".JPEG": (image_bytes(919), "kept", ""),  # needs a GNU long-name header
        "ümlaut.JPEG": (image_bytes(920), "kept", ""),
    }
