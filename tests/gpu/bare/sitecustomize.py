"""With this folder on PYTHONPATH mlflow is not there, as on a machine that has what tests/gpu/README.md lists.

A run then says so once, and log.jsonl has every number. Elsewhere nothing of a check waits for an MLflow database.
"""

import sys

sys.modules["mlflow"] = None  # type: ignore[assignment]
