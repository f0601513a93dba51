"""The tars of a data set, what lies beside them for other readers, and sets of a former format. Begin with `tar.py`."""
