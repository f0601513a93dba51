#!/usr/bin/env bash
# DeepSpeed 0.19.8: a hostfile that names one other host starts the ranks on the host where the command was given.
#
# One would guess: `deepspeed --hostfile hosts train.py` runs on the hosts of the file, be they two or one.
# What happens: it asks that host by ssh whether it is there and for its address, and then, because it is a single one,
#   starts the ranks right here, with that address for their rendezvous. With two hosts they are started there.
# Whom it hurts: who starts from a login node or a workstation, and shrinks a job to one node: it trains on the wrong
#   machine, without a word, or waits for an address that is not its own.
# Instead: --force_multi, which this project's launcher gives with every hostfile.
# (torch takes 0.9 GB where pip finds the CPU build, and several where it takes the CUDA build.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
venv/bin/pip install --quiet --disable-pip-version-check deepspeed==0.19.8

mkdir bin
export SEEN=$work/seen PATH=$work/bin:$work/venv/bin:$PATH DS_ACCELERATOR=cpu
# Stand-ins: no other host is needed to see who is asked for what.
cat > bin/ssh <<'SH'
#!/usr/bin/env bash
echo "ssh" >> "$SEEN"
case "$*" in *"hostname -I") echo 127.0.0.1 ;; esac
SH
cat > bin/pdsh <<'SH'
#!/usr/bin/env bash
echo "pdsh starts something on the hosts of the file" >> "$SEEN"
SH
chmod +x bin/*
echo 'import os; open(os.environ["SEEN"], "a").write("a rank runs on THIS host\n")' > train.py

seen() { # options of deepspeed -> what happened, each thing once
  : > seen
  venv/bin/deepspeed --hostfile hosts "$@" train.py >log 2>&1 || { tail -n 1 log >&2; exit 1; }
  sort -u seen | paste -sd ';'
}
venv/bin/pip list 2>/dev/null | grep -E '^(deepspeed|torch) '
echo "elsewhere slots=1" > hosts
one=$(seen)
forced=$(seen --force_multi)
echo "elsewhere-too slots=1" >> hosts
two=$(seen)
printf 'one host:                %s\none host, --force_multi: %s\ntwo hosts:               %s\n' "$one" "$forced" "$two"
there="pdsh starts something on the hosts of the file;ssh"
[ "$one" = "a rank runs on THIS host;ssh" ] && [ "$forced" = "$there" ] && [ "$two" = "$there" ] \
  || { echo "no longer so: one host alone, without --force_multi, was started here" >&2; exit 1; }
