"""The run itself. Begin with `run.py`."""
