"""What a run tells: console, journal, MLflow, FLOPs."""
