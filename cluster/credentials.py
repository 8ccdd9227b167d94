"""Accounts on a shared MLflow server: where user and password come from, and what is said where it refuses them.

MLflow's client reads them by itself: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, or
the file ~/.mlflow/credentials. Escala never reads a password. It guards against the two ways in which one gets about:
in an address, which is printed and kept in the store, and in a file that others can read. What a server answers to a
wrong one is a 401 with a page of words; here it becomes a sentence with the remedy, before anything trains.
"""

import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

from sweeps.errors import InputError
from sweeps.redaction import redact

USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"


def check_uri(uri: str) -> str:
    """A tracking URI as it was given. InputError where it carries a password, in its query too, or a server's a user
    name."""
    try:
        parts = urlsplit(uri)
        carried = bool(parts.password or (parts.username and parts.scheme in ("http", "https")))
        carried |= redact(f"?{parts.query}") != f"?{parts.query}"
    except ValueError as error:
        raise InputError(
            f"the tracking URI is no address ({error}): it looks like https://mlflow.example.org."
        ) from None
    if carried:
        where = f"{parts.scheme}://{parts.hostname or ''}"
        raise InputError(
            f"the tracking URI {where} carries a password, which would be seen in messages and kept in the store. "
            f"Leave it out, and set {USER} and {PASSWORD} (of a database without a server: PGPASSWORD or ~/.pgpass)."
        )
    return uri


def check_file() -> None:
    """Refuse MLflow's credentials file where others than its owner can read it, and it is what will be used."""
    path = _file()
    if all(os.environ.get(name) for name in (USER, PASSWORD)) or not path.exists():
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(
            f"{path} holds a password and is open to others than its owner (permissions {mode:03o}; allowed: 600). "
            f"chmod 600 {path}, and change the password if others have used this machine."
        )


def refusal(error: Exception, uri: str) -> str | None:
    """What a server's refusal means and what to do, in one sentence; None where it refused nothing."""
    code, said = str(getattr(error, "error_code", "")), str(error)
    if "Invalid Host header" in said:
        host = urlsplit(uri).netloc
        return (
            f"MLflow at {uri} does not serve under that name ({host} is not among its allowed hosts). Start it with "
            f"--allowed-hosts {host}, or use a name that it allows."
        )
    # MLflow 3.17 with accounts and their cache on breaks over a token, which is not what it asks for.
    broken = _sent().endswith(TOKEN) and "too many 500 error responses" in said
    if broken or code == "UNAUTHENTICATED" or "error code 401" in said:
        return (
            f"MLflow at {uri} does not accept the account: {_sent()}. Set {USER} and {PASSWORD}, or {TOKEN}, to an "
            "account of that server; its administrator makes accounts and changes passwords."
        )
    if forbids(error):
        return (
            f"MLflow at {uri} does not let this account write here ({said.splitlines()[0][:200]}); {_sent()}. Ask its "
            "administrator for the permission EDIT on the experiment of that name, or use the account that made it."
        )
    return None


def forbids(error: Exception) -> bool:
    """Whether a server knows the account, and does not let it do this."""
    return getattr(error, "error_code", "") == "PERMISSION_DENIED" or "error code 403" in str(error)


def _sent() -> str:
    """Which account went with the request: where it came from, never what it is."""
    user, password = os.environ.get(USER), os.environ.get(PASSWORD)
    if user and password:
        return f"it was sent the one of {USER} and {PASSWORD}"
    if _file().exists():
        return f"it was sent the one of {_file()}"
    if user or password:
        return f"none was sent, since {PASSWORD if user else USER} is not set"
    return f"it was sent {TOKEN}" if os.environ.get(TOKEN) else "none was sent"


def _file() -> Path:
    """Where MLflow's client looks."""
    return Path.home() / ".mlflow" / "credentials"
