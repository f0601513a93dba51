"""Where everything stands in the picture of the house: rooms on their floors, things around it, stops of the routes.

Floors and rooms come from the table in CONTRIBUTING.md. What is set by hand is the widths of the wings and the things
outside of the rooms. No font's widths are known here, so there is room to spare.
"""

from typing import NamedTuple

from tests.support.import_graph import Order, room_of
from tests.support.routes import IMAGE, ROUTES, Route, Stop

WIDTH, TOP, ROOF, CELLAR = 1200, 50, 94, 34
GAP, BETWEEN = 36, 14  # of floors, at least; of rooms that share half a floor
HEAD, ROW = 34, 23  # of a room: what its name takes, and each of its stops
STYLES = ("ffcv", "hyper", "image")  # tracks of the routes in a room, from left to right or from above

Point = tuple[float, float]


class Box(NamedTuple):
    x: float
    y: float
    w: float
    h: float

    @property
    def middle(self) -> float:
        return self.x + self.w / 2

    @property
    def bottom(self) -> float:
        return self.y + self.h


class Wing(NamedTuple):
    """A package's part of the house: its left wall, and the widths of shafts and halves from there on."""

    x: float
    west: float
    left: float
    stairs: float
    right: float
    east: float

    @property
    def width(self) -> float:
        return self.west + self.left + self.stairs + self.right + self.east

    def shaft(self, name: str) -> float:
        """x of the middle of a shaft: west, stairs or east."""
        stairs = self.x + self.west + self.left + self.stairs / 2
        return {"west": self.x + self.west / 2, "stairs": stairs, "east": self.x + self.width - self.east / 2}[name]


WINGS = {"data_prep": Wing(118, 24, 178, 32, 188, 12), "pipeline": Wing(700, 16, 142, 56, 130, 34)}
LANE = 687.0  # x of the way down between the data set and pipeline


class Thing(NamedTuple):
    """Something outside of the rooms, level with a room; `passed`: a route goes on from it, through a stop on it."""

    room: str
    x: float
    w: float
    lines: tuple[str, ...]
    passed: bool = False


THINGS = {
    "archives": Thing("data_prep.sources", 10, 98, ("raw archives", "tar, tar.gz", "folders, URLs")),
    "shards": Thing("data_prep.beton", 562, 112, ("train-*.tar", "and indexes"), passed=True),
    "betons": Thing("data_prep.labels", 562, 112, ("train.beton",), passed=True),
    "manifest": Thing("data_prep.manifest", 562, 112, ("dataset.json", "ledger.parquet")),
    "configs": Thing("pipeline.config", 1094, 92, ("configs/", "*.yaml")),
    "runs": Thing("pipeline.records", 1094, 92, ("runs/", "log.jsonl", "MLflow")),
}
MIRRORED = {"data_prep.beton"}  # the line comes from the right


class House:
    """rows: the modules that routes stop in, by room; spots: of a stop, by its route's style and `module:name`."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.rows = {room: _files_of(room) for room in order.floors}
        self.bands: dict[str, dict[int, Box]] = {package: {} for package in WINGS}
        self.rooms: dict[str, Box] = {}
        heights = {package: self._heights(package) for package in WINGS}
        tall = max(sum(floors.values()) + GAP * (len(floors) - 1) for floors in heights.values())
        self.ground = TOP + ROOF + tall
        for package, floors in heights.items():
            self._stack(package, floors, (tall - sum(floors.values())) / (len(floors) - 1))
        self._on_the_roof()
        self.things = {name: self._thing(thing) for name, thing in THINGS.items()}
        self.spots = {(route.style, stop.what): self._spot(route, stop) for route in ROUTES for stop in route.stops}

    def is_row(self, room: str) -> bool:
        """Whether the stops of a room stand side by side, for a route that passes from wall to wall."""
        return len(self.rows[room]) >= 3 and self._width(room) >= 60 * len(self.rows[room])

    def styles(self, room: str) -> list[str]:
        """Of the routes that stop in a room: a track each."""
        return _styles_of(room)

    def under(self, package: str, floor: int) -> float:
        """y of the middle of the gap under a floor; of the cellar under the lowest."""
        below = self.bands[package].get(floor - 1)
        return (self.bands[package][floor].bottom + below.y) / 2 if below else self.ground + CELLAR / 2

    def station(self, room: str, number: int) -> float:
        """x of a stop in a row; above the stairs it stands where its lines can go straight down."""
        box, wing = self.rooms[room], WINGS[room.partition(".")[0]]
        x = box.x + box.w * (number + 0.5) / len(self.rows[room])
        stairs = wing.shaft("stairs")
        return stairs + 6 if abs(x - stairs) < wing.stairs / 2 else x

    def _beside(self, package: str, floor: int) -> list[str]:
        return [room for room, at in self.order.floors.items() if at == floor and room.startswith(f"{package}.")]

    def _heights(self, package: str) -> dict[int, float]:
        """Of the floors below the roof, from the ground up."""
        floors = sorted({floor for room, floor in self.order.floors.items() if room.startswith(f"{package}.")})
        return {floor: max(map(self._height, self._beside(package, floor))) for floor in floors[:-1]}

    def _height(self, room: str) -> float:
        if self.is_row(room):
            return HEAD + 20 + 24 * len(_styles_of(room))
        return HEAD + 4 + ROW * max(1, len(self.rows[room]))

    def _half(self, room: str) -> tuple[list[str], float, float]:
        """Which rooms share a half of the floor with this one; where the half begins, and how wide it is."""
        package = room.partition(".")[0]
        wing, beside = WINGS[package], self._beside(package, self.order.floors[room])
        if len(beside) == 1 and len(self.rows[room]) >= 3:
            return beside, wing.x + wing.west, wing.left + wing.stairs + wing.right
        split = (len(beside) + 1) // 2
        if room in beside[:split]:
            return beside[:split], wing.x + wing.west, wing.left
        return beside[split:], wing.x + wing.west + wing.left + wing.stairs, wing.right

    def _width(self, room: str) -> float:
        """Rooms share a half by what they have to show."""
        sharing, _, width = self._half(room)
        need = {other: len(other.partition(".")[2]) * 8 + 14 + (24 if self.rows[other] else 0) for other in sharing}
        return need[room] + (width - BETWEEN * (len(sharing) - 1) - sum(need.values())) / len(sharing)

    def _stack(self, package: str, floors: dict[int, float], gap: float) -> None:
        bottom = self.ground
        for floor, height in floors.items():
            self.bands[package][floor] = Box(WINGS[package].x, bottom - height, WINGS[package].width, height)
            for room in self._beside(package, floor):
                sharing, x, _ = self._half(room)
                x += sum(self._width(other) + BETWEEN for other in sharing[: sharing.index(room)])
                own = self._height(room)
                self.rooms[room] = Box(x, bottom - own, self._width(room), own)
            bottom -= height + gap

    def _on_the_roof(self) -> None:
        """The uppermost room of each wing stands in its gable, what is of other packages above the last one."""
        for room, floor in self.order.floors.items():
            package = room.partition(".")[0]
            wing = WINGS.get(package, WINGS["pipeline"])
            if package not in WINGS:
                place = len([other for other in self.rooms if other.partition(".")[0] not in WINGS])
                self.rooms[room] = Box(1006 - 196 * place, 14, 186, 28)  # six of them beside each other
            elif floor not in self.bands[package]:
                self.bands[package][floor] = Box(wing.x, TOP + ROOF - 48, wing.width, 30)
                self.rooms[room] = Box(wing.x + wing.width / 2 - 50, TOP + ROOF - 48, 100, 30)

    def _thing(self, thing: Thing) -> Box:
        room, height = self.rooms[thing.room], 17 * len(thing.lines) + (40 if thing.passed else 14)
        if thing.passed:  # what goes on from it does so at the height of the room's first stop
            return Box(thing.x, room.y + HEAD + 9 - 18, thing.w, height)
        return Box(thing.x, room.y + (room.h - height) / 2, thing.w, height)

    def _spot(self, route: Route, stop: Stop) -> Point:
        if stop.at:
            return self.things[stop.at].middle, self.things[stop.at].y + 18
        room, style = room_of(stop.module), "image" if IMAGE.passes(stop) else route.style
        box, number, track = self.rooms[room], self.rows[room].index(stop.module), _styles_of(room).index(style)
        if self.is_row(room):
            shared = sum(at == stop.module for _, at in _met()) > 1
            shift = 0 if not shared else 11 if route.style == "hyper" else -11
            return self.station(room, number) + shift, box.y + HEAD + 26 + 24 * track
        x = box.x + box.w - 17 if room in MIRRORED else box.x + 17 + 22 * track
        return x, box.y + HEAD + 9 + ROW * number


def shown_name(room: str) -> str:
    """What the picture calls a room: those of other packages by their package too."""
    package, _, name = room.partition(".")
    return name if package in WINGS else f"{package}/{name}"


def _met() -> set[tuple[str, str]]:
    return {(route.style, stop.module) for route in ROUTES for stop in route.stops if not stop.at}


def _styles_of(room: str) -> list[str]:
    here = {style for style, module in _met() if room_of(module) == room}
    return [style for style in STYLES if style in here]


def _files_of(room: str) -> list[str]:
    """The modules of a room that routes stop in, in the order in which they do; upwards where one comes from below."""
    files: list[str] = []
    climbs = False
    for route in ROUTES:
        here = [stop for stop in route.stops if room_of(stop.module) == room and not stop.at]
        climbs |= any(stop is route.stops[0] and stop.way.startswith("under") for stop in here)
        for number, stop in enumerate(here):
            if stop.module not in files:
                later = [files.index(other.module) for other in here[number:] if other.module in files]
                files.insert(min(later, default=len(files)), stop.module)
    return files[::-1] if climbs else files
