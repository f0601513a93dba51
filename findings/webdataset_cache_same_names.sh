#!/usr/bin/env bash
# webdataset 1.0.2: two sets whose shards have the same names share one cache: the second gets the first's samples.
#
# One would guess: with cache_dir, what is kept of a shard is found again by its URL.
# What happens: the cached file is called after the last part of the URL's path. http://host/pets/train-000000.tar and
#   http://host/cars/train-000000.tar are the same file in the cache, whichever was read first; it is taken for the other
#   without a look at its size or content. So is a shard that was written anew under its old name.
# Whom it hurts: whoever has more than one set, or more than one version of a set, and one cache folder (WDS_CACHE is one
#   for all): shards are called train-000000.tar by nearly everybody. Images and labels fit each other, so nothing fails.
# Instead: a cache folder for each set, or FileCache(url_to_name=...) with a digest of the whole URL.
set -euo pipefail
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6

for set in pets cars; do
  mkdir -p "files/$set" "web/$set"
  echo "image of $set" > "files/$set/0.txt"
  tar -cf "web/$set/train-000000.tar" -C "files/$set" 0.txt
done
python3 -u -m http.server --bind 127.0.0.1 --directory web 0 > served.txt 2> requests.txt &
server=$!
until grep -q 'port [0-9]' served.txt; do sleep 0.1; done
port=$(sed -E 's/.*port ([0-9]+).*/\1/' served.txt)

venv/bin/python -I - "http://127.0.0.1:$port" <<'PYTHON'
import os
import sys

import webdataset as wds

print("webdataset", wds.__version__)


def texts(name, **cache):
    """What the one sample of a set says."""
    found = wds.WebDataset(f"{sys.argv[1]}/{name}/train-000000.tar", shardshuffle=False, **cache)
    return [sample["txt"].decode().strip() for sample in found]


os.mkdir("cache")
without = [texts(name) for name in ("pets", "cars")]
cached = [texts(name, cache_dir="cache") for name in ("pets", "cars")]
print("no cache: ", *without)
print("one cache:", *cached)
assert without == [["image of pets"], ["image of cars"]]
if cached != [["image of pets"], ["image of pets"]]:
    sys.exit("no longer so: cars came as pets")
PYTHON
