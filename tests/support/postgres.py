"""A PostgreSQL of our own for a test: a new cluster in a folder, behind a socket there, for as long as it takes."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import wait_for


def _programs() -> Path | None:
    """Where initdb and postgres are; Debian keeps them off the PATH."""
    for folder in (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *map(Path, os.get_exec_path())):
        if (folder / "initdb").exists():
            return folder
    return None


@contextmanager
def running_postgres() -> Iterator[str]:
    """The address of its empty database, as SQLAlchemy wants it. Skips where it is not installed; fails there in
    continuous integration.
    """
    programs = _programs()
    if programs is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("PostgreSQL is missing: apt-get install postgresql")
    as_user = ["setpriv", "--pdeathsig", "KILL"]
    if os.geteuid() == 0:  # which it refuses to run as
        as_user += ["--reuid", "postgres", "--regid", "postgres", "--init-groups"]
    # Not in pytest's folders, which other users cannot enter.
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        with open(folder / "log", "wb") as log:
            made = [*as_user, programs / "initdb", "--auth=trust", "--username=test", "--no-sync", "--locale=C.UTF-8"]
            subprocess.run([*made, f"--pgdata={folder}/data"], stdout=log, stderr=log, check=True, cwd="/")
            command = [*as_user, programs / "postgres", "-D", f"{folder}/data", "-k", name, "-h", "", "-F"]
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        try:
            said = (folder / "log").read_text
            wait_for(lambda: "database system is ready to accept connections" in said(), server, said)
            yield f"postgresql://test@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)  # on SIGTERM it waits for its clients to leave
            server.wait()
