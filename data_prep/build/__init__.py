"""The `shard` and `plan` commands: sources -> data files -> shards, stage by stage. Begin with `command.py`."""
