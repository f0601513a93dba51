"""Which MLflow run a run folder is: a file in it, that any later stage and any other machine reads."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

# Of a run folder: where MLflow is, and which run of it this is; what others know a run by, and one that has finished.
ID_FILE = "mlflow_run.json"
CONFIG_FILE, LOG_FILE, SUMMARY_FILE = "config.yaml", "log.jsonl", "summary.json"


def read_id(run_dir: Path) -> dict[str, Any]:
    """What a run folder's ID_FILE says; nothing where it has none."""
    with suppress(OSError, ValueError):
        known = json.loads((run_dir / ID_FILE).read_text())
        if isinstance(known, dict):
            return known
    return {}
