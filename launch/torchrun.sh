#!/usr/bin/env bash
# The same run under torchrun; on each host:
#   NODES=4 NODE_RANK=0..3 MASTER_ADDR=host0 launch/torchrun.sh pretrain CONFIG [key=value ...]
# On one host NODES, NODE_RANK and MASTER_ADDR are not needed. RANKS: per host, all GPUs by default (2 without a GPU).
# SIGTERM or SIGUSR1 to this process: the ranks write a checkpoint and leave, exit code 75; the same command goes on.
# shellcheck disable=SC2154,SC2155 # launch.places assigns ranks, nodes, launch, module; `hostname` does not fail
set -euo pipefail
trap '' USR1 # until the agent passes it on: there is nothing to save yet
from=$PWD
cd "$(dirname "$0")/.."
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi # checks, prints what it would run, and leaves
[ $# -ge 2 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# A configuration beside the caller; paths inside it are relative to the checkout.
if [ ! -e "$2" ] && [ -e "$from/$2" ]; then set -- "$1" "$from/$2" "${@:3}"; fi
venv=${VENV:-.venv}
bin=$(cd "$venv/bin" 2>/dev/null && [ -x python ] && pwd) || { echo "error: $venv is not an environment: run 'make setup', or name another: VENV=..." >&2; exit 1; }
# What only prints or checks starts no ranks.
case " ${*:3} " in *" --print-config "* | *" --check "* | *" --help "*) exec "$bin/python" -m pipeline "$@" ;; esac
places=$("$bin/python" -m launch.places torchrun) || exit
eval "$places"
"$bin/python" -m pipeline "$@" --check --ranks "$ranks" --nodes "$nodes"
PIPELINE_LAUNCHER="$(hostname):$$"
export PIPELINE_LAUNCHER PYTHONUNBUFFERED=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
command=("$bin/python" -m launch.torchrun_agent "${launch[@]}" -m "${module[@]}" "$@")
if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; exit; fi
exec "${command[@]}"
