"""Whether the host of a database answers at all: MLflow tries for minutes before it says that it does not."""

import socket
from urllib.parse import urlsplit

PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Of databases that MLflow takes, where the address names none."""
ANSWER_SECONDS = 5.0
"""How long a host has to answer."""


def is_database(tracking_uri: str) -> bool:
    """Whether a tracking URI is the address of a database server."""
    return urlsplit(tracking_uri).scheme.partition("+")[0] in PORTS


def ask_host(tracking_uri: str) -> None:
    """Connect once to the host of a database server; OSError where it cannot be reached.

    Nothing is done with other addresses, nor with hosts that only the database's driver knows how to read.
    """
    url = urlsplit(tracking_uri)
    try:
        host, port = url.hostname, url.port or PORTS.get(url.scheme.partition("+")[0])
    except ValueError:
        return
    if is_database(tracking_uri) and host and port and "," not in host:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
