#!/usr/bin/env bash
# torch 2.13.0, gloo: a rank that waits for a peer's connection waits five times the timeout that it was given.
#
# One would guess: init_process_group("gloo", timeout=T) ends after T where a peer cannot be reached, on both sides.
# What happens: the side that connects fails within a second ("Connection refused"). The side that is to be connected to
#   ends after 5 x T, and its message names no peer. With the half hour that is usual as a timeout that is two and a
#   half hours.
# Whom it hurts: runs on hosts whose own name means 127.0.1.1, as Debian's installer has it in /etc/hosts: others cannot
#   connect, one rank fails at once, and the rest of the cluster waits.
# Instead: have the ranks meet in a store of your own first, compare addresses there, and watch the start from outside.
# (Needs root and iproute2: two hosts are network namespaces, the second of which offers its loopback address.)
set -euo pipefail
[ "$(id -u)" = 0 ] && command -v ip >/dev/null || { echo "root and iproute2 are needed" >&2; exit 2; }
work=$(mktemp -d)
a=gloo-a-$$ b=gloo-b-$$
trap 'ip netns del "$a" 2>/dev/null; ip netns del "$b" 2>/dev/null; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
ip netns add "$a"
ip netns add "$b"
ip link add eth0 netns "$a" type veth peer name eth0 netns "$b"
for host in "$a 1" "$b 2"; do
  read -r name number <<<"$host"
  ip -n "$name" link set lo up
  ip -n "$name" link set eth0 up
  ip -n "$name" addr add "10.99.0.$number/24" dev eth0
done

cat >try.py <<'PYTHON'
import datetime
import sys
import time

import torch
import torch.distributed as dist

rank, seconds = int(sys.argv[1]), float(sys.argv[2])
store = dist.TCPStore("10.99.0.1", 29500, 2, rank == 0)
began = time.time()
try:
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=seconds)
    )
    print(rank, "connected")
except RuntimeError as error:
    print(rank, f"{time.time() - began:.1f}", " ".join(str(error).split())[:150])
time.sleep(1)
PYTHON
venv/bin/python -c 'import torch; print("torch", torch.__version__)'
for seconds in 3 6; do
  GLOO_SOCKET_IFNAME=lo ip netns exec "$a" venv/bin/python try.py 0 $seconds >0.log 2>/dev/null &
  GLOO_SOCKET_IFNAME=lo ip netns exec "$b" venv/bin/python try.py 1 $seconds >1.log 2>/dev/null &
  wait
  cat 0.log 1.log
  sort -k2 -n 0.log 1.log | awk -v t=$seconds '
    { took[NR] = $2 }
    END {
      printf "timeout %s s: one side failed after %s s, the other after %s s\n", t, took[1], took[2]
      exit !(took[1] < t && took[2] > 4.5 * t && took[2] < 6.5 * t)
    }' || { echo "no longer so: one side failed at once, the other after five timeouts" >&2; exit 1; }
done
