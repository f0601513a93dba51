"""Shards read from end to end by the webdataset library, in a keyed order that a run resumes exactly."""
