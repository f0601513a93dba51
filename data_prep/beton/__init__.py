"""FFCV files beside the shards: written, opened, one sample. Begin with `write.py`."""
