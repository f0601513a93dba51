#!/usr/bin/env bash
# MLflow 3.17.2: of several runs that are the first at once in a new SQLite database, most fail, and it may stay broken.
#
# One would guess: the tables of a new database are made in a transaction or under a lock. Who comes second waits, or
#   gets "database is locked" and tries again.
# What happens: each process makes the tables and applies some fifty migrations without a lock. They meet half-way: "table
#   already exists", "duplicate column name", "Online migration expected to match one row". All but one of the processes
#   fail at their first call. Where two stop each other, the file is left half migrated, and every later process fails at
#   it as well: no retry helps, the file has to be deleted.
# Whom it hurts: a sweep or a job array whose runs share `sqlite:///mlflow.db`, on its first start; and a run that is
#   killed in its first seconds.
# Instead: open the database once before (`mlflow db upgrade` makes no new one; any client call does), or make it under
#   another name, whole, and rename it, as this project does; or a server.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check mlflow==3.17.2 sqlalchemy==2.1.9

cat > open.py <<'PYTHON'
import logging
import sys
import time

import mlflow

logging.disable()
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))  # all at one moment
try:
    mlflow.MlflowClient(f"sqlite:///{sys.argv[1]}").search_experiments()
    print("ok")
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0])
PYTHON

venv/bin/python -c 'import mlflow, sqlalchemy; print("mlflow", mlflow.__version__, "SQLAlchemy", sqlalchemy.__version__)'
echo "one process: $(venv/bin/python open.py alone.db 0 2>/dev/null); a second one: $(venv/bin/python open.py alone.db 0 2>/dev/null)"
rounds=5 failed=0 broken=0
for round in $(seq $rounds); do
  at=$(($(date +%s) + 15))
  for process in 1 2 3 4; do venv/bin/python open.py "$round.db" $at >"$round.$process" 2>/dev/null & done
  wait
  after=$(venv/bin/python open.py "$round.db" 0 2>/dev/null)
  echo "round $round: $(cat "$round".[1-4] | grep -c '^ok' || true) of 4 processes opened it, such as: $(cat "$round".[1-4] | grep -v '^ok' | sort | head -n 1 | cut -c -90)"
  echo "         a process that comes later: ${after:0:90}"
  if grep -qv '^ok' "$round".[1-4]; then failed=$((failed + 1)); fi
  if [ "$after" != ok ]; then broken=$((broken + 1)); fi
done
echo "rounds of $rounds in which processes failed: $failed; in which the database stayed broken: $broken"
[ $failed -gt 0 ] || { echo "no longer so: every process opened the new database" >&2; exit 1; }
