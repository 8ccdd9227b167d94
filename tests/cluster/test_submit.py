"""A study goes to a real cluster as a job, with token auth on and off, and nothing wrong gets that far."""

import asyncio
import functools
import http.server
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from commandline import TINY, Escala, Finished, FrontDoor, refused
from faultproxy import free_port
from heads import TOKEN, Head, running_head

import cluster.jobs as jobs
import cluster.remote as remote
import cluster.submit as submits
from cluster.package import Package, make_package
from sweeps.errors import InputError
from sweeps.records import read_json
from sweeps.store import Store, read_end
from sweeps.studyfile import load_study

SECONDS = 180.0
NOWHERE = "http://127.0.0.1:1"
GATED = """
import os, time
from pathlib import Path

def train(cell, io):
    gate = Path(os.environ["GATE"])
    state = io.restore() or {"step": 0}
    (gate.parent / f"{cell.seed}-from-{state['step']}").touch()
    for step in range(state["step"] + 1, cell.steps + 1):
        while step == 5 and not gate.exists() and not io.should_stop():
            (gate.parent / f"{cell.seed}-waits").touch()
            time.sleep(0.05)
        io.log(step * cell.batch_tokens, {"train_loss": 1.0 / step})
        io.checkpoint(step * cell.batch_tokens, lambda: {"step": step})
    return 1.0
"""


def gated_study(name: str) -> str:
    """Two cells of a trainer that waits at its fifth step for the file that GATE names."""
    grid = "grid: {type: points, points: [{size: 10000, tokens: 2560}]}\nseeds: [0, 1]\ntrainer: gated.py:train\n"
    return re.sub(r"grid:.*?\ntraining", f"{grid}training", TINY, flags=re.S).replace("name: tiny", f"name: {name}")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def job_of(said: str, study: str) -> tuple[str, str]:
    """The job of a study that an output names, and the one after it: their numbers depend on what ran before."""
    found = re.search(rf"escala-{study}-(\d+)", said)
    assert found is not None, said
    return found[0], f"escala-{study}-{int(found[1]) + 1}"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Three CPUs: one for the driver, two for workers."""
    with running_head(cpus=3, token=TOKEN) as made:
        yield made


@pytest.fixture(autouse=True)
def no_token_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What Ray's client reads tokens from is the test's alone."""
    ours = {"RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"}  # set by a connection, and gone with the test
    for name in ours | {name for name in os.environ if name.startswith("RAY_")}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, no_token_of_ones_own: None) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def losses(store: Path) -> dict[str, float]:
    return {path.parent.name: read_json(path)["val_loss_final"] for path in (store / "cells").glob("*/result.json")}


def listed(escala: Escala, head: Head) -> dict[str, dict[str, Any]]:
    return {job["id"]: job for job in json.loads(escala("jobs", "--address", head.address, "--json").stdout)}


# --- a cluster that asks for a token ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("token")
def test_a_submitted_study_ends_as_on_the_laptop_and_again_has_nothing_to_train(
    head: Head, escala: Escala, finished: Finished, tmp_path: Path
) -> None:
    study, store = escala.study(TINY, "my tiny study.yaml"), tmp_path / "cluster"
    first = escala("submit", study, "--address", head.address, "--store", store)
    job_id, next_id = job_of(first.stdout, "tiny")
    assert f"sent as {job_id}" in first.stdout
    assert "7 finished, 0 diverged, 0 failed" in first.stdout
    assert f"{job_id} has ended well" in first.stdout
    assert losses(store) == losses(finished.store), "equal to the bit"
    second = escala("submit", study, "--address", head.address, "--store", store, "--json")
    assert "nothing to train: all 7 cells have ended already" in second.stderr
    job = json.loads(second.stdout)
    assert (job["id"], job["status"], job["exit_code"]) == (next_id, "SUCCEEDED", 0)
    assert TOKEN not in first.stdout + first.stderr + second.stdout + second.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("token")
def test_a_study_with_its_code_is_followed_stopped_and_resumed_under_one_driver(
    head: Head, escala: Escala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, marks, store = tmp_path / "beside", tmp_path / "marks", tmp_path / "cluster"
    here.mkdir()
    marks.mkdir()
    (here / "gated.py").write_text(GATED)
    (here / "gated.yaml").write_text(gated_study("gated"))
    monkeypatch.setenv("GATE", str(marks / "gate"))
    command = ["submit", here / "gated.yaml", "--address", head.address, "--store", store, "--allow-code"]
    command += ["--env", "GATE"]

    # 1. Two at once: one of them drives.
    racing = [escala.start(*command, "--detach") for _ in range(2)]
    said = [one.communicate(timeout=SECONDS) for one in racing]
    assert sorted(one.returncode for one in racing) == [0, 2], said
    job_id, next_id = job_of(str(said), "gated")
    assert re.search(rf"is (pending|running) already as {job_id}", str(said))
    wait_for(lambda: len(list(marks.glob("*-waits"))) == 2)

    # 2. Whoever submits it meanwhile follows the one that runs; Ctrl-C ends the following alone.
    follower = escala.start(*command)
    assert follower.stdout is not None
    deadline = threading.Timer(SECONDS, follower.kill)
    deadline.start()
    for line in follower.stdout:
        if "starting Ray" in line:
            break
    deadline.cancel()
    follower.send_signal(2)
    out, _ = follower.communicate(timeout=SECONDS)
    assert follower.returncode == 1
    assert f"no longer followed; {job_id} goes on" in out
    assert listed(escala, head)[job_id]["status"] == "RUNNING"

    # 3. Stopped: the cells keep checkpoints, and are not charged for it.
    stopped = escala("jobs", "--stop", job_id, "--address", head.address)
    assert f"{job_id}: stopped" in stopped.stdout
    ends = [read_end(Store(store), path.parents[2].name, 0) for path in store.glob("cells/*/attempts/0/log.jsonl")]
    assert [end and end[0] for end in ends] == ["stopped", "stopped"]

    # 4. Submitted again, it goes on from there.
    (marks / "gate").touch()
    again = escala(*command)
    assert "2 finished" in again.stdout
    assert {path.name for path in marks.glob("*-from-*")} >= {"0-from-5", "1-from-5"}
    found = listed(escala, head)
    assert [found[one]["status"] for one in (job_id, next_id)] == ["STOPPED", "SUCCEEDED"]
    table = escala("jobs", "--address", head.address).stdout
    assert re.search(rf"{next_id} +gated +succeeded", table)


@pytest.mark.slow
@pytest.mark.usefixtures("token")
def test_what_the_jobs_api_shows_holds_no_secret(head: Head, escala: Escala, tmp_path: Path) -> None:
    """A job whose driver refuses: its exit code is the command's, and its record is there to be looked at."""
    study = escala.study(TINY.replace("name: tiny", "name: refused"))
    (tmp_path / "file").touch()
    run = escala("submit", study, "--address", head.address, "--store", tmp_path / "file" / "store", ok=2)
    assert "error: " in run.stdout, "the driver's own sentence"
    job_id, _ = job_of(run.stderr, "refused")
    assert f"{job_id} ended with exit code 2" in run.stderr
    code = (
        "import json, sys; from ray.job_submission import JobSubmissionClient\n"
        "jobs = JobSubmissionClient(sys.argv[1]).list_jobs()\n"
        "print(json.dumps([job.dict() for job in jobs if job.submission_id == sys.argv[2]], default=str))"
    )
    environment = dict(os.environ, RAY_AUTH_MODE="token")
    command = [sys.executable, "-c", code, head.address, job_id]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert TOKEN not in shown
    (record,) = json.loads(shown)
    assert set(record["runtime_env"]["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert set(record["metadata"]) >= {"escala.study", "escala.store", "escala.person", "escala.commit"}


@pytest.mark.slow
def test_a_token_that_is_missing_wrong_or_not_sent_is_said(
    head: Head, escala: Escala, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**environment: str) -> str:
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            return refused(escala, "jobs", "--address", head.address)

    assert "wants a token, and there is none here" in said()
    assert "does not take the token of RAY_AUTH_TOKEN" in said(RAY_AUTH_TOKEN="0ddba11")
    assert "RAY_AUTH_TOKEN_PATH holds none" in said(RAY_AUTH_TOKEN_PATH=str(escala.folder / "missing"))
    assert "RAY_AUTH_MODE=disabled sends none" in said(RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=TOKEN)


@pytest.mark.usefixtures("token")
def test_a_job_that_is_not_there_cannot_be_stopped(head: Head, escala: Escala) -> None:
    assert "no job 'escala-tiny-77'" in refused(escala, "jobs", "--stop", "escala-tiny-77", "--address", head.address)


class OneHead:
    """A client of a cluster whose head has so many CPUs, and whose other node has many; it keeps what it is sent."""

    def __init__(self, cpus: float) -> None:
        self.sent: list[dict[str, Any]] = []
        self.another: dict[str, Any] = {}
        """What others' jobs have instead."""
        head = {"is_head_node": True, "state": "ALIVE", "resources_total": {"CPU": cpus} if cpus else {}}
        dead, worker = head | {"state": "DEAD"}, head | {"is_head_node": False, "resources_total": {"CPU": 64.0}}
        self.nodes = [dead, worker, head]

    def _do_request(self, *_: object) -> Any:
        return SimpleNamespace(json=lambda: {"data": {"result": {"result": self.nodes}}})

    def list_jobs(self) -> list[Any]:
        known = {"start_time": 1, "end_time": None, "driver_exit_code": None, "message": ""}
        status = SimpleNamespace(value="PENDING")
        return [SimpleNamespace(**one, **known, status=status) for one in self.sent]

    def get_job_info(self, job_id: str) -> Any:
        return next(one for one in self.list_jobs() if one.submission_id == job_id)

    def submit_job(self, **job: Any) -> None:
        self.sent.append(job)


def submission() -> submits.Submission:
    return submits.Submission("tiny", "/shared/store", "exec true", Package({}, "tiny"), {}, None, "")


def test_the_driver_is_kept_on_the_head() -> None:
    client = OneHead(cpus=1)
    submits.send(jobs.Dashboard(NOWHERE, client, False), submission())
    (sent,) = client.sent
    assert sent["entrypoint_num_cpus"] == 1
    assert sent["entrypoint_resources"] == {"node:__internal_head__": 0.001}, "CPUs alone would fit on any node"


def test_a_job_whose_reply_was_lost_is_known_as_sent_and_that_of_another_is_not() -> None:
    class Busy(OneHead):
        def submit_job(self, **job: Any) -> None:
            super().submit_job(**job | self.another)
            raise ConnectionError("read timed out")

    client = Busy(cpus=1)
    job, new = submits.send(jobs.Dashboard(NOWHERE, client, False), submission())
    assert (job.id, new, len(client.sent)) == ("escala-tiny-1", True, 1)
    client = Busy(cpus=1)
    client.another = {"metadata": {"escala.study": "tiny", "escala.store": "/shared/store"}}
    job, new = submits.send(jobs.Dashboard(NOWHERE, client, False), submission())
    assert (job.id, new, len(client.sent)) == ("escala-tiny-1", False, 1)


def test_a_head_without_a_cpu_for_the_driver_is_said_and_nothing_is_sent() -> None:
    client = OneHead(cpus=0)
    with pytest.raises(InputError, match=r"has 0 CPUs, .* needs 1 there.*--num-cpus=2"):
        submits.send(jobs.Dashboard(NOWHERE, client, False), submission())
    assert not client.sent


@pytest.mark.usefixtures("token")
def test_a_real_dashboard_tells_the_cpus_of_its_head(head: Head) -> None:
    """Also in a process that has joined a cluster without tokens: Ray keeps a copy of the mode."""
    assert jobs.head_cpus(jobs.connect(head.address)) == 3.0


# --- a cluster that asks for none ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_without_tokens_takes_a_study_and_lists_it(
    escala: Escala, finished: Finished, tmp_path: Path
) -> None:
    fewer = TINY.replace("budgets: [4e8, 8e8]", "budgets: [4e8]").replace("  replicates:", "  #")
    study, store = escala.study(fewer), tmp_path / "cluster"
    with running_head(cpus=2, token=None) as open_head:
        run = escala("submit", study, "--address", open_head.address, "--store", store)
        assert len(losses(store)) == 3, run.stdout
        assert losses(store).items() <= losses(finished.store).items(), "cells that another study shares"
        assert [job["status"] for job in listed(escala, open_head).values()] == ["SUCCEEDED"]


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("", "--address is missing: the dashboard of a cluster, --address http://HOST:8265"),
        ("head:8265", "Did you mean --address http://head:8265?"),
        ("head:6379", "Did you mean --address http://head:8265?"),
        ("ray://head:10001", "--address http://head:8265?"),
        ("auto", "--address http://HOST:8265"),
        ("local", "escala run"),
        ("http://user:pass@head:8265", "found a password in it"),
        ("http://", "names no host"),
        ("http://head:99999", "names no host"),
        ("http://[::1", "is no address"),
    ],
)
def test_an_address_that_is_none_is_refused_with_what_was_meant(address: str, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(hint)) as error:
        jobs.check_address(address)
    assert "pass@" not in str(error.value)


def test_an_address_that_was_copied_from_a_browser_is_that_of_its_dashboard() -> None:
    assert jobs.check_address("http://head:8265/#/jobs") == "http://head:8265"
    assert jobs.check_address("https://host/ray/#/overview") == "https://host/ray"


class Answers(http.server.BaseHTTPRequestHandler):
    """A web server with one answer to everything; it keeps the headers that it was sent."""

    def __init__(self, status: int, body: str, seen: list[str], *arguments: Any) -> None:
        self.status, self.body, self.seen = status, body, seen
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.seen.append(str(self.headers))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, "<html>not found</html>", "is a web server, but no dashboard of Ray"),
        (200, "[1, 2]", "is a web server, but no dashboard of Ray"),
        (401, "log in first", "a proxy before the dashboard"),
        (200, '{"ray_version": "2.9.3"}', "runs Ray 2.9.3, and this is Ray 2."),
    ],
)
def test_a_server_that_is_no_fitting_dashboard_is_refused_and_gets_no_token(status: int, body: str, said: str) -> None:
    seen: list[str] = []
    handler = functools.partial(Answers, status, body, seen)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=re.escape(said)):
            jobs.connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert seen
    assert TOKEN not in str(seen)


def test_a_port_where_nothing_or_something_else_listens_is_said_within_seconds(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"nothing answers at .*connection refused"):
        jobs.connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match="not as a web server does"):
        jobs.connect(f"http://127.0.0.1:{head.port}")  # where nodes join
    with pytest.raises(InputError, match="speaks http"):
        jobs.connect(head.address.replace("http:", "https:"))
    monkeypatch.setattr(jobs, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(InputError, match="does not answer within"):
        jobs.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


# --- a log that is followed ------------------------------------------------------------------------------------------


@contextmanager
def quiet_dashboard(then: str) -> Iterator[str]:
    """A dashboard with a running job, whose log's connection says one piece and then nothing more, nor that it ended.
    Afterwards the job has ended ("ended"), or the whole machine is silent ("gone")."""
    first = "step 1\nste"
    tailed, down = threading.Event(), threading.Event()
    started: list[int] = []

    async def tell_version(_: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": version("ray"), "ray_commit": "0"})

    async def tell_jobs(_: web.Request) -> web.Response:
        while tailed.is_set() and then == "gone" and not down.is_set():
            await asyncio.sleep(0.05)
        known = {"type": "SUBMISSION", "submission_id": "escala-quiet-1", "entrypoint": "true"}
        status = "SUCCEEDED" if tailed.is_set() else "RUNNING"
        return web.json_response([known | {"status": status, "metadata": {"escala.study": "quiet"}}])

    async def tell_log(_: web.Request) -> web.Response:
        return web.json_response({"logs": first + "p 2\n"})

    async def tail(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(first)
        tailed.set()
        while not down.is_set():
            await asyncio.sleep(0.05)
        return socket

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/api/version", tell_version)
        app.router.add_get("/api/jobs/", tell_jobs)
        app.router.add_get("/api/jobs/escala-quiet-1/logs", tell_log)
        app.router.add_get("/api/jobs/escala-quiet-1/logs/tail", tail)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        started.append(port)
        while not down.is_set():
            await asyncio.sleep(0.05)
        await runner.cleanup()

    port = free_port()
    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        wait_for(lambda: bool(started))
        yield f"http://127.0.0.1:{port}"
    finally:
        down.set()
        thread.join(SECONDS)


def test_a_log_whose_connection_fell_silent_is_had_whole_when_the_job_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "QUIET_SECONDS", 0.5)
    pieces: list[str] = []
    with quiet_dashboard("ended") as address:
        job = jobs.follow(jobs.connect(address), "escala-quiet-1", pieces.append, print)
    assert job.status == "SUCCEEDED"
    assert "".join(pieces) == "step 1\nstep 2\n"


@pytest.mark.slow
def test_a_machine_that_is_lost_without_a_word_ends_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "QUIET_SECONDS", 0.5)
    pieces: list[str] = []
    with quiet_dashboard("gone") as address:
        dashboard = jobs.connect(address)
        monkeypatch.setattr(jobs, "ANSWER_SECONDS", 2.0)
        with pytest.raises(jobs.ClusterGone, match="is gone for"):
            jobs.follow(dashboard, "escala-quiet-1", pieces.append, print)
    assert "".join(pieces) == "step 1\nste"


def test_a_secret_that_a_followed_log_cuts_in_two_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse-battery")
    shown = io.StringIO()
    with remote._redacted(shown) as write:
        for piece in (
            "sent correct-ho",
            "rse-battery\nand https://me:hun",
            "ter2@mlflow\nlast correct-horse",
            "-battery",
        ):
            write(piece)
    assert shown.getvalue() == "sent ***\nand https://***@mlflow\nlast ***"


@pytest.mark.parametrize("end", [KeyboardInterrupt(), jobs.ClusterGone("the dashboard is gone for 60 s.")])
def test_the_json_of_a_job_that_is_no_longer_followed_is_the_job_as_it_is_known(
    end: BaseException, front_door: FrontDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = jobs.Job("escala-tiny-1", "tiny", "/shared/store", "PENDING", 1.0, None, None, "me@here", "", "", "")

    def follow(*_: object) -> jobs.Job:
        raise end

    monkeypatch.setattr(jobs, "connect", lambda address: jobs.Dashboard(address, None, False))
    monkeypatch.setattr(jobs, "follow", follow)
    monkeypatch.setattr(submits, "send", lambda *_: (sent, True))
    (tmp_path / "study.yaml").write_text(TINY)
    told = front_door("submit", "study.yaml", "--address", NOWHERE, "--store", "/shared/store", "--json")
    assert told.code == 1
    assert json.loads(told.out) == vars(sent)


@pytest.mark.parametrize("wants_token", [True, False])
def test_rays_own_command_for_a_log_is_told_of_a_token_where_the_cluster_wants_one(
    wants_token: bool, front_door: FrontDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.Job("escala-tiny-1", "tiny", "/shared/store", "RUNNING", 1.0, None, None, "me@here", "", "", "")
    dashboard = jobs.Dashboard(NOWHERE, None, wants_token)
    monkeypatch.setattr(jobs, "connect", lambda _: dashboard)
    monkeypatch.setattr(jobs, "list_jobs", lambda _: [job])
    mode = "RAY_AUTH_MODE=token " if wants_token else ""
    assert f"or {mode}ray job logs -f escala-tiny-1 --address {NOWHERE}" in remote._how_to(dashboard, job)
    assert f"a log: {mode}ray job logs JOB --address {NOWHERE}" in front_door("jobs", "--address", NOWHERE).out


# --- what goes, and what does not ------------------------------------------------------------------------------------


def test_a_dry_run_shows_all_that_would_go_and_reaches_nobody(
    escala: Escala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    study = escala.study(TINY)
    before = sorted(tmp_path.rglob("*"))
    command = ["submit", study, "--address", NOWHERE, "--store", "/shared/store", "--dry-run", "--env", "HF_HOME"]
    told = json.loads(escala(*command, "--workers", 4, "--refit", "--json").stdout)
    run = "run study/study.yaml --address auto --store /shared/store --workers 4 --refit"
    assert told["entrypoint"] == f"exec python escala.py {run}"
    assert (told["cells"], told["environment"]) == (7, ["HF_HOME"])
    assert told["resources"] == {"CPU": 1, "node:__internal_head__": 0.001}
    assert told["bytes"] < 5e6
    assert {"escala.py", "sweeps/store.py", "cluster/driver.py", "analysis/laws.py"} <= set(told["files"])
    assert not [name for name in told["files"] if "tests/" in name or name.endswith(".pyc")]
    people = escala(*command).stdout
    assert "environment: HF_HOME" in people
    assert "/shared/hf" not in people
    assert sorted(tmp_path.rglob("*")) == before


def test_with_its_code_goes_the_folder_but_no_store_environment_history_or_notebook(
    escala: Escala, tmp_path: Path
) -> None:
    kept = ["gated.py", "tables/prices.csv"]
    left = [
        ".git/HEAD",
        ".env",
        ".venv/x.py",
        "mine/pyvenv.cfg",
        "mine/y.py",
        "data/store.json",
        "data/cells/a/log.jsonl",
    ]
    left += ["notebooks/a.py", "look.ipynb", "__pycache__/z.pyc", "tests/test_mine.py", "host.key"]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(GATED if name == "gated.py" else "{}")
    study = escala.study(gated_study("beside"))
    command = ["submit", study, "--address", NOWHERE, "--store", "/shared/store", "--dry-run", "--json"]
    found = json.loads(escala(*command, "--allow-code").stdout)["files"]
    assert {name for name in found if name.startswith("study/")} == {"study/study.yaml", *(f"study/{k}" for k in kept)}


def test_too_much_is_refused_early_with_the_largest_files(escala: Escala, tmp_path: Path) -> None:
    study = escala.study(gated_study("heavy"))
    (tmp_path / "gated.py").write_text(GATED)
    with (tmp_path / "tokens.bin").open("wb") as large:
        large.truncate(60_000_000)
    said = refused(escala, "submit", study, "--address", NOWHERE, "--store", "/shared/store", "--allow-code")
    assert re.search(r"has 6\d MB in", said)
    assert "at most 50 MB" in said
    assert "study/tokens.bin (60.0 MB)" in said
    small = escala.study(TINY, "small.yaml")  # without its code, what lies beside it does not matter
    escala("submit", small, "--address", NOWHERE, "--store", "/shared/store", "--dry-run")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--store", "store"], "Give the absolute path"),
        (["--env", "AWS_SECRET_ACCESS_KEY"], "is named like a secret"),
        (["--env", "CORPUS_URL"], "holds what looks like a password"),
        (["--env", "NOT_SET_ANYWHERE"], "is not set here"),
        (["--env", "A=1"], "the name of a variable alone"),
        (["--tracking-uri", "http://me:hunter2@mlflow:5000"], "carries a password"),
        (["--address", "head:8265"], "Did you mean"),
    ],
)
def test_what_would_be_lost_or_shown_on_the_cluster_is_refused(
    escala: Escala, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORPUS_URL", "https://me:hunter2@texts.example/corpus")
    study = escala.study(TINY)
    command = ["submit", study, "--address", NOWHERE, "--store", "/shared/store", *options]
    found = refused(escala, *command)
    assert said in found
    assert "hunter2" not in found


def test_a_study_that_cannot_be_planned_is_refused_before_anything_is_sent(escala: Escala) -> None:
    broken = escala.study(TINY.replace("sizes: 3", "sizes: many"))
    assert "1 fault in the study file" in refused(escala, "submit", broken, "--address", NOWHERE, "--store", "/s")
    code = escala.study(gated_study("gated"), "gated.yaml")
    assert "--allow-code" in refused(escala, "submit", code, "--address", NOWHERE, "--store", "/s")
    short = escala.study(TINY.replace("batch_tokens: 256", "batch_tokens: 65536"), "short.yaml")
    assert "cannot be planned" in refused(escala, "submit", short, "--address", NOWHERE, "--store", "/s")


@pytest.mark.parametrize("link", ["texts/notes.txt", "texts", "tok/tokenizer.json", "beside.py"])
def test_a_link_that_leads_out_of_the_studys_folder_sends_nothing(
    link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here / "texts", here / "tok", elsewhere):
        folder.mkdir(parents=True)
    (here / "texts" / "a.txt").write_text("To be or not to be. ")
    (elsewhere / "secret").write_text("hunter2")
    if link == "texts":
        (here / "texts").rename(here / "others")
    (here / link).symlink_to(elsewhere if link == "texts" else elsewhere / "secret")
    (here / "study.yaml").write_text(
        re.sub(r"corpus: .*", "corpus: {source: folder, path: texts}\ntokenizer: tok/tokenizer.json", TINY)
    )
    monkeypatch.chdir(here)
    declared = load_study(here / "study.yaml")
    with pytest.raises(InputError, match=r"leads out of .*here, to .*elsewhere"):
        make_package(here / "study.yaml", declared, allow_code=True)
    (here / link).unlink()
    make_package(here / "study.yaml", declared, allow_code=True)


def test_a_link_of_a_corpus_that_leads_to_what_lies_beside_the_study_sends_nothing(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("To be or not to be. ")
    (tmp_path / "texts" / "again.txt").symlink_to("a.txt")
    (tmp_path / "private.csv").write_text("hunter2")
    corpus = "corpus: {source: folder, path: texts, options: {glob: '*.txt'}}"
    (tmp_path / "study.yaml").write_text(re.sub(r"corpus: .*", corpus, TINY))
    declared = load_study(tmp_path / "study.yaml")
    sent = make_package(tmp_path / "study.yaml", declared, allow_code=False).files
    assert {place.name for place in sent if "texts" in place.parts} == {"a.txt", "again.txt"}
    (tmp_path / "texts" / "notes.md").symlink_to("../private.csv")  # which the corpus itself would not read
    with pytest.raises(InputError, match=r"^corpus\.path: .*notes\.md leads out of .*texts, to .*private\.csv"):
        make_package(tmp_path / "study.yaml", declared, allow_code=False)


@pytest.mark.slow
def test_a_corpus_beside_the_study_goes_whole_and_one_elsewhere_is_refused(escala: Escala, tmp_path: Path) -> None:
    texts = tmp_path / "texts" / "tests"
    texts.mkdir(parents=True)
    (texts / "a.txt").write_text("To be or not to be. " * 20_000)
    plain = re.sub(r"corpus: .*", "corpus: {source: folder, path: texts, repeat: true}", TINY)
    command = ["submit", escala.study(plain), "--address", NOWHERE, "--store", "/shared/store", "--dry-run", "--json"]
    assert "study/texts/tests/a.txt" in json.loads(escala(*command).stdout)["files"]
    (tmp_path / "studies").mkdir()
    away = escala.study(plain.replace("path: texts", "path: ../texts"), "studies/away.yaml")
    assert "lies outside" in refused(escala, "submit", away, "--address", NOWHERE, "--store", "/shared/store")
