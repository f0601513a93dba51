"""What MLflow is to know of a run beside its numbers: kept in the run folder, for the day when MLflow can be told.

`tracking.json`: where MLflow is, the tags, what the run comes from, when it began and how it ended. `unsent/`: a file
for each evaluation or export that MLflow did not take. Numbers are in `log.jsonl` and `system.jsonl`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.storage import atomic_write
from pipeline.ranks.log_file import say

JOURNAL_FILE, UNSENT = "tracking.json", "unsent"


def read_journal(run_dir: Path) -> dict[str, Any]:
    """What `tracking.json` says; nothing of a run that began before there was one."""
    with suppress(OSError, ValueError):
        known = json.loads((run_dir / JOURNAL_FILE).read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return known
    return {}


def write_journal(run_dir: Path, entries: Mapping[str, Any]) -> None:
    """Set these entries, and leave the others; None takes one out. Never raises: what cannot be kept is told."""
    whole = {key: value for key, value in {**read_journal(run_dir), **entries}.items() if value is not None}
    _write(run_dir / JOURNAL_FILE, whole)


def keep_unsent(run_dir: Path, name: str, stage: Mapping[str, Any]) -> None:
    """Keep a stage that MLflow did not take, in place of one of the same name."""
    with suppress(OSError):  # told below
        (run_dir / UNSENT).mkdir(exist_ok=True)
    _write(_unsent_file(run_dir, name), stage)


def drop_unsent(run_dir: Path, name: str) -> None:
    """MLflow has it."""
    with suppress(OSError):
        _unsent_file(run_dir, name).unlink()
        (run_dir / UNSENT).rmdir()


def read_unsent(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Those that are kept, by name, the oldest first."""
    found = {}
    with suppress(OSError):
        for path in sorted((run_dir / UNSENT).glob("*.json"), key=lambda path: path.stat().st_mtime):
            with suppress(OSError, ValueError):
                found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return {name: stage for name, stage in found.items() if isinstance(stage, dict)}


def _unsent_file(run_dir: Path, name: str) -> Path:
    return run_dir / UNSENT / f"{name.replace('/', '_')}.json"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1, default=str).encode())
    except OSError as error:
        say(f"warning: {path} could not be written ({error}): sync-tracking will not know of it", sys.stderr)
