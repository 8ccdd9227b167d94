"""A real MLflow server over SQLite, and a proxy before it that loses, delays and refuses what it is told to."""

import http.client
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "server", "date"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Server:
    """A running `mlflow server`."""

    port: int
    database: Path

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Ask the database itself, past the server."""
        with sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=20) as connection:
            return connection.execute(query, arguments).fetchall()


def start_server(folder: Path, *options: str) -> "tuple[Server, subprocess.Popen[bytes]]":
    """Start a server with one worker on 127.0.0.1 and wait until it answers."""
    server = Server(free_port(), folder / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{server.database}"]
    command += ["--host", "127.0.0.1", "--port", str(server.port), "--workers", "1", *options]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until_up(server, process)
    return server, process


def wait_until_up(server: Server, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it answered"
        try:
            urllib.request.urlopen(f"{server.uri}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    process.terminate()
    raise AssertionError("the server did not answer")


class FaultProxy:
    """Forwards HTTP requests to a server. `choose(path, n)` says what becomes of the n-th request (from 0) to a path:

    pass, drop (never forwarded, the connection is cut), lose (forwarded, the reply is cut), 500 (answered without
    forwarding), 500-after (forwarded, then answered so), late:SECONDS (the connection is cut, and forwarded so much
    later). `down` refuses every connection until `up`.
    """

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_port()
        self.choose: Callable[[str, int], str] = lambda path, n: "pass"
        self.log: list[tuple[str, str]] = []
        """(path, what became of it)."""
        self.late: list[threading.Thread] = []
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.up()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fate(self, path: str) -> str:
        """What becomes of the next request to this path."""
        with self._lock:
            chosen = self.choose(path, self._counts[path]) if self._server else "drop"
            self._counts[path] += 1
            self.log.append((path, chosen))
            return chosen

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        try:
            connection.request(method, path, body, {**headers, "Host": f"127.0.0.1:{self.target}"})
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    def later(self, seconds: float, *request: Any) -> None:
        def work() -> None:
            time.sleep(seconds)
            self.forward(*request)

        self.late.append(threading.Thread(target=work))
        self.late[-1].start()


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
            request = (self.command, self.path, headers, body)
            fate = proxy.fate(self.path.partition("?")[0].rpartition("/mlflow/")[2])
            if fate == "drop":
                return self._cut()
            if fate.startswith("late:"):
                proxy.later(float(fate.partition(":")[2]), *request)
                return self._cut()
            status, found, content = (500, {}, b"{}") if fate == "500" else proxy.forward(*request)
            if fate == "lose":
                return self._cut()
            if fate == "500-after":
                status, content = 500, b"{}"
            self.send_response(status)
            for key, value in found.items():
                if key.lower() not in _HOP:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return None

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        def _cut(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
