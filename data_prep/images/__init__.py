"""One image: decoded, repaired or rejected, encoded. Begin with `prepare.py`."""
