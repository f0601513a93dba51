"""What made a run, beside its configuration: code, versions, hosts, the command."""

from __future__ import annotations

import getpass
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data_prep.credentials import without_credentials

ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "ffcv", "mlflow", "hornet-pretraining")
_GIT_SECONDS = 5.0
_SHOWN_HOSTS = 64


def provenance(hosts: Sequence[str]) -> dict[str, str]:
    """Tags of an MLflow run, under MLflow's own names where it has some. hosts: of each rank."""
    names = list(dict.fromkeys(hosts)) or [platform.node()]
    more = f" and {len(names) - _SHOWN_HOSTS} more" if len(names) > _SHOWN_HOSTS else ""
    tags = {
        "hosts": ", ".join(names[:_SHOWN_HOSTS]) + more,
        "ranks": str(max(1, len(hosts))),
        "versions": json.dumps(versions()),
        "command": without_credentials(shlex.join(["python", "-m", "pipeline", *sys.argv[1:]])),
        "mlflow.source.name": "pipeline",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    if torch.cuda.is_available():
        tags["gpu"] = torch.cuda.get_device_name()
    if commit := _git("rev-parse", "HEAD"):
        tags |= {"mlflow.source.git.commit": commit, "git_dirty": str(bool(_git("status", "--porcelain"))).lower()}
        tags["mlflow.source.git.branch"] = _git("rev-parse", "--abbrev-ref", "HEAD") or ""
    return tags


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run stands on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with what it was built for
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None outside of one, or without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
