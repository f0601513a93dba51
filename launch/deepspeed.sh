#!/usr/bin/env bash
# Starts `python -m pipeline COMMAND CONFIG [key=value ...]` under the deepspeed launcher.
#   launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
#   HOSTFILE=hostfile launch/deepspeed.sh pretrain CONFIG        many hosts (launch/hostfile.example), over ssh
#   launch/deepspeed.sh evaluate runs/NAME [--data DIR ...]       the accuracy of a checkpoint, on this host
#   RANKS=4 launch/deepspeed.sh pretrain CONFIG                  fewer than the GPUs here, or other than 2 on the CPU
#   CUDA_VISIBLE_DEVICES=2,3, MASTER_PORT=29501, DEEPSPEED_ARGS="..."    see launch/README.md
#   launch/deepspeed.sh --dry-run pretrain CONFIG                checks, prints what it would run, and leaves
# The same command continues an interrupted run. To stop one: `make stop RUN=...`, or SIGUSR1 to any rank; this process
# then ends with 75. (Or SIGTERM to this process, which on one host ends at once.) All ranks write a checkpoint.
# shellcheck disable=SC2154 # launch.places assigns ranks, nodes, launch, module, chosen
set -euo pipefail
asked= # to stop while all is still checked: there is nothing to save
trap 'asked=75' TERM USR1
from=$PWD
cd "$(dirname "$0")/.."
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# A configuration beside the caller; paths inside it are relative to the checkout.
if [ ! -e "$2" ] && [ -e "$from/$2" ]; then set -- "$1" "$from/$2" "${@:3}"; fi
venv=${VENV:-.venv}
bin=$(cd "$venv/bin" 2>/dev/null && [ -x python ] && pwd) || { echo "error: $venv is not an environment: run 'make setup', or name another: VENV=..." >&2; exit 1; }
export PATH=$bin:$PATH # what the launcher starts, on this host, is this environment's python
# What only prints or checks starts no ranks.
case " ${*:3} " in *" --print-config "* | *" --check "* | *" --help "*) exec "$bin/python" -m pipeline "$@" ;; esac

if [ "$1" = evaluate ] && [ -n "${HOSTFILE:-}" ]; then
  echo "error: evaluate runs on one host: leave HOSTFILE out" >&2
  exit 1
fi

# Hosts, devices, port. And faults that every rank would meet are met here, as one line, before anything is started.
places=$("$bin/python" -m launch.places deepspeed) || exit "${asked:-$?}"
eval "$places"
# Of many hosts each is looked at before: DOCTOR=0 leaves that out. (`make` does so for this host.)
if [ -n "${HOSTFILE:-}" ] && [ "${DOCTOR:-1}" != 0 ]; then
  "$bin/python" -m pipeline doctor "${@:2}" --fast --quiet --launching --ranks "$ranks" --hostfile <(printf %s "$chosen") \
    || { echo "error: nothing was started: mend the above, or leave it at that: DOCTOR=0" >&2; exit "${asked:-1}"; }
fi
check=("$bin/python" -m pipeline "$@" --check --ranks "$ranks" --nodes "$nodes")

# Ranks on this host leave when this process is gone: lifetime.py.
PIPELINE_LAUNCHER="$(hostname):$$"
export PIPELINE_LAUNCHER TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} PYTHONUNBUFFERED=1
start_or_leave() { # USR1: a scheduler may send it to every process, and the launchers would die of it
  trap - TERM
  trap '' USR1
  if [ -n "$asked" ]; then
    [ -z "${handed:-}" ] || "$bin/python" -c 'import sys; from pipeline.ranks.handover import *; remove(from_word(sys.argv[1]))' "$handed"
    exit "$asked"
  fi
}
if [ -n "${HOSTFILE:-}" ]; then
  # Command, configuration and environment go to the ranks by a folder of the run folder, past all remote shells.
  if [ -n "$dry" ]; then
    "${check[@]}" # launch.handed gets that folder's name for its -
    exec "$bin/python" -m launch.deepspeed_runner --dry-run - "${launch[@]}" --no_local_rank
  fi
  handed=$("${check[@]}" --hand-over) || exit "${asked:-$?}"
  start_or_leave
  exec "$bin/python" -m launch.deepspeed_runner "$handed" "${launch[@]}" --no_local_rank
fi
command=("$bin/python" -m launch.deepspeed_agent "${launch[@]}" --no_local_rank --module "${module[@]}" "$@")
"${check[@]}" || exit "${asked:-$?}"
start_or_leave
if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; exit; fi
# On this host alone: what that command would start as a second process, which imports torch once more. Not exec: as with
# that command, a SIGTERM ends this process at once, and the launcher leaves the ranks the time that they need.
code=0
"${command[@]}" || code=$?
exit $code
