"""Nodes die, are taken away, join and do not see the store: cells go elsewhere and lose nothing but time."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import ROOT
from raynodes import free_port, over, ray_node, wait_for

from cluster import driver, joined, nodes, shortage, tasks
from cluster.driver import Tally, run_study
from cluster.progress import Progress
from sweeps.corpora import make_source, prepare
from sweeps.errors import InputError
from sweeps.grids import Plan, plan_study
from sweeps.records import read_json, read_rows
from sweeps.store import Store, attempt_epochs, cell_state, count_ends, open_store, read_end, read_metrics
from sweeps.study import Study

TRAINER = """
import pathlib, time

def train(cell, io):
    here = pathlib.Path(__file__).parent
    state = io.restore() or {"step": 0, "x": 1.0 + cell.seed}
    for step in range(state["step"] + 1, cell.steps + 1):
        held = [here / "hold", here / f"hold-{cell.seed}"]
        while step == 25 and any(path.exists() for path in held):
            time.sleep(0.01)
            io.checkpoint((step - 1) * cell.batch_tokens, lambda: state)  # ends it where a stop is asked
        state = {"step": step, "x": state["x"] * 0.9}
        io.log(step * cell.batch_tokens, {"train_loss": state["x"]})
        io.checkpoint(step * cell.batch_tokens, lambda: state)
    return state["x"]
"""
STEPS, BATCH = 40, 64
NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024**2}
QUICK_DEATH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 6}
"""Ray finds a dead node within a few seconds, where it would take about fifteen."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits scaled down."""
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(driver, "LOOK_SECONDS", 0.2)


def start_cluster() -> Any:
    """A head that has no CPU, so that cells land on the nodes that a test adds."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT), "ESCALA_BEAT_SECONDS": "0.25"}  # for its workers alone
    try:
        return Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "_system_config": QUICK_DEATH})
    finally:
        for name in ("PYTHONPATH", "ESCALA_BEAT_SECONDS"):
            os.environ.pop(name)
        os.environ |= before


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    made = start_cluster()
    yield made
    made.shutdown()


@pytest.fixture
def add_node(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Adds nodes of one CPU, or of so many, which are gone after the test."""
    added: list[Any] = []
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("ESCALA_BEAT_SECONDS", "0.25")

    def add(cpus: int = 1) -> Any:
        added.append(cluster.add_node(**NODE | {"num_cpus": cpus}))
        return added[-1]

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """While this file is there, cells wait before their 25th step."""
    (tmp_path / "hold").touch()
    return tmp_path / "hold"


@pytest.fixture
def make_plan(store: Store, tmp_path: Path) -> Callable[[int], Plan]:
    (tmp_path / "mine.py").write_text(TRAINER)
    corpus = prepare(make_source("markov", None, {"vocab_size": 8, "tokens": 60_000}), "bytes", store.root)

    def make(cells: int) -> Plan:
        declared: dict[str, Any] = {
            "name": "s",
            "corpus": {"source": "markov", "options": {"vocab_size": 8, "tokens": 60_000}},
            "context": 32,
            "families": ["llama"],
            "grid": {"type": "points", "points": [{"size": 10_000, "tokens": STEPS * BATCH}]},
            "training": {"batch_tokens": BATCH},
            "seeds": list(range(cells)),
            "trainer": "mine.py:train",
        }
        return plan_study(Study.model_validate(declared), corpus, allow_code=True, base_dir=tmp_path)

    return make


@pytest.fixture
def drive(store: Store, tmp_path: Path) -> Callable[..., Tally]:
    def run(plan: Plan, address: str, watch: Callable[[Progress], None] = lambda _: None, **options: Any) -> Tally:
        options = {"base_dir": tmp_path, "checkpoint_seconds": 0.1} | options
        return run_study(store, plan, b"", watch=watch, address=address, **options)

    return run


class Watch:
    """Does one thing after the other, each at the first moment at which its condition holds. Gives up after minutes."""

    def __init__(self, *steps: tuple[Callable[[Progress], bool], Callable[[], object]]) -> None:
        self.steps, self.deadline, self.said = list(steps), time.monotonic() + 300, []

    def __call__(self, now: Progress) -> None:
        self.said += now.notes
        if self.steps and self.steps[0][0](now):
            self.steps.pop(0)[1]()
        assert time.monotonic() < self.deadline, f"{len(self.steps)} steps were never reached: {now}"


def at_work(cells: int) -> Callable[[Progress], bool]:
    """So many cells have come to where they are held."""
    return lambda now: sum(one.tokens >= BATCH * 24 for one in now.running) == cells


def node_of(ray: Any, store: Store, cell_id: str) -> str:
    """The node on which the cell's last attempt runs."""
    pid = read_json(store.attempt(cell_id, attempt_epochs(store, cell_id)[-1]) / "attempt.json")["pid"]
    actors = ray._private.state.state.actor_table(None, None, "ALIVE").values()
    return str(next(actor["Address"]["NodeID"] for actor in actors if actor["Pid"] == pid))


def names(store: Store, plan: Plan) -> list[str]:
    """What `ps` shows of the workers at the plan's cells, as Ray's dashboard does."""
    attempts = [store.attempt(one.cell.id, attempt_epochs(store, one.cell.id)[-1]) for one in plan.cells]
    return [psutil.Process(read_json(one / "attempt.json")["pid"]).cmdline()[0] for one in attempts]


def assert_whole(store: Store, plan: Plan) -> None:
    """Every cell has the result and the rows of an undisturbed run, and nothing was charged to it."""
    for one in plan.cells:
        result = read_json(store.cell(one.cell.id) / "result.json")
        x, rows = 1.0 + one.cell.seed, []
        for _ in range(STEPS):
            x *= 0.9
            rows.append({"train_loss": x})
        assert result["val_loss_final"] == x
        assert [row["metrics"] for row in read_metrics(store, one.cell.id)] == rows
        ends = count_ends(store, one.cell.id, attempt_epochs(store, one.cell.id))
        assert set(ends) <= {"preemption"}, ends


def ends(store: Store, plan: Plan) -> list[tuple[str, str]]:
    ids = [one.cell.id for one in plan.cells]
    found = [read_end(store, cell_id, epoch) for cell_id in ids for epoch in attempt_epochs(store, cell_id)]
    return [end for end in found if end is not None]


def went_on_from(store: Store, cell_id: str) -> int:
    """The tokens after which the cell's last attempt logged its first row."""
    rows, _ = read_rows(store.attempt(cell_id, attempt_epochs(store, cell_id)[-1]) / "log.jsonl")
    return int(rows[0]["tokens"]) - BATCH


@pytest.mark.slow
def test_the_cell_of_a_node_that_dies_goes_on_elsewhere_from_its_checkpoint_and_is_not_charged(
    cluster: Any,
    add_node: Callable[..., Any],
    make_plan: Callable[[int], Plan],
    drive: Callable[..., Tally],
    store: Store,
    tmp_path: Path,
) -> None:
    import ray

    added = {node.node_id: node for node in (add_node(), add_node())}
    plan, killed = make_plan(2), []
    first, second = plan.cells
    for one in plan.cells:
        (tmp_path / f"hold-{one.cell.seed}").touch()

    def kill() -> None:
        killed.append(node_of(ray, store, first.cell.id))
        worker = read_json(store.attempt(first.cell.id, 0) / "attempt.json")["pid"]
        os.kill(worker, signal.SIGKILL)  # a machine that goes down ends this first, and Ray hears of it first
        os.kill(added[killed[0]].all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def tried_again(_: Progress) -> bool:  # before that its worker might outlive its node for a moment, and finish it
        return attempt_epochs(store, first.cell.id) == [0, 1]

    make_room = (lambda now: bool(ends(store, plan)), (tmp_path / f"hold-{second.cell.seed}").unlink)
    go_on = (tried_again, (tmp_path / f"hold-{first.cell.seed}").unlink)
    tally = drive(plan, cluster.address, Watch((at_work(2), kill), make_room, go_on))
    assert (tally.finished, tally.failed, tally.stopped) == (2, {}, None)
    assert len(killed) == 1
    assert len(ends(store, plan)) == 1, ends(store, plan)
    ((kind, why),) = ends(store, plan)
    assert (kind, "its node died" in why) == ("preemption", True), why
    assert len(attempt_epochs(store, plan.cells[0].cell.id)) == 2
    assert went_on_from(store, plan.cells[0].cell.id) == 24 * BATCH
    assert_whole(store, plan)


def gang_nodes(ray: Any) -> set[str]:
    """The nodes of all that belongs to gangs: their actors, Ray Train's controllers and ranks."""
    actors = ray._private.state.state.actor_table(None, None, "ALIVE").values()
    kinds = ("Gang", "TrainController", "RayTrainWorker")
    return {str(one["Address"]["NodeID"]) for one in actors if one["ActorClassName"].endswith(kinds)}


@pytest.mark.slow
def test_a_gang_lives_on_one_node_and_goes_with_it_uncharged(
    cluster: Any,
    add_node: Callable[..., Any],
    drive: Callable[..., Tally],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    source = {"source": "markov", "options": {"vocab_size": 8, "tokens": 60_000}}
    grid = {"type": "points", "points": [{"size": 10_000, "tokens": 400 * BATCH}]}
    declared = {"name": "s", "corpus": source, "context": 32, "families": ["llama"], "grid": grid, "workers": 2}
    corpus = prepare(make_source("markov", None, source["options"]), "bytes", store.root)
    plan = plan_study(Study.model_validate(declared | {"training": {"batch_tokens": BATCH}}), corpus)
    (cell_id,) = [one.cell.id for one in plan.cells]
    with monkeypatch.context() as armed:
        armed.setenv("ESCALA_FAULT", "log.after_write:hang@17")  # its cell comes no further than a third
        node = add_node(2)
    lived_on: list[set[str]] = []

    def held(_: Progress) -> bool:
        return bool(attempt_epochs(store, cell_id)) and len(read_metrics(store, cell_id)) == 17

    def kill() -> None:
        lived_on.append(gang_nodes(ray))
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        add_node(2)

    tally = drive(plan, cluster.address, Watch((held, kill)))
    assert (tally.finished, tally.failed, tally.stopped) == (1, {}, None)
    assert lived_on == [{node.node_id}]
    ((kind, why),) = ends(store, plan)
    assert (kind, "its node died" in why) == ("preemption", True), why
    assert read_json(store.attempt(cell_id, 1) / "heartbeat.json")["resumed_from"] > 0


@pytest.mark.slow
def test_a_node_that_joins_gets_work_and_one_that_is_drained_is_left_with_a_checkpoint(
    cluster: Any,
    add_node: Callable[..., Any],
    make_plan: Callable[[int], Plan],
    drive: Callable[..., Tally],
    store: Store,
    hold: Path,
) -> None:
    import ray
    from ray.core.generated import autoscaler_pb2

    first = add_node()
    plan = make_plan(2)

    def drain() -> None:
        client = ray._raylet.GcsClient(address=cluster.address)
        reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
        assert client.drain_node(first.node_id, reason, "the spot market", int(time.time() * 1000) + 600_000)[0]

    def shown(now: Progress) -> bool:
        return at_work(2)(now) and all(name.startswith("ray::llama N=") for name in names(store, plan))

    left = (lambda now: any(kind == "preemption" for kind, _ in ends(store, plan)), hold.unlink)
    tally = drive(plan, cluster.address, Watch((at_work(1), add_node), (shown, drain), left))
    assert (tally.finished, tally.failed, tally.stopped) == (2, {}, None)
    ((kind, why),) = ends(store, plan)
    assert (kind, "its node is drained" in why) == ("preemption", True), why
    assert_whole(store, plan)


@pytest.mark.slow
def test_a_run_whose_last_node_is_gone_says_what_waits_and_does_not_wait_for_ever(
    cluster: Any,
    add_node: Callable[..., Any],
    make_plan: Callable[[int], Plan],
    drive: Callable[..., Tally],
    store: Store,
    hold: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shortage, "JOIN_SECONDS", 1.0)
    node, plan = add_node(), make_plan(2)
    kill = Watch((at_work(1), lambda: os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)))
    tally = drive(plan, cluster.address, kill)
    asked = "2 cells wait for 1 worker with 0 GPU and 1 CPU"
    assert tally.stopped is not None
    assert tally.stopped.startswith(f"{asked}, and no node that holds that joined in 1s. Add such a node")
    now = " for 1 worker with 0 GPU and 1 CPU, and no node holds that now: waiting"
    assert [said for said in kill.said if now in said], "of one cell, where Ray tells of the node before its worker"
    assert (tally.finished, tally.planned, tally.failed) == (0, 2, {})
    assert {kind for kind, _ in ends(store, plan)} <= {"preemption"}


def test_what_no_node_can_ever_hold_is_refused_and_the_largest_node_is_named(
    cluster: Any, make_plan: Callable[[int], Plan], drive: Callable[..., Tally], store: Store
) -> None:
    plan = make_plan(1)
    with pytest.raises(InputError, match=r"asks for 1 worker with 0 GPU and 1 CPU, and no node can ever hold that"):
        drive(plan, cluster.address)
    assert attempt_epochs(store, plan.cells[0].cell.id) == []


@pytest.mark.slow
def test_where_a_node_has_another_folder_in_the_stores_place_no_cell_goes_there_and_no_run_begins(
    cluster: Any,
    add_node: Callable[..., Any],
    make_plan: Callable[[int], Plan],
    drive: Callable[..., Tally],
    store: Store,
    hold: Path,
    tmp_path: Path,
) -> None:
    add_node()
    plan, log, later = make_plan(2), tmp_path / "node.log", make_plan(3)
    mount = over(store.root)
    with ExitStack() as stack:
        joins = ray_node(log, "--address", cluster.address, "--num-cpus", 1, before=mount, ESCALA_BEAT_SECONDS="0.25")
        watch = Watch(
            (at_work(1), lambda: stack.enter_context(joins)),
            (lambda now: any("no cell goes there" in said for said in watch.said), hold.unlink),
        )
        assert drive(plan, cluster.address, watch).finished == 2
        assert any("is another folder than the store here" in said for said in watch.said), watch.said
        with pytest.raises(InputError, match=r"is another folder than the store here.* Mount the shared file system"):
            drive(later, cluster.address)
    assert attempt_epochs(store, later.cells[2].cell.id) == []
    assert not list(store.root.glob(".probe-*"))


def cpus(address: str) -> float:
    """The CPUs of a cluster, without joining it."""
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    found = GcsClient(address=address).get_all_node_info().values()
    return sum(one.resources_total.get("CPU", 0.0) for one in found if one.state == GcsNodeInfo.ALIVE)


AUTOSCALED = {
    "cluster_name": "test",
    "max_workers": 2,
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1, "object_store_memory": 80 * 1024**2}, "node_config": {}, "max_workers": 2},
    },
    "head_node_type": "head",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.03,
    "auth": {"ssh_user": "nobody"},
}
"""Ray's own provider of nodes that are processes of this machine, none of them at first."""


@pytest.fixture
def autoscaled(tmp_path: Path) -> Iterator[str]:
    from ray._private.services import get_node_ip_address

    address = f"{get_node_ip_address()}:{free_port()}"
    provider = {"type": "fake_multinode", "gcs_address": address, "use_node_id_as_ip": True}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}
    empty = ("file_mounts", "docker"), ("initialization_commands", "setup_commands", "cluster_synced_files")
    config = AUTOSCALED | {"provider": provider} | {name: {} for name in empty[0]} | {name: [] for name in empty[1]}
    config |= {f"{kind}_setup_commands": [] for kind in ("head", "worker")}
    config |= {f"{kind}_start_ray_commands": [] for kind in ("head", "worker")}
    (tmp_path / "autoscaler.json").write_text(json.dumps(config))
    arguments = ["--head", "--port", address.rpartition(":")[2], "--num-cpus", 0, "--include-dashboard", "false"]
    arguments += [f"--autoscaling-config={tmp_path / 'autoscaler.json'}"]
    env = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "ESCALA_BEAT_SECONDS": "0.25"}
    log = tmp_path / "head.log"
    with ray_node(log, *arguments, **env):
        wait_for(lambda: "block forever" in log.read_text(errors="replace"), log)
        yield address


@pytest.mark.slow
def test_an_autoscaler_is_told_what_waits_and_gets_back_what_is_idle(
    autoscaled: str,
    make_plan: Callable[[int], Plan],
    drive: Callable[..., Tally],
    store: Store,
    hold: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joined, "IDLE_SECONDS", 0.5)
    from ray._raylet import GcsClient

    plan = make_plan(2)
    (tmp_path / "hold-1").touch()
    client = GcsClient(address=autoscaled)

    def asked() -> Any:
        return json.loads(client.internal_kv_get(b"autoscaler_resource_request", None, timeout=30) or b"null")

    def both() -> None:
        assert asked() == [{"CPU": 1.0}] * 2
        hold.unlink()

    def one_node_is_back(now: Progress) -> bool:
        return now.counts["finished"] == 1 and cpus(autoscaled) == 1

    tally = drive(plan, autoscaled, Watch((at_work(2), both), (one_node_is_back, (tmp_path / "hold-1").unlink)))
    assert (tally.finished, tally.failed, tally.stopped) == (2, {}, None)
    assert asked() == [], "what was asked for would hold nodes for ever"
    assert_whole(store, plan)
    assert ends(store, plan) == []


@pytest.mark.slow
def test_a_head_that_is_gone_ends_the_run_in_words_and_the_same_command_goes_on_from_the_checkpoints(
    make_plan: Callable[[int], Plan],
    drive: Callable[..., Tally],
    store: Store,
    hold: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "GONE_SECONDS", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("ESCALA_BEAT_SECONDS", "0.25")
    plan, lost = make_plan(1), start_cluster()
    try:
        lost.add_node(**NODE)

        def kill() -> None:
            for name in ("gcs_server", "raylet"):
                os.kill(lost.head_node.all_processes[name][0].process.pid, signal.SIGKILL)

        tally = drive(plan, lost.address, Watch((at_work(1), kill)))
        assert tally.stopped is not None
        assert tally.stopped.startswith(f"Ray is gone (its head at {lost.address} does not answer")
        assert tally.planned == 1
        assert ends(store, plan) == [("preemption", f"its head at {lost.address} does not answer")]
        assert cell_state(store, plan.cells[0].cell.id).state == "planned"
    finally:
        lost.shutdown()
    hold.unlink()
    with subprocess.Popen(["sleep", "600"]) as bystander:  # a Ray of its own ends with the run, and nothing else does
        assert drive(plan, "local", workers=1).finished == 1
        assert bystander.poll() is None
        bystander.kill()
    assert went_on_from(store, plan.cells[0].cell.id) == 24 * BATCH
    assert_whole(store, plan)
