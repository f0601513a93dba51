"""WebDataset tars that somebody else wrote, indexed in place. Begin with `index.py`."""
