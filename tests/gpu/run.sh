#!/usr/bin/env bash
# What is true on one GPU: whether all that runs there is right, and how fast it is; at most six minutes each.
#   tests/gpu/run.sh correct                    exit code 1 if a check fails
#   tests/gpu/run.sh speed --output FOLDER      rows also as JSON lines: FOLDER/speed.jsonl
#   tests/gpu/run.sh correct --dry-run          all of it small, on a CPU: its times mean nothing
#   PYTHON=/path/to/python3 WHEELS=folder tests/gpu/run.sh ...     README.md beside this: what has to be there
# `--help` after correct or speed has the other options.
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-} in correct | speed) ;; *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
"$python" -c "$has_torch" 2>/dev/null || { echo "error: $python is not there, or has no torch: name one that has it: PYTHON=..." >&2; exit 1; }
wheels=${WHEELS:-wheels}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -d "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check --no-cache-dir --find-links "$wheels" \
    --target "$site" "$wheels"/*.whl || { echo "error: $wheels does not go into this $python: make it anew, tests/gpu/wheels.sh" >&2; exit 1; }
elif [ -n "${WHEELS:-}" ]; then
  echo "error: WHEELS=$wheels is not a folder: tests/gpu/wheels.sh makes one" >&2
  exit 1
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if ! "$python" -c 'import pipeline.data._jpeg' 2>/dev/null; then # where an installation puts it: git ignores it
  say='import sysconfig; print(sysconfig.get_path("include"), sysconfig.get_config_var("EXT_SUFFIX"))'
  read -r include suffix < <("$python" -c "$say")
  if ${CC:-cc} -O3 -shared -fPIC -I"$include" pipeline/data/_jpeg.c -o "$site/_jpeg" -ljpeg -lm 2>/dev/null; then
    mv "$site/_jpeg" "pipeline/data/_jpeg$suffix"
  else
    echo "note: the compiled JPEG decoder is not built (cc, Python's and libjpeg-turbo's headers): decoding is slower" >&2
  fi
fi
code=0
"$python" -m tests.gpu.parts "$@" --spent "$SECONDS" &
parts=$!
trap 'kill "$parts" 2>/dev/null; wait "$parts" || true' TERM INT
wait "$parts" || code=$?
exit $code
