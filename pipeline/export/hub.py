"""Files that timm and the Hugging Face Hub know: config.json with the registered architecture, and safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._hub import save_config_for_hf

from data_prep.labels.spaces import lemma
from pipeline.checkpoints.state import save_tensors
from pipeline.config.load import Config
from pipeline.export.check import Check, Checked, ExportError
from pipeline.export.graph import in_precision
from pipeline.models.hornet import HorNet

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def preprocessing(config: Config) -> dict[str, Any]:
    """What is done to an image before the net, in timm's words."""
    side = config.data.resolution
    return {
        "input_size": (3, side, side),
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "crop_pct": config.evaluate.crop_ratio,
        "crop_mode": "center" if config.evaluate.resize == "crop" else "squash",
    }


def write_safetensors(model: HorNet, precision: str, folder: Path, facts: dict[str, str]) -> None:
    """The published names and shapes; `facts` in its header."""
    state = {name: value.contiguous() for name, value in in_precision(model, precision).state_dict().items()}
    save_tensors(state, folder / WEIGHTS_FILE, {"format": "pt", **facts})


def write_timm(
    model: HorNet, check: Check, config: Config, synsets: Sequence[str], folder: Path, facts: dict[str, str]
) -> Checked:
    """What `timm.create_model("local-dir:FOLDER", pretrained=True)` and "hf-hub:" load, once this package's models are
    imported. Raises ExportError.
    """
    write_safetensors(model, check.precision, folder, facts)
    labels = {"label_names": list(synsets), "label_descriptions": {wnid: lemma(wnid) for wnid in synsets}}
    save_config_for_hf(model, str(folder / CONFIG_FILE), model_config=labels, data_config=preprocessing(config))
    loaded = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    return check.compare(model, loaded, "what timm loads")


def check_repository(repository: str) -> None:
    """Raise ExportError for a name that the Hub does not take, or where nobody is logged in: before the work."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ExportError(f"--push-to-hub {repository}: {str(error).splitlines()[0]}") from None
    if get_token() is None:
        raise ExportError("--push-to-hub needs a login: `hf auth login`, or HF_TOKEN in the environment")


def push(repository: str, folder: Path) -> str:
    """Upload the folder, as one commit; returns the address. Raises ExportError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="timm", library_version=timm.__version__)
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=f"Add {folder.name}")
    except (HfHubHTTPError, OSError) as error:
        said = str(error).strip().splitlines()
        raise ExportError(
            f"{folder} is written, and was not uploaded to {repository} ({said[0] if said else type(error).__name__}): "
            f"the same command tries again"
        ) from None
    return str(url)
