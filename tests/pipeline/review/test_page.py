"""The page of `python -m pipeline review` in a browser: clicked, read back, without a network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.review.page import PAGE_BYTES
from tests.support.browser import needs_browser
from tests.support.devtools import Page, browser
from tests.support.made_up_evaluations import make_dense_evaluation, make_evaluation
from tests.support.made_up_runs import make_chain, make_run
from tests.support.runs import run_module

pytestmark = needs_browser
READY = "document.documentElement?.dataset.ready"
TRACES = "(title) => charts.find((each) => each.title === title).plot.data"
OPEN_CPU_SECONDS = 4.0  # of the page's main thread; 1.9 measured on two cores that had five processes to run


class Reviewed(NamedTuple):
    runs: list[Path]
    file: Path
    said: str


def reviewed(*paths: Path, file: Path) -> Reviewed:
    done = run_module("pipeline", "review", *map(str, paths), "--html", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    return Reviewed(list(paths), file, done.stdout)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Reviewed:
    root = tmp_path_factory.mktemp("runs")
    runs = make_chain(root)
    return reviewed(root, file=root / "page.html")._replace(runs=runs)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def page(chromium: Page, chain: Reviewed) -> Page:
    """The page of the chain, freshly opened."""
    return opened(chromium, chain.file)


def opened(page: Page, file: Path, **look: Any) -> Page:
    page.look(**look)
    page.requests.clear()
    page.open(file.as_uri(), READY)
    return page


def drawn(page: Page, title: str) -> list[dict[str, Any]]:
    """The traces of a chart, scrolled to."""
    page.value(
        f"charts.find((each) => each.title === {json.dumps(title)}).node.scrollIntoView({{behavior: 'instant'}})"
    )
    page.wait(
        f"(({TRACES})({json.dumps(title)}))?.length && !charts.find((e) => e.title === {json.dumps(title)}).stale"
    )
    keep = "{x: Array.from(t.x ?? []), y: Array.from(t.y ?? []), name: t.name, mode: t.mode, text: t.text}"
    return page.value(f"({TRACES})({json.dumps(title)}).map((t) => ({keep}))")


def logged(run: Path, key: str) -> dict[float, float | None]:
    """step -> value as it stands in log.jsonl; None where it is not finite."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] if math.isfinite(line[key]) else None for line in lines if key in line}


@pytest.mark.parametrize(("title", "key"), [("training loss", "loss"), ("top-1 (%)", "top1"), ("learning rate", "lr")])
def test_values_are_those_of_the_log(page: Page, chain: Reviewed, title: str, key: str) -> None:
    lines = {trace["name"]: trace for trace in drawn(page, title) if "lines" in trace["mode"]}
    assert set(lines) == {run.name for run in chain.runs}
    for run in chain.runs:
        trace = lines[run.name]
        if key == "lr":  # a curve of few bends: what is shown is a part of the log
            assert dict(zip(trace["x"], trace["y"], strict=True)).items() <= logged(run, key).items()
        else:
            assert dict(zip(trace["x"], trace["y"], strict=True)) == logged(run, key)


def test_the_terminal_says_the_same(page: Page, chain: Reviewed) -> None:
    rows = page.value("[...document.querySelectorAll('#runs tbody tr')].map((row) => row.innerText)")
    in_terminal = "".join(line for line in chain.said.splitlines() if "│" in line)
    for run, row in zip(chain.runs, page_order(chain.runs, rows), strict=True):
        (top1, *_), loss = list(logged(run, "top1").values())[-1:], list(logged(run, "loss").values())[-1]
        for value in (f"{top1:.2f}", f"{loss:.4f}"):
            assert value in in_terminal
            assert value in row
    assert "2 skipped, 1 not finite" in next(row for row in rows if "lr2e-3" in row)
    assert "2 skipped" in in_terminal


def page_order(runs: list[Path], rows: list[str]) -> list[str]:
    """The row of each run: its name is the row's first word."""
    return [next(row for row in rows if row.split()[0] == run.name) for run in runs]


def test_a_loss_that_is_not_finite_is_a_mark(page: Page) -> None:
    (marks,) = [trace for trace in drawn(page, "training loss") if trace["mode"] == "markers"]
    assert (marks["name"], marks["x"], marks["text"]) == ("pretrain-l-gf-lr2e-3", [1000, 1001], ["loss is NaN"] * 2)


def test_nothing_is_fetched(page: Page, chain: Reviewed) -> None:
    page.value("window.scrollTo(0, document.body.scrollHeight)")
    drawn(page, "Calibration")
    assert [each for each in page.requests if not each.startswith(("file:", "data:", "blob:"))] == []
    assert [each for each in page.requests if each.startswith("file:")] == [chain.file.as_uri()]
    assert page.errors == []
    text = chain.file.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    # What a page of this policy asks a network for is refused by the browser itself.
    asking = "const one = new Image(); one.onerror = () => then(true); one.src = 'http://127.0.0.1:9/';"
    assert page.value(f"new Promise((then) => {{ {asking} }})")
    assert any("Content Security Policy" in error for error in page.errors)
    page.errors.clear()


def test_controls(page: Page, chain: Reviewed) -> None:
    run = json.dumps(chain.runs[0].name)
    page.click("input[value=images] + span")
    images = drawn(page, "training loss")[0]["x"]
    page.click("input[value=hours] + span")
    hours = drawn(page, "training loss")[0]["x"]
    assert images[:2] == [4096, 8192]
    assert hours == sorted(hours)
    assert 0 < hours[0] < hours[-1] < 1
    page.click("input[value=log] + span")
    assert page.value("charts[0].plot.layout.yaxis.type") == "log"
    before = len(drawn(page, "training loss"))
    page.value(
        "const range = document.querySelector('#smoothing'); range.value = 2; range.dispatchEvent(new Event('input'))"
    )
    smooth = drawn(page, "training loss")
    assert len(smooth) == before + len(chain.runs)
    rough = [abs(a - b) for a, b in zip(smooth[0]["y"][500:], smooth[0]["y"][501:], strict=False)]
    even = [abs(a - b) for a, b in zip(smooth[1]["y"][500:], smooth[1]["y"][501:], strict=False)]
    assert max(even) < max(rough) / 5
    page.click(f"input[aria-label='show {chain.runs[0].name}']")
    assert chain.runs[0].name not in {trace["name"] for trace in drawn(page, "training loss")}
    assert page.value(f"document.querySelector('#configuration').textContent.includes({run})")
    page.click("input[value=memory_gb] + span")
    assert page.value("charts.some((each) => each.title === 'memory (GB)')")
    none, everything = "#runs .controls button:last-child", "#runs .controls button"
    page.click(none)
    assert page.value("charts.find((each) => each.title === 'training loss').describe().data") == []
    page.click(everything)
    assert {trace["name"] for trace in drawn(page, "memory (GB)")} == {each.name for each in chain.runs}


def test_keyboard(page: Page, chain: Reviewed) -> None:
    drawn(page, "training loss")
    page.value("document.querySelector('figure.chart').focus()")
    values = list(logged(page_run(page, chain), "loss").items())
    for step, value in values[:3]:
        page.key("ArrowRight")
        assert page.value("charts[0].reading.value").endswith(f"step {step}, loss {value:.7g}")
    page.key("+", "+")
    low, high = page.value("charts[0].plot.layout.xaxis.range")
    assert high - low < 0.6 * len(values)
    page.key("0", "0")
    page.wait("charts[0].plot.layout.xaxis.range[1] >= 1200")
    # Everything that can be clicked can be reached.
    reached = "[...document.querySelectorAll('main :is(button, input, select, a)')].every((each) => each.tabIndex >= 0)"
    assert page.value(reached)


def page_run(page: Page, chain: Reviewed) -> Path:
    name = page.value("charts[0].plot.data[0].meta.name")
    return next(run for run in chain.runs if run.name == name)


def test_lineage_leads_from_archive_to_export(page: Page) -> None:
    page.wait("document.querySelectorAll('.lineage path').length > 0")
    kinds = page.value("[...document.querySelectorAll('.box .kind')].map((each) => each.textContent)")
    assert {"archive", "data set", "pretrain", "finetune", "checkpoint", "evaluation", "export"} == set(kinds)
    assert page.value("document.querySelector('#lineage-details').hidden")
    place = kinds.index("data set")
    page.value(f"document.querySelectorAll('.box')[{place}].focus()")
    page.key("Enter", "\r")
    details = page.value("document.querySelector('#lineage-details').innerText")
    assert "dataset_id" in details
    assert "26ae41928015a5f5eda2479a4dc5" in details
    assert page.value("document.querySelectorAll('.lineage path.on').length") > 3
    page.value("[...document.querySelectorAll('.box')].find((e) => e.innerText.includes('step-00003000')).click()")
    assert "0.783" in page.value("document.querySelector('#lineage-details').innerText")


def test_what_happened_when(page: Page) -> None:
    rows = page.value("[...document.querySelectorAll('#events tbody tr')].map((row) => row.innerText)")
    what = [row.split("\t")[3] for row in rows]
    assert what.count("step left out") == 2
    assert what.count("stopped") == what.count("resumed") == 2
    assert what.count("not finite") == 1
    spent = page.value("charts.find((e) => e.title === 'Where the time went').describe().data.at(-1).customdata")
    assert sorted(spent)[-1] == "4.0 h"
    assert sorted(spent)[:-1] == ["0"] * 4


def test_evaluations(page: Page, chain: Reviewed) -> None:
    assert page.value("document.querySelector('#evaluation .figures b').textContent").endswith(" %")
    assert page.value("document.querySelectorAll('#pairs img').length") > 4
    assert page.value("document.querySelectorAll('#samples img').length") == 24
    page.value("document.querySelectorAll('#evaluations tbody button')[0].click()")
    evaluation = json.loads(next(chain.runs[-1].parent.glob("*/evaluations/*in22k/evaluation.json")).read_text())
    shown = page.value("document.querySelector('#evaluation .figures b').textContent")
    assert shown == f"{evaluation['results']['top1_percent']:.2f} %"
    assert "300 of 600 classes" in page.value("document.querySelector('#classes').innerText")
    page.value(
        "const s = document.querySelector('#classes input'); s.value = 'n02102000'; s.dispatchEvent(new Event('input'))"
    )
    assert page.value("document.querySelectorAll('#classes tbody tr').length") == 1
    assert page.value("document.querySelector('#classes tbody th').textContent") == "red fox"


def test_evaluations_of_dense_tasks(chromium: Page, tmp_path: Path) -> None:
    """Scores, classes and pictures of a segmentation and a detection, beside a classification and damaged files."""
    run = make_run(tmp_path, "dense", steps=60)
    make_evaluation(run, "of-classify", 60)
    for task in ("detect", "segment"):
        make_dense_evaluation(run, task, 60)
    for number, damage in enumerate(
        ({"classes": 3, "curves": [1], "pictures": {}}, {"classes": [{}], "pictures": [{}]})
    ):
        folder = run / "evaluations" / f"damaged-{number}"
        folder.mkdir()
        (folder / "detection.json").write_text(json.dumps({"created": "2026", "results": {"box_ap": "high"}, **damage}))
    page = opened(chromium, reviewed(tmp_path, file=tmp_path / "page.html").file, width=390, height=844)
    rows = page.value("[...document.querySelectorAll('#evaluations tbody tr')].map((row) => row.innerText)")
    told = {row.split()[0]: row.split() for row in rows}
    assert told["of-segment"][-4:] == ["60", "63.50", "mIoU", "2,000"]
    assert told["of-detect"][-5:] == ["60", "41.25", "box", "AP", "2,000"]
    assert "top-1" in told["of-classify"]

    def choose(name: str) -> None:
        found = f"[...document.querySelectorAll('#evaluations tbody button')].find((e) => e.textContent === '{name}')"
        page.value(f"{found}.click()")

    for name in ("damaged-0", "damaged-1", "of-classify", "of-detect", "of-segment"):
        choose(name)
        assert page.errors == []
        assert page.value("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    figures = page.value("[...document.querySelectorAll('#evaluation .figures div')].map((each) => each.innerText)")
    assert figures[0].split("\n") == ["63.50 %", "mIoU"]
    first = page.value("[...document.querySelectorAll('#classes tbody tr')].map((row) => row.innerText)")
    assert first[0].split("\t") == ["lemon", "35.5", "35.5", "35.5", "8,000", "orange"]
    assert first[-1].startswith("orange\t–"), "a class that is in no image comes last"
    assert page.value("document.querySelectorAll('#predictions img').length") == 2
    captions = page.value("[...document.querySelectorAll('#predictions figcaption')].map((each) => each.innerText)")
    assert captions[0].split() == ["97.5", "%", "image", "1", "tabby", "lynx"]
    choose("of-detect")
    lines = {trace["name"]: trace for trace in drawn(page, "Precision over recall, boxes")}
    assert lines.keys() == {"IoU 0.5", "mean of 0.5 to 0.95"}
    assert lines["IoU 0.5"]["y"][50] == 0.75
    assert page.value("document.querySelectorAll('#predictions img').length") == 2


@pytest.mark.parametrize("phone", [False, True])
def test_widths_and_colours(chromium: Page, chain: Reviewed, phone: bool) -> None:
    """No part is wider than the window, and text stands out from its ground: 7 to 1, muted text 4.5 to 1."""
    width = 390 if phone else 1280
    for dark in (False, True):
        page = opened(chromium, chain.file, width=width, height=844, dark=dark, phone=phone)
        assert page.value("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert page.value("innerWidth") == width
        outside = (
            "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1 "
            "&& !e.closest('.scroll') && !e.closest('.plot')).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert page.value(outside) == []
        colours = page.value(
            "['--text', '--muted', '--accent', '--card', '--ground'].map((name) =>"
            " getComputedStyle(document.documentElement).getPropertyValue(name).trim())"
        )
        text, muted, accent, card, ground = map(luminance, colours)
        assert (card < 0.05) == dark
        for behind in (card, ground):
            assert contrast(text, behind) > 7
            assert min(contrast(muted, behind), contrast(accent, behind)) > 4.5
        drawn(page, "training loss")
        assert page.value("charts[0].plot.layout.paper_bgcolor") == colours[3]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_markup_is_text(chromium: Page, tmp_path: Path) -> None:
    """In names of runs, in values of configurations, in events, in classes and in metrics."""
    evil = "</script><script>broken=1</script><img src=x onerror=broken=1>%{x}{{blocks}}"
    run = make_run(tmp_path, "plain", steps=60)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("name: plain", f"name: '{evil}'").replace("hornet_large_gf", evil))
    (run / "events.txt").write_text(f"2023-11-14 22:13:30 +0000  step 5  {evil}\n")
    line = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    (run / "log.jsonl").open("a").write(json.dumps({**line, "step": 61, evil: 1.0}) + "\n")
    for file in ("evaluation.json", "per_class.csv"):
        path = make_evaluation(run, f"of-{file}", 60) / file
        path.write_text(path.read_text().replace("tabby", evil))
    make_run(tmp_path, "other", steps=60, seed=1)
    page = opened(chromium, reviewed(tmp_path, file=tmp_path / "page.html").file)
    drawn(page, "training loss")
    assert page.value("typeof broken") == "undefined"
    assert page.errors == []
    assert page.value("document.querySelectorAll('img[src=x]').length") == 0
    for part in ("runs", "events", "configuration", "classes", "curves", "lineage"):
        assert page.value(f"document.querySelector('#{part}').textContent.includes({json.dumps(evil[:60])})"), part
    page.value("document.querySelector('#evaluations tbody button').click()")
    drawn(page, "Confusion, rolled up the WordNet tree")
    assert page.value("document.querySelector('#samples').textContent.includes('onerror=broken')")
    assert page.value("document.querySelectorAll('img[src=x]').length") == 0
    assert page.value("typeof broken") == "undefined"
    assert page.value("document.title").startswith("2 runs: </script>")


def test_twenty_long_runs_fit(chromium: Page, tmp_path: Path) -> None:
    """20 runs of 100,000 steps: under 5 MB, open soon, and every extreme of the log is in the page."""
    long = make_run(tmp_path, "run-00", steps=100_000, faults=True)
    make_evaluation(long, "step-00100000-ema-in22k", 100_000, classes=21_841)
    for i in range(1, 20):
        run = make_run(tmp_path, f"run-{i:02}", steps=60, seed=i, lr=1e-3 * i)
        (run / "log.jsonl").unlink()
        (run / "log.jsonl").symlink_to(long / "log.jsonl")
    file = reviewed(tmp_path, file=tmp_path / "page.html").file
    assert 2_000_000 < file.stat().st_size < PAGE_BYTES
    chromium.call("Performance.enable", timeDomain="threadTicks")
    spent = []
    for _ in range(2):
        chromium.open("about:blank", "document.body")
        before = cpu_seconds(chromium)
        opened(chromium, file)
        spent.append(cpu_seconds(chromium) - before)
    print(f"opened in {spent} s of its main thread")
    assert min(spent) < OPEN_CPU_SECONDS
    page = chromium
    loss = logged(long, "loss")
    trace = drawn(page, "training loss")[0]
    found = dict(zip(trace["x"], trace["y"], strict=True))
    assert len(found) < 3000
    assert found.items() <= loss.items()
    values = [value for value in loss.values() if value is not None]
    assert min(values) in found.values()
    assert max(values) in found.values()
    assert None in found.values()


def cpu_seconds(page: Page) -> float:
    metrics = {each["name"]: each["value"] for each in page.call("Performance.getMetrics")["metrics"]}
    return metrics["TaskDuration"]
