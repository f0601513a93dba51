#!/usr/bin/env bash
# DeepSpeed 0.19.8: a launch over several hosts whose pdsh is killed ends with exit code 0.
#
# One would guess: the `deepspeed` command ends with the exit code of what it has started, and of a process that was
#   killed by signal N with 128 + N, as a shell has it.
# What happens: it hands on codes above 0. Python says -N of a process that was killed by signal N (out of memory on the
#   login node, a supervisor, a terminal that was closed): that is not above 0, and the command ends as if all ranks had
#   done their work.
# Whom it hurts: whoever queues the next stage behind it (`deepspeed ... && evaluate`), or has a job started again by its
#   exit code.
# Instead: look for what a run leaves when it is done, or wrap the launcher.
# (ssh and pdsh are stand-ins here; torch takes 0.9 GB where pip finds the CPU build, and several where it takes the
# CUDA build.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
venv/bin/pip install --quiet --disable-pip-version-check deepspeed==0.19.8
mkdir bin
printf '#!/bin/sh\necho 127.0.0.1\n' >bin/ssh # as the address of the first host
printf 'node1 slots=1\nnode2 slots=1\n' >hosts
touch train.py

launch() { # what pdsh does -> the exit code of deepspeed
  printf '#!/bin/sh\n%s\n' "$1" >bin/pdsh
  chmod +x bin/*
  local code=0
  PATH=$work/bin:$PATH DS_ACCELERATOR=cpu venv/bin/deepspeed --hostfile hosts train.py >log 2>&1 || code=$?
  echo $code
}

venv/bin/pip show deepspeed | sed -n '1,2p' | tr '\n' ' '; echo
failed=$(launch 'exit 9')
killed=$(launch 'kill -KILL $$')
echo "pdsh ends with 9: exit code $failed; pdsh is killed by SIGKILL: exit code $killed"
[ "$failed" = 9 ] || { cat log >&2; exit 1; }
[ "$killed" = 0 ] || { echo "no longer so: the exit code was 0" >&2; exit 1; }
