"""An export, top to bottom: weights found, files written and compared with the net, a card, one folder."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from data_prep.labels.spaces import lemma
from data_prep.storage import atomic_folder
from pipeline.checkpoints.files import record
from pipeline.checkpoints.restore import Weights, at_resolution, find_weights, on_data, restore
from pipeline.config.load import Config
from pipeline.data.augment import normalise
from pipeline.evaluation.sets import EvaluationSet, open_set
from pipeline.export.card import model_card
from pipeline.export.check import Check, Checked, ExportError
from pipeline.export.graph import check_size, write_onnx, write_program
from pipeline.export.hub import check_repository, preprocessing, push, write_safetensors, write_timm
from pipeline.models.hornet import HorNet
from pipeline.ranks.collectives import Ranks
from pipeline.records.run_id import ID_FILE
from pipeline.records.stage import Stage, is_known, log_stage, register, registered_kind

EXPORTS, FACTS_FILE, CLASSES_FILE, CARD_FILE = "exports", "export.json", "classes.csv", "README.md"
FORMAT_VERSION = 1
_TOOLS = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "safetensors")


@dataclass(frozen=True)
class Asked:
    """What the command was asked for, by its options."""

    checkpoint: Path
    to: str
    out: Path | None = None
    weights: str | None = None
    precision: str = "fp32"
    data: str | None = None
    resolution: int | None = None
    dynamic_size: bool = False
    license: str = "other"
    register: str | None = None
    push_to_hub: str | None = None


def export(asked: Asked) -> int:
    """Write the folder; prints where. Raises CheckpointError, ExportError."""
    if asked.push_to_hub is not None:
        check_repository(asked.push_to_hub)
    weights = find_weights(asked.checkpoint, asked.weights)
    if asked.register is not None:
        _check_name(asked.register, asked.to, weights)
    tree = weights.meta.config
    tree = tree if asked.resolution is None else at_resolution(tree, asked.resolution)
    config = Config.model_validate(tree if asked.data is None else on_data(tree, asked.data))
    folder = _folder(asked, weights)
    if asked.dynamic_size and asked.to in ("timm", "safetensors"):
        raise ExportError(f"--dynamic-size is for graphs; {asked.to} has none: leave it out")
    model = restore(weights, config)
    side = config.data.resolution
    check_size(model, asked.dynamic_size, side)
    console = Console()
    facts = _facts(asked, weights, config)
    images = [] if asked.data is None else _images_of(open_set(config, asked.data, None))
    card = model_card(facts, weights, config, asked.license)  # of damaged results it is told before the work
    try:
        with atomic_folder(folder) as temporary, console.status(f"writing {asked.to}, and comparing it with the net"):
            checked = _write(asked, weights, config, model, temporary, _in_header(facts), images)
            facts["checked"] = checked and checked._asdict()
            (temporary / CLASSES_FILE).write_text(_classes(weights.meta.synsets), encoding="utf-8")
            (temporary / CARD_FILE).write_text(card, encoding="utf-8")
            facts["files"] = {file.name: record(file).model_dump() for file in sorted(temporary.iterdir())}
            (temporary / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}: give another --out") from None
    if checked is not None:
        seen = f"; of {checked.images:,} images {checked.same_top1:,} have the same top-1" if checked.images else ""
        console.print(
            Text(f"its logits differ from the net's by {checked.difference:.1e} at most{seen}"), soft_wrap=True
        )
    console.print(Text(str(folder)), soft_wrap=True)
    _track(asked, weights, facts, folder, console)
    if asked.push_to_hub is not None:
        console.print(Text(push(asked.push_to_hub, folder)), soft_wrap=True)
    return 0


def _check_name(name: str, kind: str, weights: Weights) -> None:
    if not re.fullmatch(r"[\w.+ -]+", name) or name.strip() != name:
        raise ExportError(f"--register {name}: give a model's name of letters, digits, and . - _ alone")
    if not is_known(weights.run):
        raise ExportError(
            f"--register: {weights.run} has no run in MLflow ({ID_FILE}): give the folder of a run that MLflow has"
        )
    try:
        known = registered_kind(weights.run, name)
    except Exception as error:  # mlflow's, SQLAlchemy's and requests'
        raise ExportError(f"--register {name}: MLflow does not answer: {' '.join(str(error).split())[:200]}") from None
    if known not in (None, kind):  # whoever takes the best one, or the newest, counts on what it is
        raise ExportError(
            f"--register {name}: its versions are exports --to {known}: register {kind} under another name"
        )


def _track(asked: Asked, weights: Weights, facts: dict[str, Any], folder: Path, console: Console) -> None:
    """Into MLflow, beside the run that the weights are of; the files themselves where it is registered."""
    name, meta = f"export {weights.run.name}: {folder.name}", weights.meta
    params = {key: str(facts[key]) for key in ("kind", "model", "num_classes", "precision", "size")}
    tags = {"checkpoint": str(weights.path), "export": str(folder), "dataset_id": meta.dataset_id}
    files = [] if asked.register else [folder / each for each in (CARD_FILE, FACTS_FILE, CLASSES_FILE)]
    whole = folder if asked.register else None
    run_id = log_stage(weights.run, Stage("export", name, meta.step, {}, params, tags, files, whole))
    if asked.register is None:
        return
    top1 = meta.metrics.get("top1" if weights.which == "ema" or "top1_model" not in meta.metrics else "top1_model")
    try:
        if run_id is None:
            raise ExportError("MLflow did not take it")
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        address = register(weights.run, run_id, asked.register, {**params, **tags}, top1, card)
    except Exception as error:  # mlflow's, SQLAlchemy's and requests'
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{folder} is written, and was not registered ({reason}): the same command tries again"
        ) from None
    takes = "init.checkpoint and mlflow.artifacts take" if asked.to == "timm" else "mlflow.artifacts takes"
    console.print(Text(f"registered as {address}: {takes} that name"), soft_wrap=True)


def _folder(asked: Asked, weights: Weights) -> Path:
    half = "-fp16" if asked.precision == "fp16" else ""
    name = f"step-{weights.meta.step:08d}-{weights.which}-{asked.to}{half}"
    folder = weights.run / EXPORTS / name if asked.out is None else asked.out.expanduser()
    if folder.exists() and folder.samefile("."):
        raise ExportError(f"--out {folder} is the folder that you are in, and would be replaced: name a new one in it")
    if folder.exists() and (other := _not_of_an_export(folder)) is not None:
        raise ExportError(f"{folder} holds something else than an export ({other}): name a new folder with --out")
    return folder


def _not_of_an_export(folder: Path) -> str | None:
    """What would be lost where an export takes the folder's place: a file of somebody else, or a card that was edited
    since; None where that is nothing.
    """
    if not folder.is_dir():
        return "it is a file"
    inside = sorted(path.name for path in folder.iterdir())
    try:
        files = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["files"]
        edited = CARD_FILE in inside and record(folder / CARD_FILE).sha256 != files[CARD_FILE]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return inside[0] if inside else None
    other = next((name for name in inside if name not in (FACTS_FILE, *files)), None)
    return f"{CARD_FILE} was edited" if other is None and edited else other


def _images_of(scored: EvaluationSet) -> Iterator[torch.Tensor]:
    for batch in scored.batches(Ranks()):
        yield normalise(batch.images)


def _write(
    asked: Asked,
    weights: Weights,
    config: Config,
    model: HorNet,
    folder: Path,
    header: dict[str, str],
    images: Iterable[torch.Tensor],
) -> Checked | None:
    """The files of the kind, compared; None where they are the weights as such."""
    check = Check(asked.precision, config.data.resolution, asked.dynamic_size, images)
    if asked.to == "timm":
        return write_timm(model, check, config, weights.meta.synsets, folder, header)
    if asked.to == "safetensors":
        write_safetensors(model, asked.precision, folder, header)
        return None
    if asked.to == "onnx":
        return write_onnx(model, check, folder / "model.onnx", header)
    return write_program(model, check, folder / "model.pt2")


def _facts(asked: Asked, weights: Weights, config: Config) -> dict[str, Any]:
    meta, images = weights.meta, preprocessing(config)
    return {
        "format_version": FORMAT_VERSION,
        "kind": asked.to,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": meta.model_name,
        "num_classes": meta.num_classes,
        "precision": asked.precision,
        "input": "batch x 3 x height x width, float32, normalised",
        "size": "any multiples of 32" if asked.dynamic_size else f"{config.data.resolution} x {config.data.resolution}",
        "preprocessing": {**images, "input_size": list(images["input_size"])},
        "checkpoint": {
            "run": weights.run.name,
            "step": meta.step,
            "weights": weights.which,
            "samples_seen": meta.samples_seen,
            "dataset_id": meta.dataset_id,
            "sha256": meta.files[weights.file.name].sha256,
        },
        "versions": {name: found for name in _TOOLS if (found := _version(name))},
    }


def _in_header(facts: dict[str, Any]) -> dict[str, str]:
    """For formats whose metadata are texts."""
    told = {key: facts[key] for key in ("model", "precision", "input", "size")}
    told |= {"preprocessing": json.dumps(facts["preprocessing"]), "checkpoint": json.dumps(facts["checkpoint"])}
    return {key: str(value) for key, value in told.items()}


def _classes(synsets: list[str]) -> str:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["class", "wnid", "words"])
    writer.writerows((number, wnid, lemma(wnid)) for number, wnid in enumerate(synsets))
    return table.getvalue()


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None
