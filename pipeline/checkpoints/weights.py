"""Weight files, whoever wrote them: safetensors or torch's, of any float type, bare or with what scripts add."""

from __future__ import annotations

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.checkpoints.files import CheckpointError

# Where scripts put weights and their moving average: timm's, ConvNeXt's (and so HorNet's), DeepSpeed's, Lightning's.
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "weights", "net")
_EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema", "module_ema")
HEAD = ("head.weight", "head.bias")
_LFS_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100 << 20  # as safetensors itself bounds it

Tensors = dict[str, torch.Tensor]


def read_weights(path: Path, weights: str, names: Collection[str]) -> tuple[Tensors, str]:
    """The weights in a file as float32 tensors on the CPU, and which of its weights they are ("" where it has one).

    Args:
        path: a safetensors file, or one of `torch.save` with tensors in it; told apart by content, not by name.
        weights: "ema" or "model": which of them, where the file has both.
        names: names that the model's weights have, apart from HEAD; a prefix before all of them (`module.`,
            `_orig_mod.`) is taken off.

    Raises:
        CheckpointError: it is no weight file, holds other things, or values that are not finite numbers.
    """
    content = _safetensors(path) if _is_safetensors(path) else _torch_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {_described(content)}, not weights by name: save a model's state_dict()")
    found, which = _chosen(path, content, weights)
    if not all(isinstance(value, torch.Tensor) for value in found.values()):
        other = next(name for name, value in found.items() if not isinstance(value, torch.Tensor))
        raise CheckpointError(
            f"{path} holds {_listed(found)}, and {other!r} is {_described(found[other])}: save the weights alone, or "
            f"under 'model'"
        )
    wanted = {*names, *HEAD}
    unwrapped = _unwrapped(found, names)
    # Of others, such as a batch norm's counter, there is only to say that the model has none.
    return {name: _as_float32(path, name, v) if name in wanted else v for name, v in unwrapped.items()}, which


def _is_safetensors(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights themselves: fetch them with `git lfs pull`"
        )
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER


def _safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {_one_line(error)}") from None


def _torch_file(path: Path) -> Any:
    # Training scripts store their options beside the weights; a Namespace holds values and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the errors say it in one line
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            what = _foreign_objects(path)
        except Exception as error:  # torch raises many types for what is not its own
            text = _one_line(error)
            if "TorchScript" in text:
                raise CheckpointError(
                    f"{path} is a TorchScript archive: save the model's state_dict() instead"
                ) from None
            what = ""
    if what:
        raise CheckpointError(
            f"{path} holds Python objects ({what}), which are not loaded since that may run code: save the weights "
            f"alone, torch.save({{'model': model.state_dict()}}, ...)"
        )
    raise CheckpointError(f"{path} {_other_kind(path)}")


# By their first bytes, in lower case.
_KINDS = {
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"<": "is a web page, as one gets in place of a file that asks for a login: fetch it again, and look into it",
    b"\x89hdf": "is HDF5, as Keras writes it: save the weights as safetensors",
}


def _other_kind(path: Path) -> str:
    """What a file is that cannot be loaded, and what to do."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    for start, what in _KINDS.items():
        if head.lower().startswith(start):
            return what
    if head[:1] in (b"{", b"["):
        return "is JSON; where it lists the parts of a model, merge them into one file, and name that"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith(".npy") for name in archive.namelist()):
                return "is a NumPy archive: save the weights as safetensors"
    return f"({path.stat().st_size:,} bytes) is neither safetensors nor a whole checkpoint of torch: fetch it again"


def _foreign_objects(path: Path) -> str:
    """Classes and functions that a file of torch's names and that are not loaded; '' where it cannot be looked into."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the file is damaged, or of the form before torch 1.6
        return ""
    names = sorted(set(names) - {"argparse.Namespace"})
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _chosen(path: Path, content: Mapping[Any, Any], weights: str) -> tuple[Mapping[str, Any], str]:
    """The weights in what a training script wrote, which may have kept two kinds of them."""
    kinds = {
        kind: next((key for key in keys if isinstance(content.get(key), Mapping) and content[key]), None)
        for kind, keys in (("model", _MODEL_KEYS), ("ema", _EMA_KEYS))
    }
    if kinds["model"] is None and kinds["ema"] is None:
        if not any(isinstance(value, torch.Tensor) for value in content.values()):
            raise CheckpointError(f"{path} holds no weights: {_listed(content)}")
        return content, ""
    if weights == "model" and kinds["model"] is None:
        raise CheckpointError(f"{path} holds {kinds['ema']!r} and no weights without EMA: set init.weights=ema")
    key = kinds["ema"] if weights == "ema" and kinds["ema"] else kinds["model"]
    assert key is not None
    both = kinds["model"] is not None and kinds["ema"] is not None
    return content[key], repr(key) if both else f"{key!r}, the only weights in it"


def _unwrapped(found: Mapping[str, torch.Tensor], names: Iterable[str]) -> Tensors:
    """Without the prefix that wrappers (DataParallel, torch.compile, Lightning) put before every name."""
    for name in names:
        if name in found:
            break
        prefix = next((key.removesuffix(name) for key in found if key.endswith(f".{name}")), None)
        if prefix is not None:
            return {key.removeprefix(prefix): value for key, value in found.items()}
    return dict(found)


def _as_float32(path: Path, name: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        raise CheckpointError(f"{path}: {name} is {str(value.dtype).removeprefix('torch.')}, no float: not a weight")
    value = value.float()
    if not bool(value.isfinite().all()):
        bad = value.numel() - int(value.isfinite().sum())
        raise CheckpointError(
            f"{path}: {name} has {bad:,} of {value.numel():,} values that are NaN or infinite: take weights from "
            f"before that run went wrong"
        )
    return value


def _described(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" if value is not None else "nothing"


def _listed(content: Mapping[Any, Any]) -> str:
    names = [repr(key) for key in content]
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) if names else "nothing"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
