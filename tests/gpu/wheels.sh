#!/usr/bin/env bash
# Makes wheels/ for run.sh, on a machine that has a package index: for CPython 3.12 on x86-64 Linux; 20 MB.
#   tests/gpu/wheels.sh [FOLDER]
#   PYTHON=.venv/bin/python PYTHON_VERSION=3.12 tests/gpu/wheels.sh
# What is large is not among them: README.md beside this says what has to be there. Versions are those of constraints.txt.
set -euo pipefail
folder=$(realpath -m "${1:-wheels}")
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
version=${PYTHON_VERSION:-3.12}
packages=(
  timm webdataset braceexpand simplejpeg zlib-ng nvidia-ml-py
  hjson msgpack einops ninja psutil py-cpuinfo tqdm                                       # DeepSpeed's
  pydantic pydantic_core annotated-types typing-inspection typing_extensions pyyaml safetensors fsspec
  rich markdown-it-py mdurl Pygments
  pytest pytest-timeout pluggy iniconfig packaging
)
pinned() { # constraints.txt spells some names otherwise
  local name found
  for name in "$@"; do
    found=$(tr '_[:upper:]' '-[:lower:]' <constraints.txt | grep -x "$(tr '_[:upper:]' '-[:lower:]' <<<"$name")==.*") \
      || { echo "error: constraints.txt has no $name" >&2; return 1; }
    printf '%s\n' "$found"
  done
}
mkdir -p "$folder"
pins=$(pinned "${packages[@]}")
mapfile -t pins <<<"$pins"
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010 manylinux_2_5 manylinux1; do
  platforms+=(--platform "${name}_x86_64")
done
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
  --python-version "$version" "${platforms[@]}" --dest "$folder" "${pins[@]}"
# There is no wheel of DeepSpeed: of its source, without the operators that it can compile. It asks for torch to build.
deepspeed=$(pinned deepspeed)
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$folder" "$deepspeed"
du -sh "$folder"
