"""Draws `.readme/house.svg`: the rooms, the imports between them, and the two routes. `make picture` calls it.

What it shows comes from the table of floors in CONTRIBUTING.md, from the imports of the code, and from routes.py, which
is checked against the code: a test compares the stored picture with the one that is drawn now.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from tests.support.house import CELLAR, HEAD, MIRRORED, ROOF, ROW, THINGS, TOP, WIDTH, WINGS, House, shown_name
from tests.support.import_graph import ROOT, Graph, Order, import_graph, read_order, room_graph
from tests.support.lines import import_paths, number, rounded, route_legs
from tests.support.routes import FFCV, HYPER, IMAGE, ROUTES, Route, check

FILE = ROOT / ".readme" / "house.svg"
SHAPES = """\
text{font-family:sans-serif;font-size:12px}
.mono{font-family:monospace}
.name{font-size:13px;font-weight:bold}
.title{font-size:15px;font-weight:bold}
.middle{text-anchor:middle}
text.number{font-size:10.5px;font-weight:bold;text-anchor:middle}
.over{paint-order:stroke;stroke-width:4;stroke-linejoin:round}
path{stroke-linejoin:round;stroke-linecap:round}
path.thin,path.line,path.halo{fill:none}
path.thin{stroke-width:1.1}
path.line{stroke-width:4}
path.halo{stroke-width:8}
path.ffcv{stroke-dasharray:7 6}
circle{stroke-width:2}
.open{stroke-width:2}"""
# selector: its fill and stroke by day, and by night
COLOURS = {
    ".card": ("#fcfbf8", "#dedad0", "#191b1f", "#34373d"),
    ".wing": ("#f4f2ec", "#cfcabd", "#23272d", "#474d56"),
    ".floor": ("#ebe8e0", "", "#2c3138", ""),
    ".room": ("#ffffff", "#bfbab0", "#353a42", "#5d6470"),
    ".open": ("#ffffff", "#67645d", "#353a42", "#c3c8d0"),
    ".thing": ("#fbf1dc", "#cfb987", "#3a3426", "#7b6c48"),
    "text": ("#2a2926", "", "#e9e7e2", ""),
    ".over": ("", "#ffffff", "", "#353a42"),
    "text.soft": ("#6c6860", "", "#a9a7a1", ""),
    "path.thin": ("", "#a39e93", "", "#7a818c"),
    "path.halo": ("", "#f4f2ec", "", "#23272d"),
    "path.image,path.ffcv": ("", "#d4691a", "", "#f0924a"),
    "path.hyper": ("", "#2673b4", "", "#63aeea"),
    "circle.image": ("#d4691a", "#d4691a", "#f0924a", "#f0924a"),
    "circle.ffcv": ("#fcfbf8", "#d4691a", "#191b1f", "#f0924a"),
    "circle.hyper": ("#2673b4", "#2673b4", "#63aeea", "#63aeea"),
    "text.number": ("#ffffff", "", "#191b1f", ""),
    "text.ffcv": ("#a94f0d", "", "#f0924a", ""),
}
LEGEND = (
    ("room", "a room: a package or a single file; it imports lower floors alone"),
    ("open", "the same, and other packages may import it"),
    ("thin", "an import, from above or from the right (none that others imply)"),
    ("thing", "what lies on disk, outside of the code"),
    ("line image", "an image, from stop to stop"),
    ("line ffcv", "the same image by way of FFCV"),
    ("line hyper", "a hyper-parameter"),
    ("", "Drawn from the imports and from the table of floors in CONTRIBUTING.md."),
)


def draw(graph: Graph, order: Order, root: Path = ROOT) -> str:
    """The picture as SVG. Raises RouteError where a route tells what the code no longer holds."""
    ties = {route.title: check(route, graph, root) for route in ROUTES}
    house = House(order)
    parts = [*_walls(house)]
    parts += [f'<path class="thin" d="{path}"/>' for path in import_paths(house, room_graph(graph))]
    parts += [_rect("open" if room in order.open else "room", *box) for room, box in house.rooms.items()]
    parts += _things(house)
    for route in (FFCV, HYPER, IMAGE):
        parts += _line(house, route, ties[route.title])
    parts += _names(house)  # above the lines of the routes, which cross them
    for route in ROUTES:
        for what, mark in _discs(route).items():
            parts += _disc(*house.spots[route.style, what], route.style, mark)
    below, height = _directory(house.ground + CELLAR + 34)
    style = f"{SHAPES}\n{_colours(0)}\n@media (prefers-color-scheme:dark){{\n{_colours(2)}\n}}"
    head = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(height)}" role="img">
<title>The rooms of data_prep and pipeline, what imports what, and the routes of an image and a hyper-parameter</title>
<style>
{style}
</style>"""
    card = _rect("card", 0.5, 0.5, WIDTH - 1, height - 1, 10)
    return "\n".join([head, card, *parts, *below, "</svg>"]) + "\n"


def _colours(first: int) -> str:
    rules = []
    for selector, colours in COLOURS.items():
        named = zip(("fill", "stroke"), colours[first : first + 2], strict=True)
        rules.append(f"{selector}{{{';'.join(f'{what}:{colour}' for what, colour in named if colour)}}}")
    return "\n".join(rules)


def _rect(kind: str, x: float, y: float, w: float, h: float, radius: float = 4) -> str:
    place = f'x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}"'
    return f'<rect class="{kind}" {place} rx="{number(radius)}"/>'


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{number(x)}" y="{number(y)}">{escape(text)}</text>'


def _walls(house: House) -> Iterator[str]:
    for package, wing in WINGS.items():
        middle, right, eaves, foot = (
            wing.x + wing.width / 2,
            wing.x + wing.width,
            TOP + ROOF - 10,
            house.ground + CELLAR,
        )
        outline = (
            f"M{number(wing.x)} {number(foot)}V{number(eaves)}H{number(wing.x - 12)}L{number(middle)} {number(TOP)}"
        )
        outline += f"L{number(right + 12)} {number(eaves)}H{number(right)}V{number(foot)}Z"
        yield f'<path class="wing" d="{outline}"/>'
        yield _text("mono title middle", middle, TOP + 37, package)
        for band in house.bands[package].values():
            if band.y > eaves:
                yield _rect("floor", band.x + 4, band.y - 5, band.w - 8, band.h + 10)


def _names(house: House) -> Iterator[str]:
    for room, box in house.rooms.items():
        rows, row_like, name = house.rows[room], house.is_row(room), shown_name(room)
        if not rows:
            yield _text("mono name over middle", box.middle, box.y + box.h / 2 + 4.5, name)
            continue
        left = box.x + (10 if room in MIRRORED or row_like else 10 + 22 * len(house.styles(room)))
        yield _text("mono name over", left, box.y + 20, name)
        for place, module in enumerate(rows):
            stem = module.rpartition(".")[2]
            if row_like:
                yield _text("mono over middle", house.station(room, place), box.y + HEAD + 7, stem)
            else:
                yield _text("mono over", left, box.y + HEAD + 13 + ROW * place, stem)


def _things(house: House) -> Iterator[str]:
    for name, box in house.things.items():
        yield _rect("thing", *box)
        for place, line in enumerate(THINGS[name].lines):
            kind = "mono middle" if any(mark in line for mark in "/*_.") else "middle"
            yield _text(kind, box.middle, box.y + (46 if THINGS[name].passed else 20) + 17 * place, line)


def _line(house: House, route: Route, ties: list[str]) -> list[str]:
    paths = [rounded(leg) for leg in route_legs(house, route)]
    told = [*([""] if route.start else []), *ties, *([""] if route.end else [])]
    lines = [f'<path class="halo" d="{path}"/>' for path in paths]
    for path, tie in zip(paths, told, strict=True):
        title = f"<title>{escape(tie)}</title>" if tie else ""
        lines.append(f'<path class="line {route.style}" d="{path}">{title}</path>')
    return lines


def _discs(route: Route) -> dict[str, str]:
    """Numbers of the stops of a route, by `module:name`; letters for those that the image's does not count."""
    if route is FFCV:
        own = [stop.what for stop in route.stops if not IMAGE.passes(stop)]
        return {what: chr(ord("a") + place) for place, what in enumerate(own)}
    return {stop.what: str(place) for place, stop in enumerate(route.stops, 1)}


def _between() -> str:
    """Where the FFCV route leaves the image's, and where it comes back."""
    numbers = [_discs(IMAGE)[stop.what] for stop in FFCV.stops if IMAGE.passes(stop)]
    return f"{numbers[0]} to {numbers[-1]}"


def _disc(x: float, y: float, style: str, mark: str) -> list[str]:
    disc = f'<circle class="{style}" cx="{number(x)}" cy="{number(y)}" r="9"/>'
    return [disc, _text(f"number {style}", x, y + 3.7, mark)]


def _directory(top: float) -> tuple[list[str], float]:
    """The stops in words, and what the lines mean; returns how far down it goes."""
    left, right, beside = 26.0, 716.0, 316.0
    parts, y = [], top
    for route in (IMAGE, FFCV):
        title = f"{route.title}, from {_between()}" if route is FFCV else route.title
        parts.append(_text("title", left, y, title))
        for what, mark in _discs(route).items():
            y += 22
            parts += _disc(left + 9, y - 4, route.style, mark)
            parts += [_text("mono", left + 28, y, what), _text("soft", left + 28 + beside, y, route.caption(what))]
        y += 34
    bottom, y = y - 34, top
    parts.append(_text("title", right, y, HYPER.title))
    for what, mark in _discs(HYPER).items():
        parts += _disc(right + 9, y + 18, HYPER.style, mark)
        parts += [_text("mono", right + 28, y + 22, what), _text("soft", right + 28, y + 38, HYPER.caption(what))]
        y += 39
    y += 36
    parts.append(_text("title", right, y, "How to read the house"))
    for kind, text in LEGEND:
        y += 22
        if kind in ("thin", "line image", "line ffcv", "line hyper"):
            parts.append(f'<path class="{kind}" d="M{number(right)} {number(y - 4)}h28"/>')
        elif kind:
            parts.append(_rect(kind, right + 1, y - 11, 26, 14, 3))
        parts.append(_text("soft", right + 40 if kind else right, y, text))
    return parts, max(bottom, y) + 24


def main() -> None:
    """Write the picture."""
    order = read_order((ROOT / "CONTRIBUTING.md").read_text())
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(draw(import_graph(), order))


if __name__ == "__main__":
    main()
