"""Runs read one by one, compared in the terminal, and written as a page."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from pipeline.review.evaluations import read_evaluations
from pipeline.review.page import Page
from pipeline.review.run import read_mapping, read_run
from pipeline.review.terminal import print_comparison


def write_review(paths: list[Path], page_path: Path, port: int, mlflow: str | None) -> int:
    """Print the comparison of the runs in `paths`, and write their page; returns its bytes. `mlflow`: where MLflow
    shows them, if it will. Raises OSError where the page cannot be written.
    """
    page, runs, evaluations = Page(len(paths)), [], []
    total = sum(_bytes(path / "log.jsonl") for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=_is_quick(total), leave=False) as bar:
        for path, name in zip(paths, _names(paths), strict=True):
            run, log = read_run(path, port, bar.update, name)
            page.add(run, log)
            del log
            runs.append(run)
            evaluations += read_evaluations(path, run.name)
    print_comparison(runs)
    return page.write(page_path, runs, evaluations, mlflow)


def _names(paths: list[Path]) -> list[str | None]:
    """Of runs of the same name, as copies are, their folders; of folders of the same name those above them too. None:
    the run's own name.
    """
    folders = [path.resolve() for path in paths]
    own = [str(read_mapping(path / "config.yaml").get("name") or path.name) for path in folders]
    often, of_folders = Counter(own), Counter(folder.name for folder in folders)
    return [
        f"{folder.parent.name}/{folder.name}"
        if of_folders[folder.name] > 1
        else (folder.name if often[name] > 1 else None)
        for folder, name in zip(folders, own, strict=True)
    ]


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_quick(total: int) -> bool:
    return total < 20_000_000 or not sys.stderr.isatty()
