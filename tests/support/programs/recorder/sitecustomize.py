"""With this folder on PYTHONPATH, every rank of `python -m pipeline` writes down which samples it trained on, or waits.

RECORD_SAMPLES names a folder; a rank appends to START-RANK.jsonl, a file a process, {"step", "samples"} for each step
that it was fed. HOLD_AT, "STEP:FILE", has it wait after that step, counted from 1, until the file is there. The program
itself runs as it is: `Feed` is wrapped when it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def _hold(feed_class: Any, last_step: int, file: Path) -> None:
    step_of = feed_class.step

    def step(self: Any, number: int) -> Any:
        while number == last_step and not file.exists():  # steps are counted from 0 here
            time.sleep(0.02)
        yield from step_of(self, number)

    feed_class.step = step


def _record(feed_class: Any, folder: Path) -> None:
    make, step_of = feed_class.__init__, feed_class.step
    path = folder / f"{time.time_ns()}-{os.environ.get('RANK', '0')}.jsonl"

    def __init__(self: Any, config: Any, ranks: Any, batches: Any, *rest: Any) -> None:
        self.recorded = []

        def noted() -> Any:
            for batch in batches:
                self.recorded.extend(batch.samples.tolist())
                yield batch

        make(self, config, ranks, noted(), *rest)

    def step(self: Any, number: int) -> Any:
        self.recorded.clear()
        yield from step_of(self, number)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": number, "samples": self.recorded}) + "\n")

    feed_class.__init__, feed_class.step = __init__, step


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "pipeline.training.feed":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if "RECORD_SAMPLES" in os.environ:
                _record(module.Feed, Path(os.environ["RECORD_SAMPLES"]))
            if "HOLD_AT" in os.environ:
                last_step, _, file = os.environ["HOLD_AT"].partition(":")
                _hold(module.Feed, int(last_step), Path(file))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if {"RECORD_SAMPLES", "HOLD_AT"} & os.environ.keys():
    sys.meta_path.insert(0, _Finder())
