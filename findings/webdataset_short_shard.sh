#!/usr/bin/env bash
# webdataset 1.0.2: a shard that is cut between two files, or has a damaged header, is a shorter shard, and no error.
#
# One would guess: a shard that was copied in part, or has flipped bits in a header, raises, or is left out with a warning:
#   the default handler of every stage is reraise_exception.
# What happens: tarfile, which reads the shard as a stream, ends in order at the first header that is cut or whose
#   checksum is wrong, and at the end of the file wherever that is; it does not ask for a tar's mark of its end.
#   webdataset hands on the samples so far. Only a cut within a file's data raises.
# Whom it hurts: who trains from copies that a full disk or a lost connection cut short: an epoch is shorter, some ranks
#   may have fewer batches than others, and nothing says which shard it was.
# Instead: compare sizes or checksums after copying, or follow the headers and ask for the mark, as this project does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6

mkdir files
for key in a b c d; do echo "image of $key" > "files/$key.txt"; done
tar -cf whole.tar --sort=name -C files a.txt b.txt c.txt d.txt
head -c 2048 whole.tar > cut_between.tar # two files of a header and a block
head -c 2300 whole.tar > cut_in_header.tar
head -c 2700 whole.tar > cut_in_data.tar
cp whole.tar damaged.tar
printf 'X' | dd of=damaged.tar bs=1 seek=2048 conv=notrunc status=none # the third file's name

venv/bin/python -I - <<'PYTHON'
import sys

import webdataset as wds

print("webdataset", wds.__version__, "on Python", sys.version.split()[0])


def keys(tar):
    """The samples that come, and the error that ends them."""
    found = []
    try:
        for sample in wds.WebDataset(tar, shardshuffle=False):
            found.append(sample["__key__"])
    except Exception as error:
        found.append(type(error).__name__)
    return " ".join(found)


seen = {name: keys(f"{name}.tar") for name in ("whole", "cut_between", "cut_in_header", "damaged", "cut_in_data")}
for name, what in seen.items():
    print(f"{name}: {what}")
assert seen["whole"] == "a b c d"
assert seen["cut_in_data"] == "a b ReadError"
if any(seen[name] != "a b" for name in ("cut_between", "cut_in_header", "damaged")):
    sys.exit("no longer so: all three came as two samples, without an error")
PYTHON
