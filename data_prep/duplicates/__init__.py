"""Duplicates within a data set, and evaluation images hidden in it. Begin with `search.py`."""
