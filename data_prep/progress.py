"""The progress bar of long work: share done, images a second, rejected so far, time left."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LOG_SECONDS = 15  # between lines where standard error is a file


class Progress:
    """A bar over `total` bytes or images; use it as a context manager.

    Speed and time left count only what this run does, not what an interrupted one had done.
    """

    def __init__(self, what: str, total: int | None, *, unit: str = "bytes"):
        self.images = self.rejected = 0
        self.started = time.monotonic()
        self.by_bytes = unit == "bytes"
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            desc=what,
            unit="B" if self.by_bytes else "images",
            unit_scale=self.by_bytes,
            mininterval=0.5 if terminal else LOG_SECONDS,
            miniters=1,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            if total
            else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self.bar.total:
            self.bar.n = self.bar.total  # headers and padding of the archive are no images
        self.bar.close()

    def advance(self, amount: int, *, images: int | None = None, rejected: int = 0, resumed: bool = False) -> None:
        """Add bytes (or images) that are done; `resumed` were done by an earlier run."""
        if resumed:
            self.bar.initial += amount
            self.bar.n += amount
            self.bar.refresh()
            return
        self.images += amount if images is None else images
        self.rejected += rejected
        seconds = max(time.monotonic() - self.started, 1e-3)
        told = f"{self.images / seconds:,.0f} images/s"
        if self.by_bytes:
            told += f", {self.images:,} images, {self.rejected:,} rejected"
        self.bar.set_postfix_str(told, refresh=False)
        self.bar.update(amount)

    def say(self, text: str) -> None:
        """A line above the bar."""
        tqdm.write(text, file=sys.stderr)
