"""Which of MLflow's pages shows a run: by the files that the run and MLflow left, without asking anybody."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pipeline.records.address import database_file
from pipeline.records.review_address import direct_run_address, review_base, run_address


class Known(NamedTuple):
    """What `mlflow_run.json` of a run's folder says."""

    uri: str
    run_id: str


def known_run(path: Path) -> Known | None:
    """Where the MLflow run of a run's folder is; None where it has none, or MLflow was not reached yet."""
    try:
        known = json.loads((path / "mlflow_run.json").read_text())
        return Known(str(known["uri"]), str(known["run_id"])) if known["run_id"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def database_of(path: Path, known: Known) -> Path | None:
    """The database file that a run's numbers went to: where it was, or beside the run, moved with it."""
    file = database_file(known.uri)
    if file is None:
        return None
    beside = path.resolve().parent / "mlflow.db"
    return next((found for found in (file, beside) if found.is_file()), None)


def page_of_run(path: Path, port: int) -> str | None:
    """The address of its page, on its server or on the one that `review --mlflow` starts; None where there is none."""
    known = known_run(path)
    if known is None:
        return None
    if known.uri.startswith(("http://", "https://")):
        return direct_run_address(known.uri, known.run_id)
    database = database_of(path, known)
    if database is None:
        return None
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)) as connection:
            query = "SELECT experiment_id FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'"
            row = connection.execute(query, (known.run_id,)).fetchone()
    except sqlite3.Error:
        return None
    return run_address(review_base(port), str(row[0]), known.run_id) if row else None
