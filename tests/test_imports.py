"""Imports go one way: no circle of files or rooms, the floors of CONTRIBUTING.md, one home for each heavy library."""

import ast
from pathlib import Path

import pytest

from tests.support.import_graph import (
    ROOT,
    Graph,
    Order,
    Tie,
    against_order,
    circles,
    import_graph,
    modules,
    read_order,
    room_graph,
    room_of,
)

HEAVY = {"deepspeed", "mlflow", "ffcv", "pydantic"}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph()


@pytest.fixture(scope="module")
def order() -> Order:
    return read_order((ROOT / "CONTRIBUTING.md").read_text())


def told(lines: list[str]) -> str:
    return "\n".join(["", *lines])


def test_no_circle_of_files(graph: Graph) -> None:
    found = circles(graph)
    assert not found, told([str(circle) for circle in found])


def test_no_circle_of_rooms(graph: Graph) -> None:
    found = circles(room_graph(graph))
    assert not found, told([str(circle) for circle in found])


def test_rooms_stand_in_the_order_of_contributing(graph: Graph, order: Order) -> None:
    faults = against_order(room_graph(graph), order)
    assert not faults, told(faults)


def test_packages_keep_apart(graph: Graph, order: Order) -> None:
    taken = {room_of(target) for module in graph if module.startswith("pipeline") for target in graph[module]}
    allowed = {
        f"data_prep.{name}"
        for name in (
            "manifest",
            "dense_set",
            "labels",
            "storage",
            "foreign",
            "credentials",
            "images",
            "tar_header",
            "ledger",
        )
    }
    assert {room for room in taken if room.startswith("data_prep")} <= allowed
    assert {room for room in order.open if room.startswith("data_prep")} == allowed
    for module, imported in graph.items():
        if module.startswith("data_prep"):
            assert not [target for target in imported if not target.startswith("data_prep")], module
        if room_of(module) in ("pipeline.models", "pipeline.ops"):
            # The model of a run is made from its section of the configuration at one place.
            own = {"pipeline.models", "pipeline.ops"} | (
                {"pipeline.config"} if module == "pipeline.models.build" else set()
            )
            assert {room_of(target) for target in imported} <= own, module
    for path in [path for room in ("models", "ops") for path in (ROOT / "pipeline" / room).rglob("*.py")]:
        assert not libraries(path) & (HEAVY | {"data_prep"}), path


def libraries(path: Path) -> set[str]:
    """First names of all that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_one_home_each() -> None:
    homes: dict[str, set[str]] = {}
    for module, path in modules().items():
        for library in libraries(path):
            homes.setdefault(library, set()).add(module)
    assert homes["deepspeed"] == {"pipeline.training.engine", "launch.deepspeed_agent", "launch.deepspeed_runner"}
    assert homes["mlflow"] == {"pipeline.records.mlflow_run"}
    assert homes["dask"] | homes["distributed"] == {"data_prep.cluster"}
    # One door to libjpeg-turbo's decoder; prepare.py encodes.
    assert homes["simplejpeg"] == {"data_prep.images.turbo", "data_prep.images.prepare"}
    assert homes["ffcv"] <= {
        *("data_prep.beton.file", "data_prep.beton.write"),
        *("pipeline.data.beton", "pipeline.data.beton_file"),
        *("pipeline.data.ffcv_decoders", "pipeline.data.ffcv_loader"),
    }


def test_files_are_opened_by_pil_in_one_place() -> None:
    """What a file looks like is said there. The others open what was drawn or stored by ourselves."""
    opening = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "Image.open"
    }
    assert opening == {
        *("data_prep.images.pil", "data_prep.beton.sample"),
        *("data_prep.demo.icons", "data_prep.demo.clipart"),
    }


def written(root: Path, files: dict[str, str]) -> Graph:
    """The graph of a made-up project."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return import_graph(root)


def test_hidden_circles_are_found(tmp_path: Path) -> None:
    """One side inside a function, the other for the type checker alone."""
    graph = written(
        tmp_path,
        {
            "pipeline/data/order.py": "def batches():\n    from pipeline.training import run\n    return run.Run\n",
            "pipeline/training/run.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n"
                "    from ..models.net import Net\n"
                "class Run: ...\n"
            ),
            "pipeline/models/net.py": "from pipeline.data.order import (\n    batches,\n)\nclass Net: ...\n",
        },
    )
    (circle,) = circles(graph)
    assert str(circle) == (
        "pipeline.data.order -> pipeline.training.run -> pipeline.models.net -> pipeline.data.order\n"
        "  pipeline.data.order takes of pipeline.training.run: run (line 2)\n"
        "  pipeline.training.run takes of pipeline.models.net: Net (line 3)\n"
        "  pipeline.models.net takes of pipeline.data.order: batches (line 1)"
    )


def test_circles_of_rooms_need_no_circle_of_files(tmp_path: Path) -> None:
    graph = written(
        tmp_path,
        {
            "pipeline/data/order.py": "import pipeline.ops.kernels as kernels\n",
            "pipeline/data/keyed.py": "",
            "pipeline/ops/kernels.py": "",
            "pipeline/ops/layers.py": "from pipeline.data.keyed import uniform\n",
        },
    )
    assert circles(graph) == []
    (circle,) = circles(room_graph(graph))
    assert circle.path == ["pipeline.data", "pipeline.ops", "pipeline.data"]
    assert "uniform in pipeline.ops.layers (line 1)" in str(circle)


def test_names_of_modules_in_strings_count(tmp_path: Path) -> None:
    graph = written(
        tmp_path,
        {
            "data_prep/__main__.py": (
                'COMMANDS = {"plan": ("data_prep.plan", "what data_prep.verify says")}\nPACKAGE = "data_prep"\n'
            ),
            "data_prep/plan.py": "",
            "data_prep/verify.py": "",
            "data_prep/__init__.py": "",
        },
    )
    assert graph["data_prep.__main__"] == {"data_prep.plan": [Tie('"data_prep.plan"', 1)]}


def test_packages_import_by_any_spelling(tmp_path: Path) -> None:
    graph = written(
        tmp_path,
        {
            "pipeline/__init__.py": "",
            "pipeline/ops/__init__.py": "from . import layers\nfrom .layers import *\n",
            "pipeline/ops/layers.py": "from pipeline import ops\nimport pipeline.ops.none_of_ours, numpy\n",
        },
    )
    assert graph["pipeline.ops"] == {"pipeline.ops.layers": [Tie("layers", 1), Tie("*", 2)]}
    assert graph["pipeline.ops.layers"] == {"pipeline.ops": [Tie("ops", 1), Tie("pipeline.ops.none_of_ours", 2)]}


TABLE = """\
| floor | `data_prep` | `pipeline` |
|---|---|---|
| 2 | `build` | `training` |
| 1 | **`storage`** `images` | `data` `ghost` |
"""


def test_the_order_forbids(tmp_path: Path) -> None:
    graph = written(
        tmp_path,
        {
            "data_prep/storage.py": "import data_prep.build\n",
            "data_prep/images.py": "import pipeline.data\n",
            "data_prep/build.py": "import data_prep.storage\n",
            "data_prep/extra.py": "",
            "pipeline/data.py": "import data_prep.images, data_prep.storage\n",
            "pipeline/training.py": "import pipeline.data\n",
        },
    )
    assert against_order(room_graph(graph), read_order(TABLE)) == [
        "data_prep.extra is not in the table",
        "pipeline.ghost is in the table and does not exist",
        "data_prep.images imports pipeline.data (pipeline.data in data_prep.images (line 1)): "
        "packages use what is left of them",
        "data_prep.storage imports data_prep.build (data_prep.build in data_prep.storage (line 1)): "
        "data_prep.build stands on floor 2, data_prep.storage on 1",
        "pipeline.data imports data_prep.images (data_prep.images in pipeline.data (line 1)): "
        "data_prep.images is not open to other packages",
    ]
    with pytest.raises(ValueError, match="twice"):
        read_order(TABLE.replace("`ghost`", "`training`"))
    with pytest.raises(ValueError, match="no table"):
        read_order("")
