#!/usr/bin/env bash
# webdataset 1.0.2: files that GNU tar stored as hard links are left out, and with them the sample or its image.
#
# One would guess: a tar that `tar` unpacks to all its files gives all of them to webdataset, or an error.
# What happens: of several names of one file GNU tar stores the first as a file and the others as links to it. tarfile's
#   isreg() is False for those, and webdataset's tar_file_expander passes over what is not: a sample whose image is a
#   link comes without it, one that is links alone never comes.
# Whom it hurts: who makes tars of a folder in which equal images were joined by hard links (rdfind, jdupes, rsync
#   --link-dest). Classes shrink or vanish, and no number in the log says so.
# Instead: `tar --hard-dereference`, or a reader that follows links.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6

mkdir files
for key in a b; do echo "image of $key" > "files/$key.jpg"; echo 0 > "files/$key.cls"; done
ln files/a.jpg files/c.jpg
echo 1 > files/c.cls
ln files/a.jpg files/d.jpg
ln files/a.cls files/d.cls
tar -cf linked.tar --sort=name -C files .
tar -cf plain.tar --sort=name --hard-dereference -C files .

venv/bin/python -I - <<'PYTHON'
import sys

import webdataset as wds

print("webdataset", wds.__version__)


def samples(tar):
    """Key: its files, of each sample."""
    found = wds.WebDataset(tar, shardshuffle=False)
    return {sample["__key__"]: sorted(name for name in sample if name[0] != "_") for sample in found}


whole, linked = samples("plain.tar"), samples("linked.tar")
print("tar --hard-dereference:", whole)
print("tar:                   ", linked)
both = ["cls", "jpg"]
assert whole == {f"./{key}": both for key in "abcd"}
if linked != {"./a": both, "./b": both, "./c": ["cls"]}:
    sys.exit("no longer so: c came without its image, d not at all")
PYTHON
