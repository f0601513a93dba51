"""Label spaces by WordNet id, and the report that compares two. Begin with `spaces.py`."""
