"""A rank as a process: how ranks talk, live, hang and write."""
