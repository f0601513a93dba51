"""launch/trainjob.yaml against the models of Kubeflow Trainer's API, and its command with what the runtime sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from pydantic import ValidationError

from tests.support.host import OURS
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT

PET = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"}


def manifest() -> Any:
    return yaml.safe_load((ROOT / "launch" / "trainjob.yaml").read_text())


def unknown(given: Any, known: Any, where: str = "") -> list[str]:
    """The fields that the schema does not have: its models leave them out without a word."""
    if isinstance(given, dict) and isinstance(known, dict):
        absent = [f"{where}.{key}" for key in given if key not in known]
        return absent + [
            found for key in given.keys() & known for found in unknown(given[key], known[key], f"{where}.{key}")
        ]
    if isinstance(given, list) and isinstance(known, list):
        return [
            found for i, pair in enumerate(zip(given, known, strict=True)) for found in unknown(*pair, f"{where}[{i}]")
        ]
    return [] if given == known else [f"{where}: {given!r} became {known!r}"]


def faults(job: Any) -> list[str]:
    try:
        read = TrainerV1alpha1TrainJob.from_dict(job)
    except ValidationError as error:
        return [str(error)]
    assert read is not None
    return unknown(job, json.loads(json.dumps(read.to_dict(), default=str)))


def test_the_manifest_is_a_trainjob() -> None:
    assert faults(manifest()) == []
    assert (manifest()["apiVersion"], manifest()["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")


def test_what_the_schema_does_not_have_is_found() -> None:
    job = manifest()
    job["spec"]["trainer"]["nodes"] = 4
    pod = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod["template"]["spec"]["template"]["spec"]["restartPolicy"] = "Never"
    assert sorted(found.rpartition(".")[2] for found in faults(job)) == ["nodes", "restartPolicy"]
    job = manifest()
    job["spec"]["trainer"]["numNodes"] = "four"
    assert "numNodes" in faults(job)[0]


@pytest.mark.parametrize(("ranks", "told"), [("8", "8"), ("auto", "")])
def test_its_command_is_the_launcher_with_its_own_names(tmp_path: Path, ranks: str, told: str) -> None:
    trainer = manifest()["spec"]["trainer"]
    environment = {entry["name"]: entry["value"] for entry in trainer["env"]}
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "hold_signals.py").symlink_to(ROOT / "launch" / "hold_signals.py")
    script = tmp_path / "launch" / "torchrun.sh"
    script.write_text(
        '#!/bin/bash\necho "$NODES $NODE_RANK $MASTER_ADDR $MASTER_PORT ${RANKS:-}" "$@"; env | grep ^PET_\n'
    )
    script.chmod(0o755)
    # Kubernetes puts variables of `env` into $(NAME).
    words = [word.replace("$(CONFIG)", environment["CONFIG"]) for word in trainer["command"] + trainer["args"]]
    ours = {name: value for name, value in os.environ.items() if name not in OURS}
    ours |= environment | PET | {"PET_NPROC_PER_NODE": ranks, "CHECKOUT": str(tmp_path), "VENV": sys.prefix}
    done = subprocess.run(words, env=ours, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    config = "configs/pretrain_hornet_l_in22k_384.yaml"
    assert done.stdout == f"4 3 job-node-0-0.job 29400 {told} pretrain {config}\n", done.stderr
    assert (ROOT / config).is_file()
