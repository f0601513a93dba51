"""Where everything came from: archives, data sets, runs, checkpoints, evaluations, exports, and what joins them."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.review.evaluations import Evaluation
from pipeline.review.run import Run, read_mapping
from pipeline.training.initial import FOLDER, SOURCE_FILE

_LEDGER_ROWS = 100_000_000
_REASONS = 8
_ALL_CHECKPOINTS = 8  # of so many runs; of more, those that something came of: a run lists its own
_EXPORTS = 20
EXPORT_FILE = "export.json"


class Node(NamedTuple):
    """A box: `details` are lines of (what, value), shown on a click; `level`: its column, the archives' is 0."""

    id: str
    kind: str
    title: str
    about: str
    details: list[tuple[str, str]]
    level: int


class Lineage:
    """The drawing of a set of runs: `nodes`, and `edges` from one id to another."""

    def __init__(self, runs: list[Run], evaluations: list[Evaluation]) -> None:
        self._nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str], None] = {}
        self._runs = {f"run:{i}": run for i, run in enumerate(runs)}
        for key, run in self._runs.items():
            data = self._data_set(run)
            details = [("stage", run.stage), ("state", run.state), ("folder", str(run.path)), ("step", f"{run.step:,}")]
            details += [("checkpoint", _checkpoint_line(checkpoint)) for checkpoint in reversed(run.checkpoints)]
            self._add(key, run.stage, run.name, f"{run.config.get('model.name', '')} · step {run.step:,}", details)
            if data is not None:
                self._join(data, key)
            if run.checkpoints and len(runs) <= _ALL_CHECKPOINTS:
                self._checkpoint(key, str(run.checkpoints[-1]["name"]))
        for key, run in self._runs.items():
            for path in _exports(run.path):
                self._export(key, run, path)
        for key, run in self._runs.items():
            if (origin := self._origin(run)) is not None:
                self._join(origin, key)
        self._evaluations(evaluations)

    @property
    def nodes(self) -> list[Node]:
        """Every box with its column: one right of the last that leads to it."""
        level = dict.fromkeys(self._nodes, 0)
        for _ in level:  # at most as many rounds as there are boxes; a circle, which cannot be, would end too
            moved = False
            for origin, target in self.edges:
                if level[target] <= level[origin] < len(level):
                    level[target], moved = level[origin] + 1, True
            if not moved:
                break
        return [node._replace(level=level[node.id]) for node in self._nodes.values()]

    def _add(self, key: str, kind: str, title: str, about: str, details: list[tuple[str, str]]) -> None:
        self._nodes.setdefault(key, Node(key, kind, title, about, details, 0))

    def _join(self, origin: str, target: str) -> None:
        if origin != target:
            self.edges[origin, target] = None

    def _data_set(self, run: Run) -> str | None:
        manifest = run.manifest
        identity, path = str(manifest.get("dataset_id", ""))[:80], run.config.get("data.path", "")
        if not identity:
            return None
        key = f"data:{identity}"
        if key in self._nodes:
            return key
        names, splits = manifest.get("synsets", manifest.get("classes")), manifest.get("splits")  # of a dense set
        classes = len(names) if isinstance(names, list) else 0
        details = [("dataset_id", identity), ("path", path), ("classes", f"{classes:,}")]
        images = 0
        for name, split in splits.items() if isinstance(splits, dict) else ():
            if isinstance(split, dict) and isinstance(split.get("samples"), int):
                details.append((f"{name} images", f"{split['samples']:,}"))
                images += split["samples"]
        details += _ledger(Path(path), identity)
        self._add(
            key, "data set", str(manifest.get("name", ""))[:80], f"{images:,} images, {classes:,} classes", details
        )
        said = manifest.get("settings")
        settings = said if isinstance(said, dict) else {}
        for what in ("source", "val_source"):
            source = settings.get(what)
            if isinstance(source, dict) and source.get("file"):
                archive = f"archive:{source['file']}:{source.get('fingerprint', '')}"
                lines = [(str(name), str(value)[:200]) for name, value in list(source.items())[:10]]
                self._add(archive, "archive", str(source["file"])[:80], "validation" if "val" in what else "", lines)
                self._join(archive, key)
        return key

    def _checkpoint(self, run_key: str, name: str) -> str:
        """The box of a checkpoint of a run that is reviewed."""
        run, key = self._runs[run_key], f"{run_key}:{name}"
        known = next((each for each in run.checkpoints if each["name"] == name), None)
        details = [("folder", str(run.path / "checkpoints" / name))]
        if known is not None:
            details += [("step", f"{known['step']:,}" if isinstance(known["step"], int) else "")]
            details += [("GB", f"{known['gigabytes']:.3g}"), ("link", known["link"] or "")]
            details += [(str(metric), f"{value}") for metric, value in known["metrics"].items()]
        self._add(key, "checkpoint", name, run.name, [line for line in details if line[1]])
        self._join(run_key, key)
        return key

    def _newest(self, run_key: str) -> str:
        checkpoints = self._runs[run_key].checkpoints
        return self._checkpoint(run_key, str(checkpoints[-1]["name"])) if checkpoints else run_key

    def _export(self, run_key: str, run: Run, path: Path) -> None:
        facts = [(key, str(value)[:200]) for key, value in read_mapping(path / EXPORT_FILE).items()]
        details = [("folder", str(path)), *(fact for fact in facts[:20] if not fact[1].startswith(("{", "[")))]
        details += [(name, f"{size / 1e6:,.1f} MB") for name, size in _files(path)]
        self._add(f"export:{path}", "export", path.name, run.name, details)
        self._join(self._newest(run_key), f"export:{path}")

    def _origin(self, run: Run) -> str | None:
        """What a run's weights came from: a checkpoint or an export of a run here, else a box of its own."""
        text = run.config.get("init.checkpoint", "null")
        if text in ("null", ""):
            return None
        fetched = run.path / FOLDER if text.startswith(("models:/", "runs:/")) else None
        said = read_mapping(fetched / SOURCE_FILE).get("path") if fetched else text
        others = {key: other for key, other in self._runs.items() if other is not run}
        path = Path(os.path.abspath(said)) if isinstance(said, str) and said else None
        if path is not None:
            for below in (_below, _below_by_name):
                for key, other in others.items():
                    if (inside := below(path, other.path.resolve())) is not None:
                        return self._inside(key, inside)
        facts = read_mapping((path or fetched or Path()) / EXPORT_FILE)
        checkpoint = facts.get("checkpoint")
        of = checkpoint if isinstance(checkpoint, dict) else {}
        for key, other in others.items():
            if other.path.resolve().name == of.get("run"):
                same = (each for each in _exports(other.path) if read_mapping(each / EXPORT_FILE) == facts)
                if (export := next(same, None)) is not None:
                    return f"export:{export}"
                if isinstance(of.get("step"), int):
                    return self._checkpoint(key, f"step-{of['step']:08d}")
        self._add(f"weights:{text}", "weights", Path(text).name[:80], "from elsewhere", [("init.checkpoint", text)])
        return f"weights:{text}"

    def _inside(self, run_key: str, inside: tuple[str, ...]) -> str:
        """The box of what a run has there: the newest checkpoint for the run's folder itself."""
        folder = self._runs[run_key].path
        if (
            len(inside) > 1
            and inside[0] == "exports"
            and (key := f"export:{folder / inside[0] / inside[1]}") in self._nodes
        ):
            return key
        if len(inside) > 1 and inside[0] == "checkpoints":
            with suppress(OSError):  # best, or latest
                return self._checkpoint(run_key, (folder / inside[0] / inside[1]).readlink().name)
            if inside[1].startswith("step-"):
                return self._checkpoint(run_key, inside[1])
        return self._newest(run_key)

    def _evaluations(self, evaluations: list[Evaluation]) -> None:
        of_path = {run.path: key for key, run in self._runs.items()}
        for evaluation in evaluations:
            key = of_path.get(evaluation.run_path)
            if key is None:
                continue
            results, data = evaluation.content["results"], evaluation.content["data"]
            step = evaluation.content["checkpoint"].get("step")
            names = [str(each["name"]) for each in self._runs[key].checkpoints if each["step"] == step]
            origin = self._checkpoint(key, names[0]) if names else self._newest(key)
            score, value = evaluation.content["score"]
            about = f"{score} {value:.2f} %" if isinstance(value, float | int) else ""
            details = [(name, str(value)) for name, value in {**data, **results}.items() if value is not None]
            node = f"evaluation:{key}:{evaluation.name}"
            self._add(node, "evaluation", evaluation.name, about, details)
            self._join(origin, node)


def _below(path: Path, folder: Path) -> tuple[str, ...] | None:
    """The names that lead from a run's folder to `path`; None where it is outside."""
    for each in (path, path.resolve()):
        if each.is_relative_to(folder):
            return each.relative_to(folder).parts
    return None


def _below_by_name(path: Path, folder: Path) -> tuple[str, ...] | None:
    """The same where the run was moved, by the name of its folder."""
    for number, name in reversed(list(enumerate(path.parts, 1))):
        inside = path.parts[number:]
        if name == folder.name and inside[:1] in ((), ("checkpoints",), ("exports",)):
            return inside
    return None


def _checkpoint_line(checkpoint: dict[str, Any]) -> str:
    link = f" ({checkpoint['link']})" if checkpoint["link"] else ""
    return f"{checkpoint['name']}{link}, {checkpoint['gigabytes']:.3g} GB"


def _ledger(folder: Path, identity: str) -> list[tuple[str, str]]:
    """How many images the data set's ledger has of each fate, where it is still there and of this data set."""
    if read_mapping(folder / "dataset.json").get("dataset_id") != identity:
        return []
    try:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(folder / "ledger.parquet")
        if file.metadata.num_rows > _LEDGER_ROWS:
            return []
        actions: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for batch in file.iter_batches(batch_size=1_000_000, columns=["action", "reason"]):
            for counter, column in ((actions, batch.column(0)), (reasons, batch.column(1))):
                for each in column.value_counts().to_pylist():
                    counter[str(each["values"])] += each["counts"]
    except (OSError, ValueError, KeyError):
        return []
    lines = [(f"ledger: {action}", f"{count:,}") for action, count in actions.most_common()]
    known = [(reason, count) for reason, count in reasons.most_common(_REASONS + 1) if reason not in ("", "None")]
    return lines + [(f"of these, {reason}"[:80], f"{count:,}") for reason, count in known[:_REASONS]]


def _exports(run_path: Path) -> list[Path]:
    try:
        found = sorted(path for path in (run_path / "exports").iterdir() if not path.name.startswith("."))
    except OSError:
        return []
    return found[:_EXPORTS]


def _files(path: Path) -> list[tuple[str, int]]:
    try:
        files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
        return [(each.name, each.stat().st_size) for each in files[:20]]
    except OSError:
        return []
