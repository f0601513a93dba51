"""What former code has written, unpacked where it may be worked on: see tests/former/README.md."""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Iterable
from pathlib import Path

FORMER = Path(__file__).resolve().parents[1] / "former"
STORED = ("raw", "data", "runs", "ended")


def unpack_former(folder: Path, names: Iterable[str] = STORED) -> Path:
    """Copy what is stored under these names into `folder`."""
    for name in names:
        shutil.copytree(FORMER / name, folder / name, symlinks=True)
    for archive in folder.glob("raw/in22k*.tar"):  # stored without the marks of their ends, which are asked for now
        archive.write_bytes(archive.read_bytes().ljust(-(-archive.stat().st_size // 512) * 512, b"\0") + bytes(1024))
    for packed in folder.rglob("*.beton.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    return folder
