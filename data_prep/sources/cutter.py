"""Cuts what is met of a source that is read front to back into chunks."""

from collections.abc import Iterator

from data_prep.sources.items import Damage, Event, Item, Met, Record, Stray
from data_prep.sources.refusal import Refusal


class Cutter:
    """Cuts events into chunks. Of the chunk taken last: its split, bytes, classes, names of first and last item."""

    def __init__(self, events: Iterator[Event], check: Refusal, max_bytes: int, max_images: int):
        self._events = events
        self._check = check
        self._max_bytes, self._max_images = max_bytes, max_images
        self._next = next(events, None)
        self.split = self.first = self.last = ""
        self.bytes = 0
        self.classes: dict[str, None] = {}

    def more(self) -> bool:
        if self._next is None:
            self._check.at_end()
        return self._next is not None

    def take(self) -> Iterator[Item]:
        """The items of the next chunk; to be read to the end."""
        images = 0
        self.bytes, self.classes, self.first = 0, {}, ""
        self.split = self._next.split if self._next is not None else ""
        while (event := self._next) is not None and event.split == self.split:
            size = len(event.data) if isinstance(event, Record) else 0
            if images and (self.bytes + size > self._max_bytes or images >= self._max_images):
                return
            if isinstance(event, Met | Record):
                self.classes[event.wnid] = None
                self.last = f"{event.wnid}/{event.name}" if isinstance(event, Record) else event.wnid
            else:
                self.last = event.where if isinstance(event, Damage) else event.name
            self.first = self.first or self.last
            self._check.see(
                event.split,
                event.wnid if isinstance(event, Met | Record) else "",
                event if isinstance(event, Stray) else None,
                damaged=isinstance(event, Damage),
            )
            if not isinstance(event, Met):
                images += 1
                self.bytes += size
                yield event
            self._next = next(self._events, None)
