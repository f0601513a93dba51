#!/usr/bin/env bash
# webdataset 1.0.2: how many samples come from a command that fails after it has written a whole shard is chance.
#
# One would guess: `pipe:` hands on what a command writes, and raises behind it if the command has failed.
# What happens: each read looks afterwards whether the command has ended. Where it has, and failed, the read raises, and the
#   bytes that it had read are lost with it. A command that lingers takes the samples of the last block along, one that is
#   gone already those of every block: slow readers get fewer samples of the same shard than fast ones, or none.
# Whom it hurts: who skips what fails (handler=warn_and_continue), or resumes by a count of samples: the same shard holds
#   another number of them each time.
# Instead: read to the end, and ask for the exit code there; or fetch to a file first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6

mkdir files
for key in a b c d e f; do head -c 4000 /dev/zero | tr '\0' "$key" > "files/$key.txt"; done
tar -cf shard.tar --sort=name -C files a.txt b.txt c.txt d.txt e.txt f.txt

venv/bin/python -I - <<'PYTHON'
import sys
import time

import webdataset as wds

print("webdataset", wds.__version__)


def samples(command, pause):
    """How many come before the error, which has to come; `pause`: seconds that the reader takes for each."""
    found = 0
    try:
        for _ in wds.WebDataset(f"pipe:{command}", shardshuffle=False):
            found += 1
            time.sleep(pause)
    except OSError:
        return found
    raise AssertionError("no error at all")


lingers = samples("cat shard.tar; sleep 3; exit 3", 0)
is_gone = samples("cat shard.tar; exit 3", 0.5)
print("the command lingers, then fails:", lingers, "samples of 6")
print("the command fails at once, the reader is slow:", is_gone, "samples of 6")
if not is_gone < lingers < 6:
    sys.exit("no longer so: some samples were lost, and more where the command was gone already")
PYTHON
