"""Who may write into the folder of a data set: one process at a time, and only over files that are ours."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_prep.manifest import MANIFEST_NAME
from data_prep.storage import TEMP_MARK, DataPrepError, Folder

BUILD_FOLDER = ".data_prep"  # unfinished work, inside the data set's folder
LOCK_NAME = ".data_prep.lock"  # where the folder itself cannot be locked
BUILD_RECORD = "build.json"  # in there: the settings of the build that is not finished
OUR_FILES = re.compile(
    r"(train|val)-\d{6,}\.(tar|index\.npz)|(train|val)(-\d+)?\.beton|rejected\.jsonl|ledger\.parquet|_info\.json"
)


class ShardError(DataPrepError):
    """The output folder cannot be used for this build."""


class BusyError(ShardError):
    """Another process writes to the output folder."""


def clear_unfinished(directory: Path) -> None:
    """Remove the temporary files of killed runs right in a data set's folder."""
    for path in directory.glob(f".*{TEMP_MARK}*"):
        if is_ours(path.name[1:].split(TEMP_MARK)[0]):
            path.unlink(missing_ok=True)


def is_ours(name: str) -> bool:
    """Whether a build writes files of that name into the data set's folder."""
    return name == MANIFEST_NAME or OUR_FILES.match(name) is not None


@contextmanager
def sole_writer(folder: Folder) -> Iterator[None]:
    """Hold the lock of a local folder, which is made if missing; behind a URL nothing guards against two runs.

    Raises BusyError when another process of this machine (or file system) holds it, ShardError where a file is.
    """
    if not folder.is_local:
        yield
        return
    try:
        os.makedirs(folder.url, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ShardError(f"{folder.url} is, or lies in, a file: choose a folder as --output") from None
    with ExitStack() as stack:
        # NFS locks only what is open for writing, which a folder cannot be.
        for name, flags in ((".", os.O_RDONLY), (LOCK_NAME, os.O_RDWR | os.O_CREAT)):
            try:
                handle = os.open(folder.join(name), flags, 0o666)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                raise BusyError(
                    f"another run is writing to {folder.url}: wait for it, or write to another folder"
                ) from None
            except OSError:
                pass  # where neither can be locked, nothing guards against two runs
        yield
