#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0: the mark xdist_group does nothing.
#
# One would guess: tests with one `xdist_group` run in one worker under `--dist loadgroup`, and a pytest that breaks
#   this says so, or does not install beside that pytest-xdist.
# What happens: the two install together, the option and the mark are accepted, and the tests of a group are spread over
#   the workers. pytest-xdist writes the group into a private field of each test, from which pytest 9.2 no longer takes
#   the test's name. With pytest 9.1.0 it works.
# Whom it hurts: tests that share a server, a port or an expensive fixture. Each passes alone; together they fail at times.
# Instead: `--dist loadfile` where a file is the group, or a scheduler of one's own (hook pytest_xdist_make_scheduler).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir tests
cat > tests/test_group.py <<'PYTHON'
import os
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", range(8))
@pytest.mark.xdist_group("server")
def test_of_the_group(number):
    with Path(os.environ["SEEN"]).open("a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
PYTHON

python3 -m venv venv
for version in 9.1.0 9.2.0; do
  venv/bin/pip install --quiet --disable-pip-version-check pytest==$version pytest-xdist==3.8.0
  SEEN=$work/$version venv/bin/python -I -m pytest -q -p no:cacheprovider -n 2 --dist loadgroup tests >"log-$version" || {
    cat "log-$version"
    exit 1
  }
  echo "pytest $version, pytest-xdist 3.8.0: 8 tests of one group ran in $(sort -u "$version" | wc -l) worker(s)"
done
if [ "$(sort -u 9.1.0 | wc -l)" != 1 ] || [ "$(sort -u 9.2.0 | wc -l)" = 1 ]; then
  echo "no longer so: one worker with pytest 9.1.0 and several with 9.2.0 were seen" >&2
  exit 1
fi
