"""Folders of millions of files, local or remote: one class at a time in memory, sorted, so that order is the same
everywhere.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from data_prep.sources.streams import SourceError, unreachable
from data_prep.storage import file_system, is_url

LISTINGS_AHEAD = 16  # a store answers in tens of milliseconds, and there are 20,000 classes to ask for


class Entry(NamedTuple):
    """A file, folder or link (a broken one, or one to a folder inside a class); name: path below the folder listed."""

    name: str
    kind: str
    size: int


def list_folder(path: str) -> list[Entry]:
    """What is right in a folder, sorted by name. Raises SourceError when it cannot be listed."""
    try:
        if not is_url(path):
            return sorted(_local(path, "", into_links=True))
        system, inner = file_system(path)
        found = system.ls(inner, detail=True)
        system.invalidate_cache()  # listings of millions of files would stay in memory
        return sorted(_remote(found, inner))
    except SourceError:
        raise
    except Exception as error:  # each remote file system has its own
        raise unreachable(path, error) from None


def list_files(path: str) -> list[Entry]:
    """All files and links below a folder, at any depth, sorted by their path."""
    try:
        if not is_url(path):
            found: list[Entry] = []
            folders = [""]
            while folders:
                for entry in _local(path, folders.pop(), into_links=False):
                    if entry.kind == "folder":
                        folders.append(entry.name + "/")
                    else:
                        found.append(entry)
            return sorted(found)
        system, inner = file_system(path)
        details = system.find(inner, detail=True)
        system.invalidate_cache()
        return sorted(_remote(details.values(), inner))
    except Exception as error:
        raise unreachable(path, error) from None


def list_each(paths: list[str]) -> Iterator[tuple[str, list[Entry]]]:
    """(path, `list_files(path)`) of each folder, in the order given; remote ones are asked for ahead."""
    if not paths or not is_url(paths[0]):
        yield from ((path, list_files(path)) for path in paths)
        return
    waiting: deque[tuple[str, Future[list[Entry]]]] = deque()
    with ThreadPoolExecutor(LISTINGS_AHEAD) as threads:
        for path in paths:
            waiting.append((path, threads.submit(list_files, path)))
            if len(waiting) >= LISTINGS_AHEAD:
                first, listing = waiting.popleft()
                yield first, listing.result()
        for first, listing in waiting:
            yield first, listing.result()


def _local(root: str, below: str, *, into_links: bool) -> Iterator[Entry]:
    with os.scandir(os.path.join(root, below) if below else root) as entries:
        for entry in entries:
            name = below + entry.name
            if entry.is_file():
                yield Entry(name, "file", entry.stat().st_size)
            elif entry.is_dir(follow_symlinks=into_links):
                yield Entry(name, "folder", 0)
            else:
                yield Entry(name, "link", 0)


def _remote(details: Iterable[dict], folder: str) -> Iterator[Entry]:
    for info in details:
        # Some stores list the folder itself, as an object without a name.
        name = info["name"].rstrip("/").removeprefix(folder.rstrip("/")).strip("/")
        if name and not (info["type"] == "file" and info["name"].endswith("/")):
            yield Entry(name, "folder" if info["type"] == "directory" else "file", int(info.get("size") or 0))
