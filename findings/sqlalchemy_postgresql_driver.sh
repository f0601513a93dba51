#!/usr/bin/env bash
# SQLAlchemy 2.1: `postgresql://` asks for another driver than the one that tutorials of MLflow install.
#
# One would guess: `pip install mlflow psycopg2-binary` and `postgresql://user@host/mlflow`, as for ten years: psycopg2 is
#   what SQLAlchemy takes where the address names no driver.
# What happens: since SQLAlchemy 2.1 that is psycopg (version 3). MLflow 3.17.2 allows both SQLAlchemy 2.0 and 2.1 and pip
#   takes the newer one: with psycopg2 alone the same address ends in "No module named 'psycopg'"; with SQLAlchemy 2.0 it
#   connects.
# Whom it hurts: tracking servers whose environment is made anew; and training code that takes an error of its tracking
#   for a passing one and tries again until its end.
# Instead: say it in the address, `postgresql+psycopg2://...`; or install psycopg.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check mlflow==3.17.2 psycopg2-binary==2.9.13

cat > try.py <<'PYTHON'
import logging
import sys

import mlflow
import sqlalchemy

logging.disable()


def tried(address):
    """What a client's first call says; nothing listens at the port."""
    try:
        mlflow.MlflowClient(address).search_experiments()
    except ModuleNotFoundError as error:
        return str(error)
    except Exception as error:
        return "refused" if "refused" in str(error) else str(error).splitlines()[0]


plain, named = "postgresql://someone@127.0.0.1:9/mlflow", "postgresql+psycopg2://someone@127.0.0.1:9/mlflow"
found = sqlalchemy.make_url(plain).get_dialect().driver
seen = [found, tried(plain), tried(named)]
print(f"mlflow {mlflow.__version__}, SQLAlchemy {sqlalchemy.__version__}: postgresql:// means {found}")
print(f"  postgresql://           : {seen[1]}")
print(f"  postgresql+psycopg2://  : {seen[2]}")
if seen != sys.argv[1:]:
    sys.exit(f"no longer so: expected {sys.argv[1:]}")
PYTHON
export MLFLOW_SQLALCHEMYSTORE_MAX_RETRIES=0
for version in 2.1.9 2.0.58; do
  venv/bin/pip install --quiet --disable-pip-version-check "sqlalchemy==$version"
  case $version in
    2.1.*) venv/bin/python -I try.py psycopg "No module named 'psycopg'" refused ;;
    2.0.*) venv/bin/python -I try.py psycopg2 refused refused ;;
  esac
done
