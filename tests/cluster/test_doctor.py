"""The doctor of a cluster names each fault of each node with its remedy, and leaves nothing behind."""

import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Escala, FrontDoor, refused
from raynodes import free_port, over, ray_node, wait_for

import cluster.doctor as doctor_alone
from cluster import nodeprobe
from cluster.clusterdoctor import SKEW_SECONDS, _driver_store, check_mlflow, examine
from cluster.nodeprobe import Report, this_process
from cluster.nodes import LivingNode, Members
from cluster.placement import Fleet
from sweeps.store import open_store

ACCOUNT = ("USERNAME", "PASSWORD", "TOKEN")
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-0123456789abcdef0123456789abcdef"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of one node that asks for a token."""
    from ray._private.services import get_node_ip_address

    log, port = tmp_path_factory.mktemp("guarded") / "head.log", free_port()
    with ray_node(log, "--head", "--port", port, "--num-cpus", 1, "--include-dashboard", "false", **TOKEN):
        wait_for(lambda: "block forever" in log.read_text(errors="replace"), log)
        yield f"{get_node_ip_address()}:{port}"


def doctor(escala: Escala, monkeypatch: pytest.MonkeyPatch, *arguments: object, ok: int) -> list[dict[str, Any]]:
    for name, value in TOKEN.items():
        monkeypatch.setenv(name, value)
    found: list[dict[str, Any]] = json.loads(escala("doctor", "--json", *arguments, ok=ok).stdout)
    return found


def test_a_gpu_that_torch_does_not_find_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_alone, "local_gpus", lambda: ("NVIDIA H200",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor_alone._device()
    assert not found.ok
    assert "NVIDIA H200, which torch does not find" in found.found
    assert "driver" in found.advice


@pytest.mark.parametrize("look", [doctor_alone._store, _driver_store])
def test_a_store_that_cannot_be_made_is_no_store_that_is_not_there_yet(
    look: Callable[[Path], doctor_alone.Finding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = look(tmp_path / "new" / "store")
    assert there.ok
    assert f"none yet at {tmp_path / 'new' / 'store'}" in there.found
    (tmp_path / "closed").mkdir()
    allowed = os.access  # whoever runs the tests may be root, to whom no folder is closed
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed" and allowed(path, mode))
    closed = look(tmp_path / "closed" / "new" / "store")
    assert not closed.ok
    assert f"{tmp_path / 'closed'} is not writable. Change its permissions, or name another store" in closed.found
    (tmp_path / "file").touch()
    below = look(tmp_path / "file" / "store")
    assert not below.ok
    assert f"{tmp_path / 'file'} is a file. Name another store" in below.found


@pytest.mark.slow
def test_a_node_with_another_folder_in_the_stores_place_is_named_and_nothing_is_left(
    guarded: str, escala: Escala, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(escala.folder / "store")
    before, log = sorted(store.root.rglob("*")), escala.folder / "node.log"
    with ray_node(log, "--address", guarded, "--num-cpus", 1, before=over(store.root), **TOKEN):
        wait_for(lambda: "block forever" in log.read_text(errors="replace"), log)
        found = doctor(escala, monkeypatch, "--address", guarded, "--store", store.root, ok=1)
    assert sorted(store.root.rglob("*")) == before
    (wrong,) = (one for one in found if not one["ok"])
    assert "is another folder than the store here" in wrong["advice"]
    assert "Mount the shared file system there" in wrong["advice"]
    (shared,) = (one["found"] for one in found if one["what"].endswith(" store"))
    assert shared.startswith("the same folder, written and read back")
    assert sum("ray 2" in one["found"] for one in found) == 2
    assert next(one["found"] for one in found if one["what"] == "Ray token auth").startswith("on")


def test_a_token_that_is_missing_and_a_wrong_address_are_each_one_sentence(guarded: str, escala: Escala) -> None:
    said = refused(escala, "doctor", "--address", guarded)
    assert "asks for a token, and takes none of this process. Set RAY_AUTH_MODE=token" in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert "Connection refused" in refused(escala, "doctor", "--address", f"127.0.0.1:{free_port()}")
    assert "`escala submit`" in refused(escala, "doctor", "--address", "http://127.0.0.1:8265")


def test_what_is_wrong_with_a_node_comes_with_what_to_do() -> None:
    here, root = this_process(), Path("/store")
    node = LivingNode("ab" * 28, "192.0.2.7", cpus=8, gpus=2)
    known = {name: here[name] for name in ("host", "python", "versions", "code", "code_folder")}
    well = Report(node=node, gpus=("NVIDIA H200", "NVIDIA H200"), driver="570.1", clock_seconds=0.1, **known)
    assert all(one.ok for one in examine(well, here, root))

    def faults(**changes: object) -> str:
        return " ".join(one.advice for one in examine(replace(well, **changes), here, root) if not one.ok)

    assert "Mount the shared file system" in faults(store="missing")
    assert "is not writable there: Read-only file system" in faults(store="not writable there: Read-only file system")
    assert "Put the same on both" in faults(code="0123456789ab", code_folder="/opt/escala")
    assert "Install it there" in faults(code=None)
    assert "Mend it, or take it out of the cluster" in faults(silent="no answer in 120 s")
    assert "install one version everywhere" in faults(versions=here["versions"] | {"ray": "2.50.0"})
    assert "--num-gpus" in faults(gpus=("NVIDIA H200",))
    assert "set its clock" in faults(clock_seconds=-SKEW_SECONDS - 1)
    assert faults(clock_seconds=SKEW_SECONDS + 1, clock_error=5.0) == "", "within what could be measured"
    assert "free some space" in faults(free_bytes=1)
    other = examine(replace(well, versions=here["versions"] | {"torch": "2.0.0"}), here, root)
    assert any("torch 2.0.0 on node abababab" in one.advice for one in other if one.ok), "a caution, no fault"


def test_a_node_that_gave_no_report_is_looked_at_again_and_let_in_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = LivingNode("a" * 56, "10.0.0.2", 8.0, 0.0)
    here = this_process()
    well = Report(node=node, versions=here["versions"], code=here["code"], host="there")
    answers = [Report(node=node, versions={}, silent="no answer in 120 s")] * 2 + [well]

    class Answered(nodeprobe.Probes):
        def begin(self, nodes: Any) -> None:
            assert [replace(one, leaving=None) for one in nodes] == [node]

        def done(self) -> bool:
            return True

        def reports(self, seconds: float = 0.0) -> list[Report]:
            return [answers.pop(0)]

    class Stub(Members):
        def __init__(self) -> None:
            self.ray, self.here, self.barred, self._doubted, self._nodes = None, "head", {}, {}, [node]

    monkeypatch.setattr(nodeprobe, "Probes", Answered)
    monkeypatch.setattr(nodeprobe, "PROBE_SECONDS", 0.0)
    members = Stub()
    gate = nodeprobe.Gate(members, tmp_path)
    (said,) = gate.open()
    assert "gives no report" in said
    told: list[str] = []
    for _ in range(4):
        told += gate.look()
        assert answers == [] or members.barred, "no cell goes there before it has answered"
    assert told == [], "it is said once"
    assert not members.barred


def test_a_node_that_joins_while_another_is_looked_at_gets_no_cell_before_it_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (LivingNode(letter * 56, "10.0.0.2", 8.0, 0.0) for letter in "ab")
    here, answered, asked = this_process(), False, list[list[str]]()

    class Slow(nodeprobe.Probes):
        def begin(self, nodes: Any) -> None:
            self.nodes = list(nodes)
            asked.append([node.id for node in self.nodes])

        def done(self) -> bool:
            return answered

        def reports(self, seconds: float = 0.0) -> list[Report]:
            well = {"versions": here["versions"], "code": here["code"]}
            return [
                Report(node=node, store="missing" if node.id == second.id else "same", **well) for node in self.nodes
            ]

    class Stub(Members):
        def __init__(self) -> None:
            self.ray, self.here, self._held, self.barred = None, "head", 0.0, {}
            self._doubted, self._nodes = {}, [first]

    monkeypatch.setattr(nodeprobe, "Probes", Slow)
    members, fleet = Stub(), Fleet()
    gate = nodeprobe.Gate(members, tmp_path)
    told: list[str] = []

    def turn() -> list[str]:
        told.extend(gate.look())
        members.follow(fleet, [])
        return [node.id for node in fleet.nodes()]

    assert turn() == []
    members._nodes = [first, second]
    assert turn() == [], "the first is being looked at still"
    answered = True
    assert turn() == [first.id]
    assert (turn(), turn()) == ([first.id], [first.id])
    assert asked == [[first.id], [second.id]]
    (said,) = told
    assert "is not visible on node bbbbbbbb" in said


class Tracking(http.server.BaseHTTPRequestHandler):
    """An MLflow server that answers so to a search and to all else. It keeps what it was asked to write."""

    answers: tuple[tuple[int, str], tuple[int, str]]
    written: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        what = self.path.rpartition("/")[2]
        if what != "search":
            self.written.append(what)
        status, body = self.answers[what != "search"]
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if body.startswith("{") else "text/plain")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


FOUND, MADE = (200, "{}"), (200, '{"experiment_id": "7"}')
FORBIDDEN = (403, '{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}')
BROKEN = (500, '{"error_code": "INTERNAL_ERROR", "message": "disk full"}')


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check changes is put back, and no account is known."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", *(f"TRACKING_{one}" for one in ACCOUNT)):
        monkeypatch.setenv(f"MLFLOW_{name}", "")
        monkeypatch.delenv(f"MLFLOW_{name}")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("search", "create", "written", "found", "advice"),
    [
        (FOUND, MADE, ["create", "delete"], "an experiment was made and deleted", ""),
        (FOUND, FORBIDDEN, ["create"], "but this account may not write: ", "for an account that may"),
        (FOUND, BROKEN, ["create"], "but an experiment could not be made and deleted: ", "the server's log says more"),
        ((401, "You are not authenticated."), MADE, [], "does not accept the account: none was sent. Set MLFLOW", ""),
        ((403, "Invalid Host header - possible DNS rebinding attack detected"), MADE, [], "--allowed-hosts", ""),
    ],
)
def test_what_an_mlflow_server_refuses_is_said_as_it_is_and_what_is_tried_is_taken_away(
    search: tuple[int, str], create: tuple[int, str], written: list[str], found: str, advice: str, tmp_path: Path
) -> None:
    handler = type("Handler", (Tracking,), {"answers": (search, create), "written": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = check_mlflow(tmp_path, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert told.ok is (search == FOUND and create == MADE)
    assert handler.written == written
    assert found in told.found
    assert advice in told.advice
    assert "may not write" not in told.found or create == FORBIDDEN


@pytest.mark.usefixtures("quick")
def test_a_password_that_others_can_read_is_a_fault_before_the_server_is_asked(tmp_path: Path) -> None:
    file = tmp_path / ".mlflow" / "credentials"
    file.parent.mkdir()
    file.touch(0o644)
    found = check_mlflow(tmp_path, f"http://127.0.0.1:{free_port()}")
    assert not found.ok
    assert f"chmod 600 {file}" in found.found


@pytest.mark.usefixtures("quick")
def test_the_number_of_a_port_is_no_refusal(tmp_path: Path) -> None:
    """Nothing listens at 4013 and 4030, which hold the numbers of refusals."""
    for port in (4013, 4030):
        found = check_mlflow(tmp_path, f"http://127.0.0.1:{port}")
        assert not found.ok
        assert found.advice.startswith("start the server, or correct --tracking-uri")


@pytest.mark.parametrize("uri", ["ftp://host/mlflow", "postgresql+asyncdriver://127.0.0.1:1/mlflow"])
def test_a_tracking_address_that_mlflow_cannot_open_is_a_fault_of_the_drivers(uri: str, tmp_path: Path) -> None:
    found = check_mlflow(tmp_path, uri)
    assert not found.ok
    assert f"not reachable at {uri} from here" in found.found
    assert "correct --tracking-uri" in found.advice


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("given", ["option", "variable"])
def test_the_server_is_checked_without_a_cluster_too(
    given: str, tmp_path: Path, front_door: FrontDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    handler = type("Handler", (Tracking,), {"answers": (FOUND, MADE), "written": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        if given == "variable":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        option = ["--tracking-uri", uri] if given == "option" else []
        told = front_door("doctor", "--json", "--store", tmp_path / "none", *option)
        server.shutdown()
    (found,) = (one for one in json.loads(told.out) if one["what"] == "MLflow")
    assert found["ok"]
    assert f"reachable at {uri} from here" in found["found"]
    assert handler.written == ["create", "delete"]


@pytest.mark.slow
def test_an_mlflow_server_that_is_not_there_is_a_fault_of_the_drivers(
    guarded: str, escala: Escala, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    found = doctor(escala, monkeypatch, "--address", guarded, "--tracking-uri", uri, ok=1)
    (wrong,) = (one for one in found if not one["ok"])
    assert (wrong["what"], uri in wrong["found"]) == ("MLflow", True)
    assert not any(os.scandir(escala.folder))
