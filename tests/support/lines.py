"""The lines in the picture of the house: where routes turn, and how an import finds its way between rooms.

A line of a route goes from stop to stop by right angles. Its `way` names what it turns at, in this order: `under3` is
the gap under floor 3, `west`, `stairs` and `east` are the shafts of a wing, `lane` is the one right of the data set,
`level` is the height of the stop to come; `+6` shifts it by so many pixels. Without one it goes across, then up or
down.

An import runs from the bottom of a room to the top of one below, and passes the floors between where nothing stands.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from tests.support.house import LANE, WINGS, Box, House, Point
from tests.support.import_graph import Graph
from tests.support.routes import Route

APART = 6.0  # of imports that pass a floor side by side
Passage = list[tuple[float, Box]]  # x, and the floor that is passed there
Import = tuple[str, str]


def number(value: float) -> str:
    """With one digit at most, always the same."""
    return f"{value:.1f}".removesuffix(".0")


def route_legs(house: House, route: Route) -> list[list[Point]]:
    """The corners of a route: from its start to the first stop, from stop to stop, and to its end."""
    spots = [house.spots[route.style, stop.what] for stop in route.stops]
    legs = []
    if route.start:
        box, first = house.things[route.start.at], route.stops[0]
        side = box.x if box.x > spots[0][0] else box.x + box.w
        begin = (box.middle, box.bottom) if first.way else (side, spots[0][1])
        legs.append(_turns(house, first.way, _package(first.module), begin, spots[0]))
    for (before, stop), (a, b) in zip(pairwise(route.stops), pairwise(spots), strict=True):
        inside = before if stop.at else stop
        legs.append(_turns(house, stop.way, _package(inside.module), a, b))
    if route.end:
        box = house.things[route.end.at]
        legs.append(_turns(house, route.end.way, _package(route.stops[-1].module), spots[-1], (box.middle, box.bottom)))
    return legs


def _package(module: str) -> str:
    return module.partition(".")[0]


def _turns(house: House, way: str, package: str, start: Point, end: Point) -> list[Point]:
    (x, y), points, across = start, [start], True
    for token in way.split():
        found = re.fullmatch(r"([a-z]+)(\d*)([+-]\d+)?", token)
        if found is None:
            raise ValueError(f"{token!r} in the way {way!r} is not a place to turn at")
        name, floor, shift = found[1], found[2], int(found[3] or 0)
        across = name in ("under", "level")
        if across:
            y = (end[1] if name == "level" else house.under(package, int(floor))) + shift
        else:
            x = (LANE if name == "lane" else WINGS[package].shaft(name)) + shift
        points.append((x, y))
    return [*points, (end[0], y) if across else (x, end[1]), end]


def rounded(points: list[Point], radius: float = 9) -> str:
    """A path along corners at right angles, rounded."""
    points = [p for i, p in enumerate(points) if i == 0 or _distance(p, points[i - 1]) > 0.05]
    parts = [f"M{_at(points[0])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        cut = min(radius, _distance(before, corner) / 2, _distance(after, corner) / 2)
        parts.append(f"L{_at(_towards(corner, before, cut))}Q{_at(corner)} {_at(_towards(corner, after, cut))}")
    return "".join([*parts, f"L{_at(points[-1])}"])


def _at(point: Point) -> str:
    return f"{number(point[0])} {number(point[1])}"


def _distance(a: Point, b: Point) -> float:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _towards(a: Point, b: Point, length: float) -> Point:
    share = length / _distance(a, b)
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


def not_implied(rooms: Graph) -> list[Import]:
    """The imports between rooms but for those that a longer way stands for."""

    def reached(room: str) -> set[str]:
        return {room}.union(*(reached(other) for other in rooms[room]))

    return [
        (a, b) for a in sorted(rooms) for b in sorted(rooms[a]) if not any(b in reached(c) for c in rooms[a] if c != b)
    ]


def import_paths(house: House, rooms: Graph) -> Iterator[str]:
    """A path for each import that is drawn."""
    inside: list[Import] = []
    across: list[Import] = []
    for a, b in not_implied(rooms):
        (across if _package(a) in WINGS and _package(a) != _package(b) else inside).append((a, b))
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    passages = {(a, b): _passage(house, a, b, taken) for a, b in inside}
    leaves, enters = _ports(house, passages)
    for (a, b), passage in passages.items():
        parts = [f"M{_at(leaves[a, b])}"]
        x, y = leaves[a, b]
        for into_x, box in passage:
            parts.append(f"{_bend((x, y), (into_x, box.y))}V{number(box.bottom)}")
            x, y = into_x, box.bottom
        yield "".join([*parts, _bend((x, y), enters[a, b])])
    for a, b in across:
        yield rounded(_to_other_wing(house, a, b))


def _bend(a: Point, b: Point) -> str:
    half = (a[1] + b[1]) / 2
    return f"C{number(a[0])} {number(half)} {number(b[0])} {number(half)} {_at(b)}"


def _passage(house: House, a: str, b: str, taken: dict[tuple[str, int], list[float]]) -> Passage:
    """Where it passes the floors between two rooms: as near to the straight way as there is room for."""
    package, floors = _package(b), house.order.floors
    x, aim = house.rooms[a].middle, house.rooms[b].middle
    passage = []
    for floor in range(floors[a] - 1, floors[b], -1):
        band = house.bands[package][floor]
        wanted = x + (aim - x) / (floor - floors[b] + 1)
        used = taken[package, floor]
        places = []
        for low, high in _free(house, package, floor):
            nearest = min(max(wanted, low), high)
            places += [at for at in (nearest + step * APART for step in range(-8, 9)) if low <= at <= high]
        apart = [place for place in places if all(abs(place - other) >= APART - 0.1 for other in used)]
        x = min(apart or places or [wanted], key=lambda place: (abs(place - wanted), place))
        used.append(x)
        passage.append((x, band))
    return passage


def _free(house: House, package: str, floor: int) -> Iterator[tuple[float, float]]:
    """From where to where a line may pass a floor, between what stands there."""
    wing = WINGS[package]
    here = sorted(house.rooms[r] for r, f in house.order.floors.items() if f == floor and _package(r) == package)
    edges = [wing.x + 2, *(edge for box in here for edge in (box.x, box.x + box.w)), wing.x + wing.width - 2]
    for low, high in zip(edges[::2], edges[1::2], strict=True):
        if high - low >= 8:
            yield low + 4, high - 4


def _ports(house: House, passages: dict[Import, Passage]) -> tuple[dict[Import, Point], dict[Import, Point]]:
    """Where each import leaves its room and enters the other, side by side in the order of where they come from."""
    leaves: dict[Import, Point] = {}
    enters: dict[Import, Point] = {}
    for room, box in house.rooms.items():
        down = sorted((p[0][0] if p else house.rooms[i[1]].middle, i) for i, p in passages.items() if i[0] == room)
        up = sorted((p[-1][0] if p else house.rooms[i[0]].middle, i) for i, p in passages.items() if i[1] == room)
        for ports, y, found in ((leaves, box.bottom, down), (enters, box.y, up)):
            for place, (_, which) in enumerate(found, 1):
                ports[which] = (box.x + box.w * place / (len(found) + 1), y)
    return leaves, enters


def _to_other_wing(house: House, a: str, b: str) -> list[Point]:
    """Out at the left: straight, where the rooms stand so, else through the gap above the room it goes to."""
    one, other, floors = house.rooms[a], house.rooms[b], house.order.floors
    level, wing = other.y + other.h / 2, WINGS[_package(b)]
    right_of_it = [house.rooms[r] for r, f in floors.items() if f == floors[b] and other.x < house.rooms[r].x < one.x]
    if one.y < level < one.bottom and not right_of_it:
        return [(one.x, level), (other.x + other.w, level)]
    start = out = (one.x, one.y + one.h / 2)
    if any(at == floors[a] and _package(r) == _package(a) and house.rooms[r].x < one.x for r, at in floors.items()):
        start, out = (one.x + 30, one.bottom), (one.x + 30, house.under(_package(a), floors[a]) - 6)
    wall, gap = wing.x + wing.width + 8, house.under(_package(b), floors[b] + 1) - 8
    return [start, out, (wall, out[1]), (wall, gap), (other.middle, gap), (other.middle, other.y)]
