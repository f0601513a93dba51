"""Detection of objects: nets, their data, the run, average precision."""
