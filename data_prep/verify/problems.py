"""Problems found in the files of a data set, and what can be wrong with any file."""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data_prep.manifest import ShardEntry, file_sha256
from data_prep.storage import Folder, open_binary

TOLD_OF_A_KIND = 20  # problems of one kind in one file that are told one by one
COPY_BYTES = 8 << 20


class Problem(NamedTuple):
    """What is wrong, and in which file."""

    file: str
    text: str


class Problems:
    """Collects the problems of a file; of each kind only the first are told one by one."""

    def __init__(self) -> None:
        self._told: list[Problem] = []
        self._kinds: Counter[tuple[str, str]] = Counter()

    def add(self, file: str, kind: str, text: str = "") -> None:
        """A problem; `text` is put before its kind."""
        general = re.sub(r"\d+", "#", kind)
        self._kinds[file, general] += 1
        if self._kinds[file, general] <= TOLD_OF_A_KIND:
            self._told.append(Problem(file, f"{text} {kind}".strip()))

    def listed(self) -> list[Problem]:
        """All of them, with a line for those not told one by one."""
        more = [
            Problem(file, f"and {count - TOLD_OF_A_KIND:,} more: ... {kind}")
            for (file, kind), count in self._kinds.items()
            if count > TOLD_OF_A_KIND
        ]
        return self._told + more


def check_file(folder: Folder, entry: ShardEntry, problems: Problems, local: Path | None) -> None:
    """Size, and of a `local` copy the checksum."""
    size = folder.size(entry.file)
    if size is None:
        problems.add(entry.file, "is missing")
    elif size != entry.bytes:
        problems.add(entry.file, f"has {size} bytes, dataset.json says {entry.bytes}")
    elif local is not None and file_sha256(local) != entry.sha256:
        problems.add(entry.file, "differs from its sha256 in dataset.json: some of its bytes have changed")


@contextmanager
def local_copy(folder: Folder, name: str) -> Iterator[Path]:
    """The path of a file; of a remote one a temporary copy."""
    if folder.is_local:
        yield Path(folder.join(name))
        return
    with tempfile.TemporaryDirectory(prefix="data_prep-") as scratch:
        path = Path(scratch) / name
        with open_binary(folder.join(name)) as remote, open(path, "wb") as copy:
            while block := remote.read(COPY_BYTES):
                copy.write(block)
        yield path
