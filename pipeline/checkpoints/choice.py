"""Which checkpoint a run goes on from, and which weights it starts from: by names and JSON alone, without torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.labels.spaces import KNOWN_SPACES, LabelError, label_space
from data_prep.manifest import SYNSET_PATTERN
from pipeline.checkpoints import files
from pipeline.checkpoints.files import META_FILE, CheckpointError, Meta, locate, read_meta
from pipeline.config.run import RunConfig
from pipeline.config.sections import Init

# What a run may change between two starts and still be the same run. The guard is free because the run that it ended
# has to be able to go on under another one.
_FREE_KEYS = re.compile(
    r"output_root|data\.(path|format|workers_per_rank|on_bad_sample|bad_samples_max|cache_folder|cache_gb|ffcv_cache)"
    r"|data\.stream_(val|classes|samples_per_epoch|cache)"  # what they say of the set, its dataset_id says too
    r"|train\.(micro_batch|zero_stage|precision)"
    r"|model\.(activation_checkpointing|checkpointing|compile|cuda_graphs)|(evaluate|init|guard|checkpoint|tracking)\..*"
)
# Keys that configurations of before did not have, as what they were taken for.
_FORMER = {"data.reader": "indexed", "data.stream_shuffle_samples": 1000}
TIMM_CONFIG, TIMM_WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
_LABEL_WORDS = ("checkpoint", "none", "published-22k")


def newest_of_run(
    config: RunConfig, dataset_id: str, resume: bool, hashes: bool = True, quarantine: bool = False
) -> tuple[Path, Meta] | tuple[None, None]:
    """The newest whole checkpoint that the run of `config` goes on from, or (None, None) where it has none at all.

    Damaged newer ones are told on stderr and, with `quarantine`, renamed to damaged-step-NNNNNNNN. `hashes` as for
    `verify`. Raises CheckpointError if all are damaged, if they are another run's, or if there is one and `resume` is
    false.
    """
    folder = config.run_dir / "checkpoints"
    if quarantine:
        files.put_back(folder)
    found, faults = files.newest_good(folder, hashes)
    if found is None and not faults:
        return None, None
    if not resume:
        raise CheckpointError(
            f"{config.run_dir} already holds a run ({files.step_folders(folder)[-1].name}): leave out --resume never "
            f"to continue it, set another name, or remove the folder"
        )
    if found is None:
        raise files.none_good(config.run_dir, faults)
    path, meta = found
    _check_same_run(path, meta, config, dataset_id)
    # What cannot be read now may be read another time: it stays where it is.
    broken = {damaged: why for damaged, why in faults.items() if not any(files.UNREADABLE in fault for fault in why)}
    files.warn_of_damage(broken, path, f"; it is kept as {files.SET_ASIDE}step-..." if quarantine else "")
    files.warn_of_damage({damaged: why for damaged, why in faults.items() if damaged not in broken}, path)
    for damaged in broken if quarantine else ():
        _set_aside(damaged)
    return path, meta


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint out of the way of its step's next save; one set aside before makes place for it."""
    aside = path.with_name(files.SET_ASIDE + path.name)
    files.remove(aside)
    os.replace(path, aside)
    files.sync(path.parent)


def _check_same_run(path: Path, meta: Meta, config: RunConfig, dataset_id: str) -> None:
    changes = differing_keys(meta.config, config.model_dump(mode="json"))
    changes = {key: values for key, values in changes.items() if not _FREE_KEYS.fullmatch(key)}
    changes = {key: (_FORMER.get(key) if old is None else old, new) for key, (old, new) in changes.items()}
    changes = {key: (old, new) for key, (old, new) in changes.items() if old != new}
    if meta.dataset_id != dataset_id:
        changes["data.path (dataset_id)"] = (meta.dataset_id[:12], dataset_id[:12])
    if changes:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changes.items())
        raise CheckpointError(f"{path} is of another configuration: {listed}. Set them back, or set another name")


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), where two nested mappings differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


@dataclass(frozen=True)
class Source:
    """Weights to start from: where they are, of which model (None: unknown), over which classes (None: no head wanted).

    `which`: "ema" or "model", for a file that has both. `is_ours`: this code wrote it. `by_size`: the file does not say
    its classes, and the number of its head's rows has to.
    """

    weights: Path
    model_name: str | None
    synsets: list[str] | None
    which: str = "model"
    is_ours: bool = False
    by_size: bool = False


def find_source(init: Init) -> Source:
    """What `init.checkpoint` names, checked to exist. Raises CheckpointError, for `init.label_space` too."""
    assert init.checkpoint is not None
    if (exported := _exported(init)) is not None:
        return exported
    path = locate(init.checkpoint)
    if path.is_file() and not (path.parent / META_FILE).exists():
        if init.label_space == "checkpoint":
            return Source(path, None, None, init.weights, by_size=True)
        return Source(path, None, _label_space(init.label_space), init.weights)
    meta = read_meta(path.parent if path.is_file() else path)
    if "task" in meta.config:
        raise CheckpointError(
            f"init.checkpoint {init.checkpoint} is of a run that learned to {meta.config['task']}: give one of a "
            f"classification"
        )
    synsets = meta.synsets if init.label_space == "checkpoint" else _label_space(init.label_space)
    if path.is_file():
        return Source(path, meta.model_name, synsets, init.weights)
    weights = path / ("ema.safetensors" if init.weights == "ema" else "model.safetensors")
    if weights.name not in meta.files:
        other = "model" if init.weights == "ema" else "ema"
        raise CheckpointError(f"{path} has no {weights.name}: set init.weights={other}")
    if fault := files.file_fault(weights, meta.files[weights.name], hashes=False):
        raise CheckpointError(f"checkpoint {path} is damaged: {fault}; set init.checkpoint to another one")
    return Source(weights, meta.model_name, synsets, init.weights, is_ours=True)


def _exported(init: Init) -> Source | None:
    """Of a folder that timm reads (our exports, those of the Hugging Face Hub), or None where it is none.

    Raises CheckpointError.
    """
    folder = init.checkpoint
    assert folder is not None
    if not (folder / TIMM_CONFIG).is_file():
        return None
    try:
        config = json.loads((folder / TIMM_CONFIG).read_text(encoding="utf-8"))
        name = str(config["architecture"])
    except (ValueError, KeyError, TypeError, OSError):
        raise CheckpointError(f"{folder / TIMM_CONFIG} is none of timm's: it names no architecture") from None
    weights = next((folder / each for each in TIMM_WEIGHTS if (folder / each).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} has a {TIMM_CONFIG}, and none of {', '.join(TIMM_WEIGHTS)}: fetch it again")
    if init.label_space != "checkpoint":
        return Source(weights, name, _label_space(init.label_space), init.weights)
    labels = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names") or []
    if labels and all(isinstance(each, str) and SYNSET_PATTERN.fullmatch(each) for each in labels):
        return Source(weights, name, list(labels), init.weights)
    return Source(weights, name, None, init.weights, by_size=True)


def _label_space(name: str) -> list[str] | None:
    if name == "none":
        return None
    try:
        return label_space("hornet-22k" if name == "published-22k" else name)
    except LabelError as error:
        words = (*_LABEL_WORDS, *KNOWN_SPACES)
        near = difflib.get_close_matches(name, words, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(_LABEL_WORDS)} are words of their own)"
        raise CheckpointError(f"init.label_space: {error}{hint}") from None


def check_model(source: Source, model_name: str) -> None:
    """Raise CheckpointError when the weights are known to be of another model; img384 variants share weights."""
    if source.model_name is not None and _family(source.model_name) != _family(model_name):
        raise CheckpointError(
            f"{source.weights.parent} is a checkpoint of {source.model_name}, the configuration builds {model_name}: "
            f"set model.name={source.model_name} or another init.checkpoint"
        )


def _family(model_name: str) -> str:
    return model_name.removesuffix("_img384")
