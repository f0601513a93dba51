"""Output that must not end a run: a log file on a disk that is full, a console that nobody reads any more."""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_LINES_WAITING = 100_000  # at most 40 MB of log.jsonl; beyond it the oldest are lost


class LogFile:
    """A text file that only ever holds whole lines, in order; those that the disk does not take wait in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = 0  # of whole lines in the file
        self._waiting: deque[bytes] = deque(maxlen=_LINES_WAITING)

    def cut(self, keep: Callable[[str], bool]) -> list[str]:
        """End the file before its first line that is not whole (where `keep` raises ValueError) or not to be kept.

        Returns the lines before that. Called once, before anything is written. It needs no room on the disk.
        """
        if not self.path.exists():
            return []
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                text = line.decode()
                if not text.endswith("\n") or not keep(text):
                    break
            except ValueError:
                break
            kept.append(text.removesuffix("\n"))
            self._bytes += len(line)
        os.truncate(self.path, self._bytes)
        return kept

    def lines(self) -> list[str]:
        """Every line so far, on disk or waiting for it."""
        with suppress(FileNotFoundError):
            on_disk = self.path.read_bytes()[: self._bytes].splitlines()
            return [line.decode() for line in (*on_disk, *(waiting.rstrip(b"\n") for waiting in self._waiting))]
        return [line.decode().rstrip("\n") for line in self._waiting]

    def append(self, line: str) -> None:
        """Write a line, behind those that wait. Never raises; the first line that has to wait is told on stderr."""
        were_waiting = len(self._waiting)
        self._waiting.append(line.encode() + b"\n")
        self.flush(quiet=were_waiting > 0)

    def flush(self, quiet: bool = False) -> None:
        """Write what waits, as far as the disk takes it. What it does not take is told on stderr, unless `quiet`."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not quiet:
                say(
                    f"WARNING: {self.path} takes no more lines ({error}): they wait in memory until there is room; "
                    f"training goes on ({len(self._waiting)} waiting)",
                    sys.stderr,
                )

    def _write(self, line: bytes) -> None:
        # Opened anew each time: a file that was open while a network file system was away may stay unusable.
        with open(self.path, "ab", buffering=0) as file:
            self._bytes = min(self._bytes, file.seek(0, os.SEEK_END))
            file.truncate(self._bytes)  # half a line, where the cut below failed too
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[file.write(rest) :]  # a disk that fills up takes a part, then raises
            except OSError:
                file.truncate(self._bytes)
                raise
        self._bytes += len(line)


def say_at_once(line: str) -> None:
    """A line on stderr, past Python's buffers and locks: for signal handlers, and for threads while another hangs."""
    with suppress(OSError):  # nobody reads it any more, or its disk is full
        os.write(2, line.encode() + b"\n")


def say(line: str, stream: TextIO) -> None:
    """Print, or not: a terminal or a `tee` may go before the run has written its checkpoint, a log's disk be full."""
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            # Gone for good. Without this, later prints would raise, and Python's own flush at exit fail the run.
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
