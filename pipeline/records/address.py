"""Where MLflow is: which address a run's records go to, whether that can ever work, and a new database made whole.

Without mlflow, whose import takes seconds that a check before each start should not wait for.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib
import json
import os
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from data_prep.credentials import without_credentials
from pipeline.config.run import RunConfig
from pipeline.config.sections import ConfigError

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # those of MLflow 3.17
_SERVERS = ("http", "https")
_HOSTED = ("databricks",)  # found by its own configuration files
_PROBE_SECONDS = 3.0
# What pip calls the drivers, by what Python does. Of `postgresql://` alone it is psycopg (3) since SQLAlchemy 2.1.
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
_WRONG_NAME = b"Invalid Host header"  # of MLflow 3.17
# Statements that take a lock of the server, which goes with the connection, by the scheme of its address.
_LOCKS = {"postgresql": "SELECT pg_advisory_lock(5138008)", "mysql": "SELECT GET_LOCK('hornet-mlflow', 600)"}


def tracking_uri(config: RunConfig) -> str:
    """MLflow's address for a run: `tracking.uri`, else MLFLOW_TRACKING_URI, else a database file in `output_root`."""
    default = f"sqlite:///{config.output_root.resolve() / 'mlflow.db'}"
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def is_default(config: RunConfig) -> bool:
    """Whether it is that file."""
    return not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))


def database_file(uri: str) -> Path | None:
    """The file of an SQLite address, None for any other."""
    scheme, _, rest = uri.partition("://")
    if scheme.partition("+")[0] != "sqlite":
        return None
    return Path(urllib.parse.unquote(rest.removeprefix("/").partition("?")[0]))


def missing_database(uri: str) -> Path | None:
    """The file of an SQLite address that is not there: whoever only reads would have MLflow make an empty one."""
    file = database_file(uri)
    return file if file is not None and not file.exists() else None


def check_address(config: RunConfig) -> str:
    """`tracking_uri`, refused where no later try could reach it: an unknown scheme, a missing driver, no file.

    Nothing is sent. Raises ConfigError.
    """
    uri = tracking_uri(config)
    shown, scheme = without_credentials(uri), urllib.parse.urlsplit(uri).scheme.partition("+")[0]
    key = "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI"
    if uri.partition(":")[0] in _HOSTED:
        return uri
    if "://" not in uri or scheme == "file":
        host = uri.partition("/")[0].rpartition(":")
        hint = f"http://{shown}" if host[0] and host[2].isdigit() else "sqlite:////folder/mlflow.db or http://host:5000"
        raise ConfigError(
            f"{key} {shown} is a folder to MLflow, which no longer keeps runs in folders: set {key}={hint}"
        )
    if scheme not in (*_SERVERS, *_DATABASES):
        if scheme in entry_points(group="mlflow.tracking_store").names:  # of a plugin
            return uri
        raise ConfigError(
            f"{key} {shown}: MLflow knows no {scheme}://; it takes {', '.join((*_SERVERS, *_DATABASES, *_HOSTED))}"
        )
    if scheme in _SERVERS and not urllib.parse.urlsplit(uri).hostname:
        raise ConfigError(f"{key} {shown} names no host: http://host:5000")
    if scheme == "sqlite":
        _check_file(key, shown, uri)
    elif scheme in _DATABASES:
        _check_driver(key, shown, uri)
    return uri


def _check_file(key: str, shown: str, uri: str) -> None:
    file = database_file(uri)
    assert file is not None
    if file.name in ("", ".", ":memory:"):
        raise ConfigError(f"{key} {shown} keeps nothing: name a file, sqlite:////folder/mlflow.db")
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    for place in (file, folder):
        if place.exists() and not os.access(place, os.W_OK):
            raise ConfigError(f"{key} {shown}: {place} cannot be written: set another tracking.uri, or mend that")
    if not folder.is_dir():
        raise ConfigError(f"{key} {shown}: {folder} is not a folder")
    if file.is_dir():
        raise ConfigError(f"{key} {shown}: {file} is a folder, name a file in it")
    if file.exists() and file.stat().st_size:
        with open(file, "rb") as stream:
            if stream.read(15) != b"SQLite format 3":
                raise ConfigError(f"{key} {shown}: {file} is no SQLite database")


def _check_driver(key: str, shown: str, uri: str) -> None:
    sqlalchemy = importlib.import_module("sqlalchemy")  # mlflow brings it; only databases need it
    try:
        sqlalchemy.make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        package = _DRIVERS.get(error.name or "", error.name or "that driver")
        raise ConfigError(
            f"{key} {shown}: the database's driver {error.name or ''} is not installed: .venv/bin/pip install "
            f"'{package}', or name another, {shown.partition(':')[0].partition('+')[0]}+DRIVER://..."
        ) from None
    except Exception as error:  # SQLAlchemy's own
        raise ConfigError(f"{key} {shown}: {without_credentials(str(error), uri)}") from None


def probe(config: RunConfig, note: Callable[[str], None]) -> None:
    """Ask what is at the address whether it will take the run. Raises ConfigError where it never will.

    A server that does not answer is a `note`: training does not wait for it, and its numbers are sent later.
    """
    uri, experiment = check_address(config), config.tracking.experiment
    shown = without_credentials(uri)
    if urllib.parse.urlsplit(uri).scheme in _SERVERS:
        stage = _stage_on_server(uri, shown, experiment, note)
    else:
        stage = _stage_in_file(database_file(uri), experiment)
    if stage == "deleted":
        raise ConfigError(
            f"MLflow's experiment {experiment!r} at {shown} was deleted: restore it (`mlflow experiments restore`), or "
            f"set another tracking.experiment"
        )


def _stage_in_file(file: Path | None, experiment: str) -> str | None:
    if file is None or not file.exists():
        return None
    row = None
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(file)) as database:
        row = database.execute("select lifecycle_stage from experiments where name = ?", (experiment,)).fetchone()
    return str(row[0]) if row else None


def _stage_on_server(uri: str, shown: str, experiment: str, note: Callable[[str], None]) -> str | None:
    parts = urllib.parse.urlsplit(uri)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    name = urllib.parse.quote(experiment, safe="")
    request = urllib.request.Request(f"{plain}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")
    user = urllib.parse.unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = urllib.parse.unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if user:
        request.add_header("Authorization", f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as answer:
            code, body = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        code, body = error.code, error.read()
    except OSError as error:
        reason = getattr(error, "reason", error)
        note(f"MLflow at {shown} does not answer ({reason}): training starts without, and sends its numbers later")
        return None
    if code == 403 and _WRONG_NAME in body:
        allowed = f"{parts.hostname},{parts.hostname}:*,localhost:*"
        raise ConfigError(
            f"MLflow at {shown} refuses requests by the name {parts.netloc.rpartition('@')[2]}, as it does by all but "
            f"localhost and private addresses: start it with --allowed-hosts '{allowed}', or use its IP address"
        )
    if code in (401, 403):
        raise ConfigError(
            f"MLflow at {shown} refuses the login (HTTP {code}): set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    try:
        answer = json.loads(body)
        return str(answer["experiment"]["lifecycle_stage"]) if code == 200 else str(answer["error_code"])
    except (ValueError, KeyError, TypeError):
        if code >= 500:
            note(f"MLflow at {shown} answers HTTP {code}: training starts without, and sends its numbers later")
            return None
        raise ConfigError(f"what answers at {shown} is no MLflow server (HTTP {code}): set tracking.uri") from None


def make_database(uri: str, make: Callable[[str], None]) -> None:
    """A new SQLite database is made whole before anybody opens it: `make` is given the address of a temporary file.

    MLflow itself makes it in place: two runs that are the first at once, or one that is killed meanwhile, would leave
    a file that no later run can open (MLflow 3.17). Of many processes one makes it, the others wait. So for tables on
    a database server, where of two that are the first one would fail.
    """
    file = database_file(uri)
    if file is None:
        _make_on_server(uri, make)
    if file is None or file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w", encoding="utf-8") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            temporary = file.with_name(f".{file.name}.tmp-{os.uname().nodename}-{os.getpid()}")
            try:
                make(f"sqlite:///{temporary.absolute()}")
                os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)


def _make_on_server(uri: str, make: Callable[[str], None]) -> None:
    lock = _LOCKS.get(urllib.parse.urlsplit(uri).scheme.partition("+")[0])
    if lock is None:
        return
    sqlalchemy = importlib.import_module("sqlalchemy")
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sqlalchemy.text(lock))
        if not sqlalchemy.inspect(connection).has_table("alembic_version"):
            make(uri)
