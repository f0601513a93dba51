#!/usr/bin/env bash
# Starts `python -m pipeline COMMAND CONFIG [key=value ...]` under the deepspeed launcher.
#   launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
#   HOSTFILE=hostfile launch/deepspeed.sh pretrain CONFIG        many hosts (launch/hostfile.example), over ssh
#   RANKS=4 launch/deepspeed.sh pretrain CONFIG                  other than all GPUs here (2 where there is none)
#   MASTER_PORT=29501, DEEPSPEED_ARGS="..."                      passed on to the launcher
# The same command continues an interrupted run. To stop one, send SIGUSR1 to any rank (this process then ends with 75),
# or SIGTERM to this process (which ends at once): all ranks write a checkpoint and leave.
set -euo pipefail
trap '' USR1 # a scheduler may send it to every process: both launchers would die of it, and so would ranks that import
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
venv=${VENV:-.venv}
bin=$(cd "$venv/bin" 2>/dev/null && pwd) || { echo "error: $venv is not an environment: run 'make setup', or name another: VENV=..." >&2; exit 1; }
export PATH=$bin:$PATH # what the launcher starts, on this host, is this environment's python

launcher=()
if [ -n "${HOSTFILE:-}" ]; then
  [ -r "$HOSTFILE" ] || { echo "error: HOSTFILE $HOSTFILE is not readable; see launch/hostfile.example" >&2; exit 1; }
  launcher+=(--hostfile "$HOSTFILE")
  ranks=$(awk '{ sub(/#.*/, "") } match($0, /slots=[0-9]+/) { n += substr($0, RSTART + 6, RLENGTH - 6) } END { print n + 0 }' "$HOSTFILE")
  nodes=$(grep -c 'slots=' <(sed 's/#.*//' "$HOSTFILE") || true)
  [ "$ranks" -gt 0 ] || { echo "error: HOSTFILE $HOSTFILE names no host with slots=N; see launch/hostfile.example" >&2; exit 1; }
else
  # A file that is not there keeps a machine-wide hostfile out of a run on this host.
  launcher+=(--hostfile /nonexistent)
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  if [ "$gpus" -gt 0 ]; then
    # Devices are named: with a mere number of them DeepSpeed drops CUDA_VISIBLE_DEVICES.
    devices=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}
    if [ -n "${RANKS:-}" ]; then devices=$(cut -d, -f "1-$RANKS" <<<"$devices"); fi
    ranks=$(awk -F, '{ print NF }' <<<"$devices")
    launcher+=(--include "localhost:$devices")
    unset CUDA_VISIBLE_DEVICES
  else
    ranks=${RANKS:-2}
    devices=$(seq -s, 0 $((ranks - 1)))
    launcher+=(--num_accelerators "$ranks")
  fi
  MASTER_PORT=${MASTER_PORT:-$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
fi
if [ -n "${MASTER_PORT:-}" ]; then launcher+=(--master_port "$MASTER_PORT"); fi

# Faults that every rank would meet are met here, as one line, before anything is started.
"$bin/python" -m pipeline "$@" --check --ranks "$ranks" --nodes "${nodes:-1}"

# Ranks on this host leave when this process is gone: lifetime.py. (Over ssh DeepSpeed
# does not pass this on: there, ranks leave with the launcher of their own host.)
export PIPELINE_LAUNCHER="$(hostname):$$"
if [ "${gpus:-1}" = 0 ]; then export DS_ACCELERATOR=cpu; fi # said, not guessed with a warning in every process
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} PYTHONUNBUFFERED=1
if [ -n "${HOSTFILE:-}${DEEPSPEED_ARGS:-}" ]; then
  exec deepspeed "${launcher[@]}" --no_local_rank ${DEEPSPEED_ARGS:-} --module pipeline "$@"
fi
# On this host alone: what that command would start as a second process, which imports torch once more. Not exec: as with
# that command, a SIGTERM ends this process at once, and the launcher leaves the ranks the time that they need.
world=$(printf '{"localhost": [%s]}' "$devices" | base64 -w0 | tr '+/' '-_')
code=0
"$bin/python" launch/deepspeed_agent.py --world_info "$world" --master_addr 127.0.0.1 --master_port "$MASTER_PORT" \
  --no_local_rank --module pipeline "$@" || code=$?
exit $code
