"""The import direction of CONTRIBUTING.md, checked on the source."""

import ast
from pathlib import Path

from tests.support.runs import ROOT

# A file may import what stands in an earlier row, or in its own.
LAYERS = [
    {"config", "ops", "ranks"},
    {"models", "data", "records", "checkpoints", "evaluation", "training"},
    {"__main__"},
]


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(package: str) -> dict[str, set[str]]:
    return {str(path.relative_to(ROOT)): imported(path) for path in sorted((ROOT / package).rglob("*.py"))}


def only_in(library: str) -> list[str]:
    everything = files("pipeline") | files("data_prep")
    return [path for path, names in everything.items() if any(name.split(".")[0] == library for name in names)]


def test_layers() -> None:
    rank = {module: level for level, modules in enumerate(LAYERS) for module in modules}
    for path, names in files("pipeline").items():
        module = Path(path).parts[1].removesuffix(".py")
        if module == "__init__":
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "pipeline" and len(parts) > 1 and parts[1] in rank:
                assert rank[parts[1]] <= rank[module], f"{path} imports {name}"


def test_packages_keep_apart() -> None:
    for path, names in files("data_prep").items():
        assert not any(name.split(".")[0] == "pipeline" for name in names), path
    for path, names in files("pipeline").items():
        taken = {name.split(".")[1] for name in names if name.startswith("data_prep.")}
        assert taken <= {"manifest", "labels", "storage", "foreign"}, path
    for path, names in (files("pipeline/models") | files("pipeline/ops")).items():
        outside = {name.split(".")[0] for name in names} & {"deepspeed", "mlflow", "ffcv", "pydantic", "data_prep"}
        assert not outside, path
        assert not any(name.startswith("pipeline.") and name.split(".")[1] not in ("models", "ops") for name in names)


def test_one_home_each() -> None:
    assert only_in("deepspeed") == ["pipeline/training/engine.py"]
    assert only_in("mlflow") == ["pipeline/records/tracking.py"]
    assert set(only_in("dask")) | set(only_in("distributed")) == {"data_prep/cluster.py"}
    homes = {"beton.py", "ffcv_decoders.py", "ffcv_loader.py", "file.py", "write.py"}
    assert {Path(path).name for path in only_in("ffcv")} <= homes
