"""`_info.json`: what timm's reader of `wds/` wants to know of a folder of shards, from the manifest."""

import json

from data_prep.manifest import Manifest

INFO_NAME = "_info.json"
SPLIT_NAMES = {"val": "validation"}  # as timm and Hugging Face's hub call it, and timm asks for by default


def info_bytes(manifest: Manifest) -> bytes:
    """The content of `_info.json`: splits with their files and counts, classes in the order of the numbers in `.cls`.
    The same manifest always gives the same bytes.
    """
    splits = {}
    for name, split in manifest.splits.items():
        called = SPLIT_NAMES.get(name, name)
        splits[called] = {
            "name": called,
            "filenames": [shard.file for shard in split.shards],
            "shard_lengths": [shard.samples for shard in split.shards],
            "num_samples": split.samples,
        }
    told = {
        "name": manifest.name,
        "splits": splits,
        "num_classes": manifest.num_classes,
        "class_names": manifest.synsets,
    }
    return (json.dumps(told, indent=1, sort_keys=True) + "\n").encode()
