"""The model card: where the data are from, how it was trained, what it reaches, its limits, whose terms apply."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.manifest import Manifest
from data_prep.storage import DataPrepError
from pipeline.checkpoints.files import CheckpointError, locate, read_meta
from pipeline.checkpoints.restore import Weights
from pipeline.config.load import Config
from pipeline.evaluation.result import EVALUATIONS, RESULT_FILE

_TERMS = """\
- Code: Apache-2.0.
- Weights: `{license}`. Whoever publishes them chooses (`--license`), within the terms of the training images.
- Data: ImageNet's images are their owners', given for research and education without commerce
  (https://image-net.org/download); sets of your own have the terms that you got them under."""
_USE = {
    "timm": """\
```python
import timm
import pipeline.models  # registers the architecture with timm; it needs torch and timm alone

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:USER/MODEL"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
wnids = model.pretrained_cfg["label_names"]
```""",
    "safetensors": """\
```python
import timm
from safetensors.torch import load_file
import pipeline.models  # registers the architecture with timm

model = timm.create_model("{model}", num_classes={num_classes}{img_size}).eval()
model.load_state_dict(load_file("model.safetensors"))
```""",
    "onnx": """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"image": images})  # float32 (batch, 3, height, width), normalised
```""",
    "exported-program": """\
```python
import torch

model = torch.export.load("model.pt2").module()
logits = model(images)  # float32 (batch, 3, height, width), normalised
```""",
}


def model_card(facts: dict[str, Any], weights: Weights, config: Config, license: str) -> str:
    """README.md of the folder, as the Hugging Face Hub reads it: Markdown behind a YAML header."""
    images = facts["preprocessing"]
    img_size = f", img_size={config.data.resolution}" if "_gf" in facts["model"] else ""
    use = _USE[facts["kind"]].replace("{model}", facts["model"]).replace("{num_classes}", str(facts["num_classes"]))
    crop = "the centre square" + (
        f" after a resize to 1 / {images['crop_pct']:g} of it" if images["crop_pct"] < 1 else ""
    )
    sections = [
        "\n".join(
            [
                "---",
                f"license: {license}",
                f"library_name: {'timm' if facts['kind'] in ('timm', 'safetensors') else facts['kind']}",
                "pipeline_tag: image-classification",
                "tags: [image-classification, hornet]",
                "---",
                f"# {weights.run.name}: {facts['model']}",
            ]
        ),
        f"HorNet (Rao et al. 2022, https://arxiv.org/abs/2207.14284), {facts['num_classes']:,} classes by WordNet id "
        f"(`classes.csv`); {'moving average of the weights' if weights.which == 'ema' else 'raw weights'} at step "
        f"{weights.meta.step:,}, {facts['precision']} with a float32 head. `export.json` has the checksums.",
        _section("Use", [use.replace("{img_size}", img_size), "", *_image_lines(facts, crop)]),
        _section("Data", _lineage(weights)),
        _section("Training", _recipe(config, weights)),
        _section("Results", _results(weights)),
        _section("Limits", _limits(facts, config)),
        _section("Licences", [_TERMS.format(license=license)]),
    ]
    return "\n\n".join(sections) + "\n"


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"## {title}", "", *lines])


def _image_lines(facts: dict[str, Any], crop: str) -> list[str]:
    images = facts["preprocessing"]
    whole = images["crop_mode"] == "squash"
    part = "the whole image, resized to that" if whole else crop
    return [
        f"Images: {facts['size']} px, RGB, {part} ({images['interpolation']}), "
        f"then (x / 255 - mean) / std, with mean {_triple(images['mean'])} and std {_triple(images['std'])}."
    ]


def _triple(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _lineage(weights: Weights) -> list[str]:
    """The data sets, back to the first weights, as far as this machine can tell."""
    lines = [_data_line("trained on", weights.run, weights.meta.dataset_id, weights.meta.num_classes)]
    tree, seen = weights.meta.config, {weights.path}
    while start := (tree.get("init") or {}).get("checkpoint"):
        try:
            path = locate(Path(start))
            meta = read_meta(path if path.is_dir() else path.parent)
        except CheckpointError:
            lines.append(f"- started from `{Path(start).name}`, of which this machine knows no more")
            break
        if path in seen:
            break
        seen.add(path)
        before = Weights(path, meta, "ema")
        lines.append(
            _data_line(
                f"started from `{before.run.name}`, step {meta.step:,}, trained on",
                before.run,
                meta.dataset_id,
                meta.num_classes,
            )
        )
        tree = meta.config
    return lines


def _data_line(what: str, run: Path, dataset_id: str, classes: int) -> str:
    try:
        manifest = Manifest.load(run)
    except DataPrepError:
        manifest = None
    if manifest is None or manifest.dataset_id != dataset_id:
        return f"- {what} a data set of {classes:,} classes, `dataset_id` {dataset_id}"
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in sorted(manifest.splits.items()))
    return f"- {what} `{manifest.name}`: {classes:,} classes, images: {counts}; `dataset_id` {dataset_id}"


def _recipe(config: Config, weights: Weights) -> list[str]:
    optimizer, train, augment = config.optimizer, config.train, config.augment
    rows = {
        "images seen": f"{weights.meta.samples_seen:,} ({train.epochs} epochs planned)",
        "resolution": f"{weights.meta.config['data']['resolution']} px",
        "global batch": f"{train.global_batch:,}",
        "AdamW": f"peak {optimizer.lr_peak:g} to {optimizer.lr_final:g}, warm-up {optimizer.warmup_epochs:g} epochs, "
        f"weight decay {optimizer.weight_decay:g}, layer decay {optimizer.layer_decay or 'none'}",
        "EMA": f"{optimizer.ema_decay or 'none'}",
        "augmentation": f"{augment.rand_augment or 'no RandAugment'}, mixup {augment.mixup_alpha:g}, cutmix "
        f"{augment.cutmix_alpha:g}, erasing {augment.random_erasing:g}, smoothing {augment.label_smoothing:g}",
        "drop path": f"{config.model.drop_path_rate:g}",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _results(weights: Weights) -> list[str]:
    """Of the evaluations of these very weights."""
    rows = []
    for file in sorted((weights.run / EVALUATIONS).glob(f"*/{RESULT_FILE}")):
        if file.parent.name.startswith("."):
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            of, data, how, got = (found[key] for key in ("checkpoint", "data", "protocol", "results"))
            if (of["step"], of["weights"]) != (weights.meta.step, weights.which):
                continue
            labels = " (ReaL)" if data["labels"] == "real" else ""
            ece = "" if got["ece"] is None else f"{got['ece']:.4f}"
            crop = f"{how['resolution']} px, {how['resize']} {how['crop_ratio']:g}"
            figures = f"{got['top1_percent']:.2f} | {got['top5_percent']:.2f} | {ece}"
            rows.append(f"| {data['name']}{labels} | {got['images']:,} | {data['classes']:,} | {crop} | {figures} |")
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{file} is not an evaluation as this code writes it: evaluate again, or remove it"
            ) from None
    if not rows:
        return ["Not evaluated: `python -m pipeline evaluate RUN`, then export again."]
    return ["| set | images | classes | protocol | top-1 % | top-5 % | ECE |", "|---|---|---|---|---|---|---|", *rows]


def _limits(facts: dict[str, Any], config: Config) -> list[str]:
    lines = [
        "- It names one of its classes for any image; its probabilities are as good as the ECE above says.",
        "- Trained on photographs as the web has them; what no result is of (medical, aerial, drawn) was not tried.",
        "- Height and width are multiples of 32.",
    ]
    if "_gf" in facts["model"]:
        lines.append(
            f"- Its global filters are of {config.data.resolution} px; for another size they are interpolated."
        )
    if facts["num_classes"] > 1000:
        lines.append("- ImageNet-22K has classes of people, some of them offensive: not for judging people.")
    return lines
