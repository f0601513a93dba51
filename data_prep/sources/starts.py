"""Where reading an archive front to back can begin again, kept beside the spool: a build that was killed late does not
inflate from the start.

For each GiB inflated a record of 44 kB and a line a chunk: 50 MB for the 1.1 TB of winter21, gone with the build's
other unfinished work.
"""

import base64
import json
from collections.abc import Container
from typing import Any, NamedTuple

from data_prep.sources.gunzip import Place
from data_prep.storage import Folder

WINDOW = Place._fields.index("window")


class Start(NamedTuple):
    """Before an event. position: in the content, of a header of the outer tar; passed: events from there on that come
    before this one; place: where inflating begins, at or before the position; state: what the source knew there.
    """

    place: Place
    position: int
    passed: int
    state: dict[str, Any]


class Given(NamedTuple):
    """What is known of a chunk that was given."""

    split: str
    bytes: int
    classes: list[str]
    first: str
    last: str


class Starts:
    """Records of one source in `folder`; `cut` is how its chunks are cut: records of another cut do not count.

    After `load`, `given` has the chunks before `start`, and `refusal` what was watched; `start` None: the beginning.
    """

    def __init__(self, folder: Folder, split: str, cut: list[int]):
        self._folder, self._split, self._cut = folder, split, cut
        self._recorded = 0
        self.given: list[Given] = []
        self.start: Start | None = None
        self.refusal: dict[str, Any] | None = None

    def load(self, done: Container[int]) -> None:
        """Find the last start before which all chunks are done; what comes after it is made again."""
        for name in self._folder.names(f"{self._split}-*.start"):
            record = self._read(name, done) if self._recorded == len(self.given) else None
            if record is None:
                self._folder.remove(name)
                self._recorded = -1
                continue
            self.given += [Given(*fields) for fields in record["chunks"]]
            self._recorded = len(self.given)
            place, *rest = record["start"]
            place[WINDOW] = base64.b64decode(place[WINDOW])
            self.start = Start(Place(*place), *rest)
            self.refusal = record["refusal"]
        self._recorded = len(self.given)

    def _read(self, name: str, done: Container[int]) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads(self._folder.read(name))
        except (OSError, ValueError):
            return None
        sound = (record["cut"], record["after"]) == (self._cut, self._recorded)
        stop = self._recorded + len(record["chunks"])
        return record if sound and all(number in done for number in range(self._recorded, stop)) else None

    def add(self, given: Given, start: Start | None, refusal: dict[str, Any]) -> None:
        """Note a chunk, and where the next one starts; written down where inflating begins later than in the last."""
        self.given.append(given)
        if start is None or (self.start is not None and start.place.position <= self.start.place.position):
            return
        self.start = start
        place: list[Any] = list(start.place)
        place[WINDOW] = base64.b64encode(start.place.window).decode()
        record = {
            "cut": self._cut,
            "after": self._recorded,
            "chunks": self.given[self._recorded :],
            "start": [place, *start[1:]],
            "refusal": refusal,
        }
        self._folder.write(f"{self._split}-{len(self.given):06d}.start", json.dumps(record).encode("ascii"))
        self._recorded = len(self.given)
