"""An MLflow database without runs, made once, since that takes seconds, and an output_root with a copy of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root(tmp_path: Path, database: Path) -> Path:
    """An output_root with its database."""
    shutil.copy(database, tmp_path)
    return tmp_path
