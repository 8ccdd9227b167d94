"""A real Postgres on loopback, and a real MLflow server with accounts on it."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commandline import ROOT
from faultproxy import START_SECONDS, Server, free_port, wait_until_up

USER, PASSWORD = "admin", "correct-horse-battery"
SCRIPT = ROOT / "cluster" / "deploy" / "mlflow" / "serve.sh"


@dataclass(frozen=True)
class Postgres:
    """A running Postgres with the database `mlflow`."""

    port: int
    password: str

    @property
    def uri(self) -> str:
        """As SQLAlchemy 2.1 wants it: without the driver's name it takes psycopg 3, which Escala does not install."""
        return f"postgresql+psycopg2://escala:{self.password}@127.0.0.1:{self.port}/mlflow"

    def connect(self, database: str = "mlflow") -> Any:
        import psycopg2

        place = {"host": "127.0.0.1", "port": self.port, "user": "escala", "password": self.password}
        return psycopg2.connect(dbname=database, **place)

    def rows(self, query: str, arguments: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        connection = self.connect()
        try:
            with connection.cursor() as cursor:
                cursor.execute(query, arguments)
                return cursor.fetchall()
        finally:
            connection.close()


@dataclass(frozen=True)
class PostgresServer(Server):
    """A running `mlflow server` on Postgres."""

    postgres: Postgres

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        return self.postgres.rows(query.replace("?", "%s"), arguments)


def why_not() -> str | None:
    """Why this machine cannot run a Postgres, or None where it can."""
    if _programs() is None:
        return "no Postgres here (Debian: postgresql)"
    try:
        import flask_wtf  # noqa: F401
        import psycopg2  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed: pip install -c constraints.txt '.[cluster]'"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "Postgres does not run as root, and there is no user postgres here"
    return None


def _programs() -> Path | None:
    """The folder of Debian's newest Postgres, or that of the one on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


@contextmanager
def postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A fresh Postgres on a free port of 127.0.0.1, gone at the end. Root's runs as the user postgres. What is
    committed is on the disk only where it is `durable`."""
    programs = _programs()
    assert programs is not None
    made = Postgres(free_port(), "a-password-of-the-database")
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="escala-postgres-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "password").write_text(made.password)
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        command = [programs / "initdb", "-D", folder / "data", "-U", "escala", "-A", "scram-sha-256"]
        command += [f"--pwfile={folder / 'password'}", "--no-sync", "-E", "UTF8", "--locale=C"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)
        settings = {"listen_addresses": "127.0.0.1", "port": made.port, "unix_socket_directories": folder}
        settings["fsync"] = "on" if durable else "off"
        options = [f"-c{key}={value}" for key, value in settings.items()]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", *options], cwd=folder, stderr=log, stdout=log, **user
            )
        try:
            _make_database(made, process, folder / "log")
            yield made
        finally:
            process.send_signal(signal.SIGINT)  # Postgres' fast shutdown
            process.wait(60)


def _make_database(made: Postgres, process: "subprocess.Popen[bytes]", log: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        try:
            connection = made.connect("postgres")
            break
        except psycopg2.OperationalError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("create database mlflow")
    connection.close()


@contextmanager
def mlflow_on(database: Postgres, folder: Path, workers: int = 1) -> Iterator[PostgresServer]:
    """An MLflow server on a database, by the script of cluster/deploy/mlflow: with accounts, artifacts through it."""
    server = PostgresServer(free_port(), folder, database)
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": database.uri,
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-tests-alone",
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
        "ESCALA_MLFLOW_NAME": "mlflow.example.org",
        "ESCALA_MLFLOW_LISTEN": f"127.0.0.1:{server.port}",
        "ESCALA_MLFLOW_WORKERS": str(workers),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TMPDIR": str(folder),
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(["bash", str(SCRIPT)], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until_up(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(60)
