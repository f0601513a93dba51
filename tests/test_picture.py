"""The picture of the house is the one that the code gives now, and refuses to tell what the code no longer holds."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.house import THINGS, WIDTH, House, shown_name
from tests.support.import_graph import ROOT, Graph, Order, import_graph, read_order
from tests.support.picture import FILE, draw
from tests.support.routes import HYPER, IMAGE, ROUTES, RouteError, Stop, check


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph()


@pytest.fixture(scope="module")
def order() -> Order:
    return read_order((ROOT / "CONTRIBUTING.md").read_text())


def test_the_stored_picture_is_the_code_s(graph: Graph, order: Order) -> None:
    drawn = draw(graph, order)
    assert FILE.read_text() == drawn, f"{FILE.relative_to(ROOT)} is not what the code gives now: run `make picture`"
    ElementTree.fromstring(drawn)


def test_nothing_stands_on_something_else(order: Order) -> None:
    house = House(order)
    boxes = {**house.rooms, **house.things}
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        apart = a.x + a.w <= b.x or b.x + b.w <= a.x or a.bottom <= b.y or b.bottom <= a.y
        assert apart, f"{one} and {other} overlap"
    for name, box in boxes.items():
        assert box.x >= 8, name
        assert box.x + box.w <= WIDTH - 8, name
        shown, size = ([shown_name(name)], 13) if name in house.rooms else (THINGS[name].lines, 12)
        assert max(map(len, shown)) * 0.6 * size < box.w, f"{name} does not fit into its box"  # in monospace


def test_names_are_above_the_lines_that_cross_them(graph: Graph, order: Order) -> None:
    drawn = draw(graph, order).splitlines()
    last_line = max(place for place, shape in enumerate(drawn) if 'class="line' in shape and "h28" not in shape)
    names = [place for place, shape in enumerate(drawn) if "over" in shape and shape.startswith("<text")]
    assert len(names) > len(House(order).rooms)
    assert last_line < min(names)


def test_every_stop_is_tied_to_the_one_before(graph: Graph) -> None:
    for route in ROUTES:
        assert len(check(route, graph)) == len(route.stops) - 1
    told = check(IMAGE, graph)
    assert "data_prep.build.ingest imports data_prep.images.prepare" in told
    assert "pipeline.data.order imports data_prep.manifest" in told


def test_a_stop_that_is_gone_is_refused(graph: Graph, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = replace(HYPER, stops=(*HYPER.stops[:-1], Stop("pipeline.records.tracking:Recorder", "")))
    with pytest.raises(RouteError, match=r"pipeline\.records\.tracking no longer defines Recorder"):
        check(renamed, graph)
    moved = replace(HYPER, stops=(*HYPER.stops[:-1], Stop("pipeline.tracking:Tracker", "")))
    with pytest.raises(RouteError, match=r"there is no module pipeline\.tracking"):
        check(moved, graph)
    monkeypatch.setattr("tests.support.picture.ROUTES", (renamed,))
    with pytest.raises(RouteError):
        draw(graph, order)


def test_stops_that_nothing_ties_are_refused(graph: Graph) -> None:
    broken = replace(IMAGE, stops=(IMAGE.stops[1], IMAGE.stops[-1]), hands=())
    with pytest.raises(RouteError, match=r"no import ties data_prep\.images\.prepare:prepare_image"):
        check(broken, graph)
    with pytest.raises(RouteError, match=r"no import ties .*Feed to .*train_step"):
        check(replace(IMAGE, hands=("data_prep.build.shards", "pipeline.data.views")), graph)
    cut = {module: dict(imported) for module, imported in graph.items()}
    del cut["pipeline.training.engine"]["pipeline.models.hornet"]
    with pytest.raises(RouteError, match=r"no import ties .*train_step to pipeline\.models\.hornet:HorNet"):
        check(IMAGE, cut)


def test_the_picture_does_not_depend_on_where_the_code_lies(tmp_path: Path, graph: Graph, order: Order) -> None:
    for package in ("data_prep", "pipeline", "launch"):
        (tmp_path / package).symlink_to(ROOT / package)
    assert draw(import_graph(tmp_path), order, tmp_path) == draw(graph, order)
