"""`init.checkpoint` where it names something of MLflow's: brought into the run folder once, before the first step.

An alias (`models:/NAME@best`) may move on while a run waits in a queue: what the run began with stays.
"""

from __future__ import annotations

import importlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.credentials import without_credentials
from data_prep.storage import atomic_folder
from pipeline.checkpoints.choice import TIMM_CONFIG
from pipeline.checkpoints.files import CheckpointError
from pipeline.config.run import RunConfig
from pipeline.config.sections import Init
from pipeline.records.address import check_address, missing_database
from pipeline.records.run_id import ID_FILE

FOLDER, SOURCE_FILE = "init", "source.json"  # of the run folder
_MODEL = re.compile(r"models:/+(?P<name>[^/@]+)(?:@(?P<alias>[^/]+)|/(?P<version>\d+))")
_RUN = re.compile(r"runs:/+(?P<run>[0-9a-f]+)(?:/(?P<path>.+))?")


def local_init(config: RunConfig) -> Init:
    """`config.init`, with what it names in MLflow as the path that `fetch` has brought it to."""
    if not _address(config.init):
        return config.init
    place = config.run_dir / FOLDER
    return config.init.model_copy(update={"checkpoint": Path(_source(place).get("path") or place)})


def found_in_mlflow(config: RunConfig) -> str:
    """What an address was when it was fetched ("models:/NAME/3" for an alias); '' for a path."""
    return str(_source(config.run_dir / FOLDER).get("found", "")) if _address(config.init) else ""


def fetch(config: RunConfig) -> None:
    """Bring what `init.checkpoint` names in MLflow into the run folder, where it is not there yet.

    Nothing is fetched for paths, nor for a run whose checkpoint is still where that run has left it. Raises
    CheckpointError, and ConfigError for an MLflow address that can never be reached.
    """
    address, place = _address(config.init), config.run_dir / FOLDER
    if not address or _source(place).get("address") == address:
        return
    model, run = _MODEL.fullmatch(address), _RUN.fullmatch(address)
    if model is None and run is None:
        raise CheckpointError(
            f"init.checkpoint {address}: give models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID (its checkpoint) "
            f"or runs:/RUN_ID/FOLDER"
        )
    uri = check_address(config)
    if (gone := missing_database(uri)) is not None:
        raise CheckpointError(
            f"init.checkpoint {address}: {gone} is not there: set tracking.uri to where it was logged"
        )
    try:
        found, files, path, run_id = address, address, "", run["run"] if run else None
        client = importlib.import_module("mlflow").MlflowClient(uri, uri)
        if model is not None:
            name, alias = model["name"], model["alias"]
            by_alias, by_number = client.get_model_version_by_alias, client.get_model_version
            version = by_alias(name, alias) if alias else by_number(name, model["version"])
            found, run_id = f"models:/{name}/{version.version}", version.run_id
            # By itself, the download of models:/ looks in the environment's MLflow (3.17), whatever it is told.
            files = client.get_model_version_download_uri(name, str(version.version))
        if run is not None and not run["path"]:
            path = client.get_run(run["run"]).data.tags.get("checkpoint", "")
            if not path or not Path(path).is_dir():  # Path("") is the folder that this process works in
                what = f"its checkpoint {path} is not on this host" if path else "it has no checkpoint"
                raise CheckpointError(f"init.checkpoint {address}: {what}; name an export of it, models:/NAME@best")
        with atomic_folder(place) as folder:
            if not path:
                _download(files, uri, folder)
            source = {"address": address, "found": found, "path": path}
            (folder / SOURCE_FILE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
            # By which this run finds its parent in MLflow, as by the folder of a run.
            known = {"uri": without_credentials(uri), "run_id": run_id}
            (folder / ID_FILE).write_text(json.dumps(known), encoding="utf-8")
    except CheckpointError:
        raise
    except Exception as error:  # mlflow's, SQLAlchemy's and requests'
        reason = without_credentials(" ".join(str(error).split()), uri)[:300]
        raise CheckpointError(
            f"init.checkpoint {address} was not found in MLflow at {without_credentials(uri)}: {reason}"
        ) from None


def _download(address: str, uri: str, folder: Path) -> None:
    """The files of a model or of a run's folder, straight in `folder`: MLflow itself keeps the last folder's name."""
    artifacts = importlib.import_module("mlflow.artifacts")
    artifacts.download_artifacts(artifact_uri=address, dst_path=str(folder), tracking_uri=uri)
    config = next(folder.rglob(TIMM_CONFIG), None)
    if config is None:
        raise CheckpointError(f"init.checkpoint: {address} holds no {TIMM_CONFIG}: it is no model exported `--to timm`")
    if config.parent != folder:
        for file in config.parent.iterdir():
            file.rename(folder / file.name)
        config.parent.rmdir()


def _address(init: Init) -> str:
    """The address in MLflow, '' for a path."""
    text = "" if init.checkpoint is None else str(init.checkpoint)
    return text if text.startswith(("models:/", "runs:/")) else ""


def _source(place: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads((place / SOURCE_FILE).read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return known
    return {}
