"""Where MLflow's pages show a training run.

A browser that comes to its bare address for the first time is led by MLflow 3.17 to an overview of traces, where there
is no run; nothing in the database changes that, the address does.
"""

from __future__ import annotations

REVIEW_PORT = 5000  # of `make review`, where nothing else is said


def review_base(port: int = REVIEW_PORT) -> str:
    """The server that `make review` starts."""
    return f"http://127.0.0.1:{port}"


def experiment_address(base: str, experiment_id: str) -> str:
    """The table of an experiment's runs, on the MLflow server at `base`."""
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def run_address(base: str, experiment_id: str, run_id: str) -> str:
    """The page of one run: its curves, parameters and artifacts."""
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def direct_run_address(base: str, run_id: str) -> str:
    """The page of one run whose experiment is not known: MLflow's page finds it and goes there."""
    return f"{base.rstrip('/')}/#/runs/{run_id}"
