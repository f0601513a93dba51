"""A data set against its manifest, every sample decoded. Begin with `command.py`."""
