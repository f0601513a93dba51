"""Which file of ours imports which: read from the source with `ast`, nothing is run.

    python -m tests.support.import_graph [ROOT]    prints files per folder, arrows between rooms, and circles

Every import counts, wherever it stands: at the top, inside a function, under TYPE_CHECKING, relative, as
`from package import module`, and as a string that is exactly the dotted name of a module, which is how the tables of
importlib spell it. Running a package's `__init__.py` because a module below it is imported does not count.
"""

import ast
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_prep", "pipeline", "launch")


class Tie(NamedTuple):
    """One name that a file takes from another: `name` of line `line`."""

    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.name} (line {self.line})"


# module: the modules that it imports: the names it takes, in order of lines
Graph = dict[str, dict[str, list[Tie]]]


class Circle(NamedTuple):
    """Modules (or rooms) that import each other in a ring; the path ends where it begins.

    ties: one list for each step of the path.
    """

    path: list[str]
    ties: list[list[Tie]]

    def __str__(self) -> str:
        steps = zip(pairwise(self.path), self.ties, strict=True)
        lines = [f"  {a} takes of {b}: {', '.join(map(str, ties))}" for (a, b), ties in steps]
        return "\n".join([" -> ".join(self.path), *lines])


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name: file, of every Python file of ours below `root`. A package goes by its own name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(root: Path = ROOT) -> Graph:
    """The graph of all imports among the files of ours below `root`; what a file imports of itself is left out."""
    files = modules(root)
    graph: Graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = {}
        for target, tie in sorted(_imports(path, package, files), key=lambda found: (found[1].line, found)):
            if target != module:
                graph[module].setdefault(target, []).append(tie)
    return graph


def _imports(path: Path, package: str, files: dict[str, Path]) -> Iterator[tuple[str, Tie]]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if target := _known(alias.name, files):
                    yield target, Tie(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                if target := _known(f"{base}.{alias.name}", files):
                    yield target, Tie(alias.name, node.lineno)
        elif isinstance(node, ast.Constant) and "." in str(node.value) and node.value in files:
            yield node.value, Tie(f'"{node.value}"', node.lineno)


def _known(name: str, files: dict[str, Path]) -> str | None:
    """The module of ours that a dotted name lies in: itself, or what stands before a name in it."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def room_of(module: str) -> str:
    """The room of a module: the folder right under its top package, or the file itself where it lies there."""
    return ".".join(module.split(".")[:2])


def room_graph(graph: Graph) -> Graph:
    """The same with rooms for modules; names are told with the module that takes them."""
    rooms: Graph = {room_of(module): {} for module in graph}
    for module, imported in graph.items():
        for target, ties in imported.items():
            a, b = room_of(module), room_of(target)
            if a != b:
                rooms[a].setdefault(b, []).extend(Tie(f"{tie.name} in {module}", tie.line) for tie in ties)
    return rooms


def circles(graph: Graph) -> list[Circle]:
    """For every import that lies on a circle, the shortest circle through it; each circle once, the shortest first.

    (All circles there are would be too many to read in a knot; these name every import that could be cut.)
    """
    found: dict[tuple[str, ...], Circle] = {}
    for module in sorted(graph):
        for target in sorted(graph[module]):
            ring = _shortest_way(graph, target, module)
            if ring:
                first = ring.index(min(ring))
                path = ring[first:] + ring[: first + 1]
                found[tuple(path)] = Circle(path, [graph[a][b] for a, b in pairwise(path)])
    return sorted(found.values(), key=lambda circle: (len(circle.path), circle.path))


def _shortest_way(graph: Graph, start: str, end: str) -> list[str]:
    """Modules from `start` to `end`, both included, each importing the next; [] where there is no way."""
    before: dict[str, str] = {start: ""}
    queue = deque([start])
    while queue and end not in before:
        module = queue.popleft()
        for target in sorted(graph[module]):
            if target not in before:
                before[target] = module
                queue.append(target)
    if end not in before:
        return []
    way = [end]
    while before[way[-1]]:
        way.append(before[way[-1]])
    return way[::-1]


@dataclass(frozen=True)
class Order:
    """The order of the rooms. floors: room: its floor, in the order of the table; open: rooms that other packages may
    use; packages: from left to right.
    """

    floors: dict[str, int]
    open: frozenset[str]
    packages: tuple[str, ...]


def read_order(text: str) -> Order:
    """The order that CONTRIBUTING.md shows: the table whose header begins with `| floor |`. Raises ValueError."""
    lines = iter(text.splitlines())
    header = next((line for line in lines if line.startswith("| floor |")), None)
    if header is None:
        raise ValueError("there is no table that begins with `| floor |`")
    packages = tuple(re.findall(r"`(\w+)`", header))
    next(lines)  # the line of dashes
    floors: dict[str, int] = {}
    opened = set()
    for line in lines:
        if not line.startswith("|"):
            break
        floor, *cells = line.strip("| ").split("|")
        for package, cell in zip(packages, cells, strict=False):
            for bold, name in re.findall(r"(\*\*)?`(\w+)`", cell):
                room = f"{package}.{name}"
                if room in floors:
                    raise ValueError(f"{room} stands twice in the table of floors")
                floors[room] = int(floor)
                if bold:
                    opened.add(room)
    return Order(floors, frozenset(opened), packages)


def against_order(rooms: Graph, order: Order) -> list[str]:
    """What the graph of rooms does that the order forbids, a line each; rooms that only one of them knows, too."""
    there = {room for room in rooms if "." in room or rooms[room]}  # a package itself may stand empty
    faults = [f"{room} is not in the table" for room in sorted(there - order.floors.keys())]
    faults += [f"{room} is in the table and does not exist" for room in sorted(order.floors.keys() - there)]
    column = {package: number for number, package in enumerate(order.packages)}
    for a in sorted(there & order.floors.keys()):
        for b in sorted(rooms[a].keys() & order.floors.keys()):
            ours, theirs = (column[room.partition(".")[0]] for room in (a, b))
            if ours == theirs and order.floors[b] >= order.floors[a]:
                why = f"{b} stands on floor {order.floors[b]}, {a} on {order.floors[a]}"
            elif ours < theirs:
                why = "packages use what is left of them"
            elif ours > theirs and b not in order.open:
                why = f"{b} is not open to other packages"
            else:
                continue
            faults.append(f"{a} imports {b} ({', '.join(map(str, rooms[a][b]))}): {why}")
    return faults


def report(root: Path) -> str:
    """Files per folder, rooms and arrows between them, and the circles, as text."""
    graph = import_graph(root)
    rooms = room_graph(graph)
    lines = ["folder                      files"]
    for folder, count in sorted(Counter(path.parent.relative_to(root) for path in modules(root).values()).items()):
        lines.append(f"{folder!s:<26}{count:>7}")
    for package in PACKAGES:
        inside = [room for room in rooms if room.startswith(f"{package}.")]
        arrows = [(a, b) for a in inside for b in rooms[a]]
        own = sum(b in inside for _, b in arrows)
        lines.append(
            f"{package}: {len(inside)} rooms, {own} arrows between them, {len(arrows) - own} to other packages"
        )
    for what, which in (("files", graph), ("rooms", rooms)):
        found = circles(which)
        lines.append(f"{sum(map(len, which.values()))} arrows and {len(found)} circles of {what}")
        lines += [f"  {' -> '.join(circle.path)}" for circle in found]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
