"""Who may write into the folder of a data set: one process at a time, only over files that are ours, and with the
settings that an interrupted build of it had."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_prep.manifest import MANIFEST_NAME, ShardEntry, index_path
from data_prep.storage import TEMP_MARK, DataPrepError, Folder, LostWorkError, is_url

BUILD_FOLDER = ".data_prep"  # unfinished work, inside the data set's folder
LOCK_NAME = ".data_prep.lock"  # where the folder itself cannot be locked
BUILD_RECORD = "build.json"  # in there: the settings of the build that is not finished
LOST_RECORD = "lost.json"  # in there, where it is not whole any more
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


class BuildFolder:
    """The folder (or URL) of a data set that is built, and the folder of its unfinished work: OUTPUT/.data_prep, or one
    inside `work`.
    """

    def __init__(self, url: str | Path, work: str | Path | None = None):
        self.folder = Folder(url)
        self.work = self.folder.folder(BUILD_FOLDER)
        if work:
            # A folder of our own in there: it is removed at the end, and other builds may use the same --work.
            path = self.folder.url if is_url(url) else os.path.abspath(url)
            self.work = Folder(work).folder(f"data_prep-{hashlib.sha256(path.encode()).hexdigest()[:12]}")

    def __str__(self) -> str:
        return self.folder.url

    def begin(self, name: str, wanted: dict[str, Any], *, force: bool) -> None:
        """Make ready for a build, or for going on with one of the same settings. With `force` it begins anew, but goes
        on with a build that was begun by `force`: the same command finishes that, too.
        """
        identity = {"name": name, "settings": wanted, "force": force}
        if force and self.folder.exists(MANIFEST_NAME):
            self.clear()
        if self.work.exists(BUILD_RECORD):
            there = json.loads(self.work.read(BUILD_RECORD))
            others = differences(there["name"], there["settings"], name, wanted)
            usable = not self.work.exists(LOST_RECORD) and there.get("force", False)
            if not others and (not force or usable):
                self.clear_unfinished()
                return
            if not force:
                raise ShardError(
                    f"{self} holds an unfinished build with other settings: {', '.join(others)}: give those to "
                    "finish it, --force to begin anew, or another --output"
                )
        foreign = [found for found in self.folder.names() if OUR_FILES.fullmatch(found)]
        if foreign and not self.work.exists(BUILD_RECORD) and not force:
            raise ShardError(
                f"{self} holds {foreign[0]} but neither {MANIFEST_NAME} nor an unfinished build: give --force to "
                "replace such files, or choose another --output"
            )
        self.clear()
        self.work.write(BUILD_RECORD, json.dumps(identity, indent=1).encode())

    def refuse_other(self, name_there: str, there: dict[str, Any], name: str, wanted: dict[str, Any]) -> None:
        """Raise ShardError where the finished data set, of that name and settings, is not the wanted one."""
        others = differences(name_there, there, name, wanted)
        if others:
            raise ShardError(
                f"{self} holds a dataset built with other settings: {', '.join(others)}: "
                "give --force to replace it, or choose another --output"
            )

    def refuse_incomplete(self, entries: Iterable[ShardEntry], *, indexed: bool, advice: str = "") -> None:
        """Raise ShardError where one of these files of a finished data set, or its index, is missing or has changed."""
        for entry in entries:
            has_index = not indexed or self.folder.exists(str(index_path(entry.file)))
            if self.folder.size(entry.file) != entry.bytes or not has_index:
                raise ShardError(
                    f"{self.folder.join(entry.file)} or its index is missing or has another size than "
                    f"{MANIFEST_NAME} says: give --force to build the dataset anew{advice}"
                )

    def finished_shards(self, records: str) -> dict[str, ShardEntry]:
        """Shards that an interrupted run has written, by the folder of their records in the unfinished work."""
        noted = self.work.folder(records)
        entries = [ShardEntry.model_validate_json(noted.read(name)) for name in noted.names("*.json")]
        return {
            entry.file: entry
            for entry in entries
            if self.folder.size(entry.file) == entry.bytes and self.folder.exists(str(index_path(entry.file)))
        }

    def lost(self, error: LostWorkError) -> None:
        """Note that the unfinished work is not whole, so that --force does not go on with it."""
        self.work.write(LOST_RECORD, json.dumps({"error": str(error)}).encode())

    def remove_work(self) -> None:
        """Drop the unfinished work."""
        # The record first: without it what else is there counts for nothing.
        self.work.remove(BUILD_RECORD)
        self.work.remove_all()

    def clear(self) -> None:
        """Remove what an interrupted or earlier build left. The manifest goes first: without it nothing else counts."""
        self.folder.remove(MANIFEST_NAME)
        self.clear_unfinished()
        for name in self.folder.names():
            if OUR_FILES.fullmatch(name):
                self.folder.remove(name)
        self.remove_work()

    def clear_unfinished(self) -> None:
        """Remove the temporary files of killed runs; only for the sole writer of the folder."""
        if self.folder.is_local:
            clear_unfinished(Path(self.folder.url))
        if self.work.is_local:
            for path in Path(self.work.url).rglob(f".*{TEMP_MARK}*"):
                path.unlink(missing_ok=True)


def differences(name_there: str, there: dict[str, Any], name_now: str, now: dict[str, Any]) -> list[str]:
    """What differs between the names and settings of two builds, in words; of a source only its content counts."""

    def compared(name: str, settings: dict[str, Any]) -> dict[str, Any]:
        # A source may be moved or renamed.
        content = {
            key: value["fingerprint"] if isinstance(value, dict) and "fingerprint" in value else value
            for key, value in settings.items()
        }
        return {"name": name, **content}

    old, new = compared(name_there, there), compared(name_now, now)
    return [
        f"{key} ({old.get(key)} there, {new.get(key)} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
