#!/usr/bin/env bash
# mlflow 3.17.2: download_artifacts of a models:/ address looks for the model elsewhere than it is told.
#
# One would guess: mlflow.artifacts.download_artifacts("models:/net/1", tracking_uri=X) looks into X, or does so with
#   registry_uri=X, or with both; for runs:/ addresses tracking_uri=X does.
# What happens: with none of them. The model is looked for where the process's own default is, and a database file of that
#   default is made in the folder that the process works in; "Registered Model ... not found" does not say where it looked.
# Whom it hurts: programs that keep to clients with an address of their own (several servers, or runs whose address stands
#   in a file), and start from a registered model.
# Instead: MlflowClient(X, X).get_model_version_download_uri(name, version) gives the address of the files, which
#   download_artifacts takes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check mlflow==3.17.2
unset MLFLOW_TRACKING_URI MLFLOW_REGISTRY_URI

cat >try.py <<'PYTHON'
import logging
import sys
from pathlib import Path

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

logging.disable(logging.INFO)
print("mlflow", mlflow.__version__)
here = Path.cwd()
address = f"sqlite:///{here}/own.db"
client = mlflow.MlflowClient(address, address)
experiment = client.create_experiment("e", artifact_location=(here / "files").as_uri())
run = client.create_run(experiment)
(here / "net").mkdir()
(here / "net" / "weights").write_text("1")
client.log_artifacts(run.info.run_id, "net", "net")
client.create_registered_model("net")
client.create_model_version("net", f"{run.info.artifact_uri}/net", run.info.run_id)

seen = {}
for told in ({"tracking_uri": address}, {"registry_uri": address}, {"tracking_uri": address, "registry_uri": address}):
    try:
        found = Path(download_artifacts("models:/net/1", dst_path=str(here / "out"), **told))
        seen[" and ".join(told)] = f"{[file.name for file in found.iterdir()]}"
    except MlflowException as error:
        seen[" and ".join(told)] = str(error).splitlines()[0]
for told, what in seen.items():
    print(f"models:/net/1 with {told}: {what}")
by_run = download_artifacts(f"runs:/{run.info.run_id}/net/weights", dst_path=str(here / "run"), tracking_uri=address)
by_client = download_artifacts(
    client.get_model_version_download_uri("net", "1"), dst_path=str(here / "client"), tracking_uri=address
)
print("runs:/ with tracking_uri:", Path(by_run).name, "- by the client's address:", [p.name for p in Path(by_client).iterdir()])
print("databases in the folder:", sorted(path.name for path in here.glob("*.db")))
sys.exit(not all("not found" in what for what in seen.values()))
PYTHON
venv/bin/python try.py 2>/dev/null || { echo "no longer so: one of them found the model" >&2; exit 1; }
