"""Images with masks or boxes -> shards: the command `shard-dense`. Begin with `command.py`."""
