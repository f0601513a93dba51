#!/usr/bin/env bash
# Hugging Face datasets 5.2.0: load_dataset("webdataset", data_dir=FOLDER) makes a sample of an .npz beside the tars.
#
# One would guess: the builder of WebDataset reads the tars of a folder, as load_dataset(FOLDER) does, and passes over an
#   index or a note beside them.
# What happens: without data_files every file of the folder is one of the split. An .npz is a zip, which is unpacked, so its
#   arrays are a sample of their own: here one more than the tar holds. Beside images it fails with an error of Arrow's that
#   names a field and no file.
# Whom it hurts: whose shards have indexes beside them: the set is larger than it is, or cannot be read.
# Instead: load_dataset(FOLDER), which chooses the builder and the files by extension, or data_files="FOLDER/*.tar".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 numpy==2.4.6

mkdir files set
for key in a b c; do echo "text of $key" > "files/$key.txt"; echo 1 > "files/$key.cls"; done
tar -cf set/train-000000.tar --sort=name -C files .
venv/bin/python -c 'import numpy; numpy.savez("set/train-000000.index.npz", offsets=numpy.arange(3))'

HF_HUB_OFFLINE=1 HF_HOME="$work/home" venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

from datasets import disable_progress_bars, load_dataset

print("datasets", version("datasets"))
disable_progress_bars()


def rows(*names, **options):
    """How many samples of the split train come, or the error."""
    try:
        return len(load_dataset(*names, **options)["train"])
    except Exception as error:
        return f"{type(error).__name__}, of {type(error.__cause__).__name__}"


by_files = rows("webdataset", data_files={"train": "set/*.tar"})
by_folder = rows("./set")
by_dir = rows("webdataset", data_dir="set")
print("data_files:", by_files)
print("the folder:", by_folder)
print("data_dir:  ", by_dir)
assert by_files == by_folder == 3
if by_dir != 4:
    sys.exit("no longer so: by data_dir the index was a fourth sample")
PYTHON
