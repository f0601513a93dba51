"""The data on each host: the same manifest, and all of its files at their sizes."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.foreign.index import ensure_indexed
from data_prep.manifest import MANIFEST_NAME, Manifest, dataset_folder, index_path
from data_prep.storage import Folder, is_url
from pipeline.config.data import Data
from pipeline.config.dense import SegmentConfig
from pipeline.config.detect import DetectConfig
from pipeline.config.load import Config
from pipeline.config.run import RunConfig
from pipeline.data.opened import check_remote, open_manifest, parts_of, training_order
from pipeline.dense.opened import dense_order, open_dense
from pipeline.detection.opened import open_instances
from pipeline.doctor.report import Finding, Report, Reports, answered, differing, each, odd

_VERIFY = "`python -m data_prep verify` looks into every byte of it"


def look(config: RunConfig, is_first: bool, fast: bool) -> Report:
    """Of each set: what its manifest is, and which files are not as it says. Raises what opening them raises."""
    if isinstance(config, SegmentConfig | DetectConfig):
        return _of_dense(config, is_first)
    assert isinstance(config, Config)
    data = config.data
    if data.reader == "stream":
        return {"streamed": True} | ({} if fast else _of_stream(config))
    for one in data.sets:
        ensure_indexed(one.path)
    manifest = open_manifest(data)
    if is_first:
        training_order(config, manifest)
    check_remote(data, manifest)
    sets = {
        part.folder: _of_set(part.folder, part_manifest.dataset_id, _files(part, part_manifest))
        for part, part_manifest in parts_of(data, manifest)
    }
    return {"sets": sets, "classes": manifest.num_classes}


def _of_dense(config: SegmentConfig | DetectConfig, is_first: bool) -> Report:
    manifest = open_instances(config) if isinstance(config, DetectConfig) else open_dense(config)
    folder = config.data.path
    if is_first:
        dense_order(config, manifest)
    shards = [entry for split in manifest.splits.values() for entry in split.shards]
    files = [(folder, entry.file, entry.bytes) for entry in shards]
    indexes = [(folder, str(index_path(Path(entry.file))), None) for entry in shards]
    told = _of_set(folder, manifest.dataset_id, [*files, *indexes])
    return {"sets": {folder: told}, "classes": manifest.num_classes}


def _of_stream(config: Config) -> Report:
    """By way of webdataset, which imports torch."""
    stream = importlib.import_module("pipeline.data.stream.manifest")
    manifest = stream.load_manifest(config.data, count_val=False)
    notes: list[str] = []
    found = stream.streamed_set(config.data, manifest)
    stream.look_into(found, config.data, "train", notes.append)
    told = {"dataset_id": manifest.dataset_id, "manifest": "", "files": len(found.urls["train"]), "faults": []}
    return {"notes": notes, "sets": {config.data.folder: told}, "classes": manifest.num_classes}


def _of_set(path: str, dataset_id: str, files: Iterable[tuple[str, str, int | None]]) -> dict[str, Any]:
    folder = Folder(dataset_folder(path))
    faults: list[str] = []
    number = 0
    listed: dict[str, dict[str, int | None]] = {}
    for place, name, size in files:
        number += 1
        if is_url(place):
            continue  # looked at by check_remote
        if place not in listed:
            listed[place] = Folder(place).sizes()
        there = listed[place].get(name, -1)
        if there == -1:
            faults.append(f"{place}/{name} is missing")
        elif size is not None and there != size:
            faults.append(f"{place}/{name} has {there:,} bytes, the manifest says {size:,}")
    return {
        "dataset_id": dataset_id,
        "manifest": hashlib.sha256(folder.read(MANIFEST_NAME)).hexdigest()[:12],
        "files": number,
        "faults": faults,
    }


def _files(data: Data, manifest: Manifest) -> Iterator[tuple[str, str, int | None]]:
    """(folder, name, bytes) of what a run reads: tars with their indexes, or .beton."""
    folder, shards = dataset_folder(data.folder), manifest.shards_folder(data.folder)
    for split in manifest.splits.values():
        if data.format == "ffcv":
            yield from ((folder, entry.file, entry.bytes) for entry in split.betons)
            continue
        for entry in split.shards:
            yield shards, entry.file, entry.bytes
            yield folder, str(index_path(Path(entry.file))), None


def judge(reports: Reports) -> list[Finding]:
    """Manifests against each other, files against the manifest."""
    told, findings = answered("data", reports, "data")
    findings += each("data", "warn", {h: "; ".join(r["notes"]) for h, r in told.items() if r.get("notes")}, "")
    told = {host: report for host, report in told.items() if "sets" in report}
    for path in next(iter(told.values()))["sets"] if told else ():
        sets = {host: report["sets"].get(path, {}) for host, report in told.items()}
        for key, what in (("dataset_id", "dataset_id"), ("manifest", "digest of dataset.json")):
            values = {host: str(one.get(key))[:12] for host, one in sets.items()}
            if hosts := odd(values):
                text = f"{path}: {what} {differing(values)}"
                findings.append(Finding("manifest", "fail", text, "copy the data set anew to where it is old", hosts))
                break
        faults = {host: _first(one["faults"]) for host, one in sets.items() if one.get("faults")}
        findings += each("shards", "fail", faults, f"copy it there again, or build it; {_VERIFY}")
    if told and not findings:
        files = {path: one["files"] for path, one in next(iter(told.values()))["sets"].items()}
        text = ", ".join(f"{path}: {number:,} files" for path, number in files.items())
        findings.append(Finding("data", "pass", f"one manifest, every file at its size: {text}"))
    return findings


def _first(faults: list[str]) -> str:
    return "; ".join(faults[:2]) + (f"; and {len(faults) - 2} more" if len(faults) > 2 else "")
